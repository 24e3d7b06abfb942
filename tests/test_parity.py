"""Every row of the parity table: the results of one device, and the bytes of the table."""

import dataclasses
from pathlib import Path

import jax
import pytest

import shardkit as sk
from shardkit.parity._record import GRADIENTS

from . import _parity
from ._quick import some_quick

CASES = _parity.CASES
# Both modes, on one reference. Smaller models compare the other kinds of parallelism with one
# device in README's command: test_accumulate (data), test_zero (the split optimizer),
# test_pipeline (a scalar loss), test_expert_parallel (a layer of experts).
QUICK = ("shard_map fsdp",)
# Each kind of parallelism once, most of them with others; the modes; bf16, several micro-batches.
SLOW = (
    "ring fsdp sequence",
    *("data ×2 bf16", "shard_map data", "zero1 tensor", "zero2 fsdp", "hsdp", "fsdp kept"),
    *("shard_map fsdp sequence ×2", "shard_map all bf16", "experts", "zero bubble fsdp"),
    *("pipeline tensor all_to_all", "pipeline experts sequence"),
)
# Findings of layouts that are not right.
WRONG = set(
    """activation_gather stored_contraction product_gather repeated_reduction optimizer_collective
    idle_option resharding spec_mismatch parameter_gather involuntary_remat""".split()
)
PAGE = Path(__file__).parents[1] / "docs" / "parity.md"


@pytest.mark.parametrize("name", some_quick(CASES, *QUICK, slow=SLOW))
def test_a_row_equals_one_device_and_sends_what_the_table_says(name):
    case, report = CASES[name], _parity.parity_report(name)
    report.check()
    errors = {row.check: row.error for row in report.rows}
    assert errors.keys() >= {"init", "loss", "grad_norm", "sgd update", "k-step state"}
    assert errors[GRADIENTS] <= (1e-5 if case.precision == "float32" else _parity.BF16_NOISE)
    if jax.__version__.startswith("0.10."):  # what the compiler sends changes with its version
        assert _parity.ratios(name) == pytest.approx(dict(case.ratios), abs=0.02)
    assert not WRONG & {finding.kind for finding in _parity.compile_case(name).report().findings}
    limit = 1.05 if case.mode == "shard_map" else 1.1
    assert case.why or all(ratio <= limit for ratio in case.ratios.values())


def test_a_gradient_that_is_off_by_1e_4_fails():
    observation = _parity.observe_case(QUICK[0])
    gradients = dict(observation.record[GRADIENTS])
    gradients["layers/up"] = gradients["layers/up"] * (1 + 1e-4)
    record = {**observation.record, GRADIENTS: gradients}
    wrong = dataclasses.replace(observation, record=record)
    with pytest.raises(sk.errors.VerificationError, match=r"layers/up is off by 1\.0e-04"):
        _parity.parity_report(QUICK[0], wrong).check()


def test_the_page_lists_the_rows_of_the_table():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    listed = [line.split("|")[1].strip().removesuffix(" (deep)") for line in lines]
    assert listed[2:] == list(CASES)
