"""Compiling for devices that are not here, in a child process that leaves nothing behind."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from shardkit._core.errors import ConfigError, MeshError, ReportError, ShardingError, StepError
from shardkit.mesh import Target
from shardkit.targets import StepSource, compile_for
from shardkit.targets.__main__ import find_user_line
from shardkit.targets._child import _child_environment

from ._declared import WIDTH

ROOT = Path(__file__).parent.parent
LIBTPU = importlib.util.find_spec("libtpu") is not None
CUDA = all(map(importlib.util.find_spec, ("jax_plugins", "jax_plugins.xla_cuda13")))


def source(function: str) -> StepSource:
    return StepSource(f"tests._declared:{function}")


def children() -> set[int]:
    """Processes that run `shardkit.targets` on behalf of this one, and all they started."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        mine = b"shardkit.targets" in words and parent in (1, os.getpid(), *found)
        if (mine or parent in found) and state != "Z":
            found.add(int(folder.name))
    return found


def test_a_pod_of_simulated_devices_leaves_the_callers_alone():
    before = jax.devices()
    report = compile_for(source("simulating"), "cpu:64", chip="v5e")
    assert report.mesh == (("data", 32), ("tensor", 2))
    assert report.memory.params == 4 * WIDTH * WIDTH // 2
    gradient, loss = 4 * WIDTH * WIDTH // 2, 4
    assert report.ledger.total("data") == round(62 / 32 * gradient) + round(62 / 32 * loss)
    assert report.ledger.complete
    # Simulated devices have no speed: a roofline is one of the chip that is named.
    assert (report.timeline.source, report.timeline.chip) == ("roofline", "v5e")
    assert report.timeline.label == "modelled"
    assert jax.devices() == before
    assert len(before) == 8


def test_a_chip_that_is_not_in_the_table_is_refused_before_anything_is_compiled():
    with pytest.raises(ReportError, match=r"'v5z'  is not in the hardware table\. Did you mean"):
        compile_for(source("step"), "cpu:4", chip="v5z")


def test_a_childs_error_is_raised_here_as_what_it_was():
    with pytest.raises(ShardingError, match="Did you mean 'tensor'"):
        compile_for(source("misspelt"), "cpu:4")


def test_what_a_source_returns_is_checked():
    with pytest.raises(ConfigError, match=r"tests\._declared:number  returned int"):
        compile_for(source("number"), "cpu:4")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:step", "there is no module 'no_such_module'"),
        (
            "tests._declared:stepp",
            r"no function 'stepp'\. Did you mean 'step'\?\nFix: tests._declared:step",
        ),
    ],
)
def test_sources_that_do_not_exist(name, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ConfigError, match=message):
        StepSource(name).load()


def test_an_argument_that_is_missing_is_named():
    with pytest.raises(ConfigError, match="cannot be called: missing a required argument: 'width'"):
        source("needy").load()


def test_a_source_survives_the_way_to_the_child():
    one = StepSource("configs/nano.py", ("model.num_layers=1",))
    assert StepSource.from_request(one.to_request()) == one
    assert not one.is_function
    assert source("step").is_function


def test_a_crash_of_the_compiler_is_an_error_with_its_last_lines():
    with pytest.raises(StepError, match="was ended by signal 6; its last lines") as error:
        compile_for(source("crash"), "cpu:2")
    assert "before the crash" in str(error.value)


def test_a_bug_in_the_users_code_keeps_its_traceback():
    with pytest.raises(ConfigError, match="KeyError: 'mine'") as error:
        compile_for(source("bug"), "cpu:2")
    first, *_, fix = str(error.value).splitlines()
    assert first == "The code of tests._declared:bug raised an error."
    assert re.fullmatch(r"Fix: .*_declared\.py:\d+", fix)


def test_a_bug_of_the_toolkit_is_not_called_the_users():
    with pytest.raises(AttributeError) as ours:
        Target.parse(None)  # pyright: ignore
    assert find_user_line(ours.value) is None
    with pytest.raises(ValueError) as theirs:  # noqa: PT011
        json.loads("{")
    assert (find_user_line(theirs.value) or "").startswith(f"{__file__}:")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.slow
def test_a_timeout_ends_the_child_and_what_it_started():
    seen, waited = set(), []

    def progress(seconds: float) -> None:
        waited.append(seconds)
        seen.update(children())

    with pytest.raises(StepError, match="not compiled after 6 s") as error:
        compile_for(source("forever"), "cpu:2", timeout=6, progress=progress)
    assert "a longer --timeout" in str(error.value)
    assert waited == sorted(waited)
    assert seen
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}/cmdline").exists() and alive(pid) for pid in seen):
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_caller_leaves_no_child_and_no_folder(tmp_path):
    asked = "compile_for(StepSource('tests._declared:forever'), 'cpu:2')"
    program = f"from shardkit.targets import StepSource, compile_for; {asked}"
    here = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    caller = subprocess.Popen([sys.executable, "-c", program], env=here, cwd=ROOT)
    listed = Path(f"/proc/{caller.pid}/task/{caller.pid}/children")
    deadline = time.monotonic() + 30
    while not (pids := listed.read_text().split()) or not list(tmp_path.glob("*/stderr")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(3)  # it imports JAX first
    caller.kill()
    caller.wait()
    while any(map(alive, map(int, pids))) or list(tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_unknown_targets_are_refused_before_a_child_is_started(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(MeshError, match=r"unknown chip 'v9'; known: v4, v5e, v5p, v6e, tpu7x\."):
        compile_for(source("step"), "tpu:v9:2x2")
    with pytest.raises(MeshError, match=r"unknown chip 'h10'; known: a100, h100, h200, b200\."):
        compile_for(source("step"), "gpu:h10:1x8")


@pytest.mark.skipif(LIBTPU, reason="libtpu is installed")
def test_without_the_tpu_extra_the_error_names_it():
    with pytest.raises(MeshError, match=r'pip install "shardkit\[tpu\]"'):
        compile_for(source("step"), "tpu:v5e:2x2")


@pytest.mark.skipif(CUDA, reason="the CUDA compiler is installed")
def test_without_the_cuda_extra_the_error_names_it():
    with pytest.raises(MeshError, match=r'pip install "shardkit\[cuda13\]"'):
        compile_for(source("step"), "gpu:h100:1x8")


@pytest.mark.slow
@pytest.mark.skipif(not LIBTPU, reason="needs the extra [tpu]")
def test_the_tpu_compiler():
    report = compile_for(source("step"), "tpu:v5e:2x4")
    assert (report.platform, dict(report.mesh)) == ("tpu", {"data": 4, "tensor": 2})
    assert report.ledger.complete
    assert report.ledger.total("data") > 0
    assert report.memory.capacity == 16 * 2**30
    assert (report.timeline.chip, report.timeline.source) == ("v5e", "schedule")
    assert report.timeline.compute > 0
    with pytest.raises(MeshError, match="the TPU compiler says"):
        compile_for(source("step"), "tpu:v5e:3x7")


@pytest.mark.slow
@pytest.mark.skipif(not CUDA, reason="needs the extra [cuda13]")
@pytest.mark.parametrize("chip", ["a100", "h100", "h200", "b200"])
def test_the_cuda_compiler(chip):
    report = compile_for(source("step"), f"gpu:{chip}:1x8")
    assert (report.platform, dict(report.mesh)) == ("gpu", {"data": 4, "tensor": 2})
    assert report.ledger.complete
    assert report.ledger.total("data") > 0
    assert (report.timeline.chip, report.timeline.source) == (chip, "roofline")
    assert 0 < report.timeline.low < report.timeline.high


def test_the_child_starts_no_accelerator_and_keeps_no_simulated_devices(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    program = "import jax; print(jax.default_backend(), jax.device_count())"
    inherited = _child_environment()
    said = subprocess.run(
        [sys.executable, "-c", program], env=inherited, capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == ["cpu", "1"]
