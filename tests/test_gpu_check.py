"""The script for a GPU runs in small sizes anywhere, so that it works where there is one."""

import importlib.util
import pathlib
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("gpu_check", BENCHMARKS / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_part_gives_its_numbers(gpu_check):
    saved = []
    rows = gpu_check.run_parts(
        gpu_check.Check(tiny=True, turns=3), lambda rows: saved.append([*rows])
    )
    assert not [row for row in rows if "problem" in row]
    assert saved[-1] == rows
    assert [len(some) for some in saved] == [1, 2, 3, 4, 5]
    rate, nano, large, start, checkpoint = rows
    for row in (nano, large):
        assert row["loss falls"]
        assert row["equal to jit"]
        assert not row["cuDNN attention"]
        assert row["ms"] > 0 < row["hand-written jit (ms)"]
        assert row["MFU against the product"] >= 0
    assert "bf16 product" in rate["what"]
    assert start["compiled (s)"] > 0
    assert checkpoint["save (s)"] >= checkpoint["of it blocking (s)"]


def test_a_part_that_fails_is_told_and_the_others_run(gpu_check):
    class Broken(gpu_check.Check):
        def product(self):
            yield {"what": "rate"}

        def updates(self, name):
            raise MemoryError(f"{name} is too large")
            yield

        warm_start = checkpoint = product

    rows = gpu_check.run_parts(Broken(tiny=True, turns=1), lambda rows: None)
    assert [row.get("problem") for row in rows] == [
        None,
        "MemoryError: nano is too large",
        "MemoryError: 1B is too large",
        None,
        None,
    ]
