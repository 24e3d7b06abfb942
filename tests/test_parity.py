"""Every row of the parity table: one device's numbers, and the bytes that the table states."""

import dataclasses
from pathlib import Path

import jax
import pytest

import shardkit as sk
from shardkit.verify._record import GRADIENTS

from . import _parity

CASES = _parity.CASES
QUICK = ("zero2 ×2", "shard_map fsdp")
PAGE = Path(__file__).parents[1] / "docs" / "parity.md"


def marks(name):
    """`pytest -n 2 --dist loadgroup` computes the reference of rows alike in one process."""
    group = pytest.mark.xdist_group(str(_parity.alike(CASES[name])))
    return group if name in QUICK else (group, pytest.mark.slow)


rows = pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in CASES])


@rows
def test_a_row_equals_one_device_and_sends_what_the_table_says(name):
    case, certificate = CASES[name], _parity.certificate(name)
    certificate.check()
    errors = {row.check: row.error for row in certificate.rows}
    assert errors.keys() >= {"init", "loss", "grad_norm", "sgd update", "k-step state"}
    assert errors[GRADIENTS] <= (1e-5 if case.precision == "float32" else _parity.BF16_NOISE)
    if jax.__version__.startswith("0.10."):  # what the compiler sends changes with its version
        assert _parity.ratios(name) == pytest.approx(dict(case.ratios), abs=0.02)
    most = 1.05 if case.mode == "shard_map" else 1.1
    assert case.why or all(ratio <= most for ratio in case.ratios.values())


def test_a_gradient_that_is_off_by_1e_4_fails():
    found = _parity.observed(QUICK[0])
    gradients = dict(found.record[GRADIENTS])
    gradients["layers/up"] = gradients["layers/up"] * (1 + 1e-4)
    wrong = dataclasses.replace(found, record={**found.record, GRADIENTS: gradients})
    with pytest.raises(sk.VerificationError, match=r"layers/up is off by 1\.0e-04"):
        _parity.certificate(QUICK[0], wrong).check()


def test_the_page_lists_the_rows_of_the_table():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    listed = [line.split("|")[1].strip().removesuffix(" (deep)") for line in lines]
    assert listed[2:] == list(CASES)
