"""Recorded programs of absent compilers: GPU pairs and loops, TPU fusions, and gaps in them."""

import random
import re
from collections import Counter

import pytest

from shardkit.report import Program, model_time, read_ledger
from shardkit.report.communication._collectives import SPELLED, find_collectives
from shardkit.report.hlo._hlo import parse
from shardkit.report.hlo._slices import Slices
from shardkit.report.hlo._sources import find_argument

from ._programs import recorded, ring

MESHES = {
    "gpu_h100_nano": (("data", 4), ("tensor", 2)),
    "tpu_v5e_fsdp_tensor": (("fsdp", 2), ("tensor", 4)),
    "tpu_v5p_fsdp_tensor": (("fsdp", 4), ("tensor", 4)),
    "tpu_v5p_splash": (("data", 2), ("tensor", 4)),
    "tpu_v6e_fsdp_tensor": (("fsdp", 2), ("tensor", 4)),
    "tpu_v6e_sparsecore": (("fsdp", 8),),
}


@pytest.fixture(scope="module")
def texts():
    return {name: recorded(name) for name in MESHES}


@pytest.fixture(scope="module")
def ledgers(texts):
    return {name: read_ledger(texts[name], mesh) for name, mesh in MESHES.items()}


def test_a_recorded_gpu_program(texts, ledgers):
    """Nano on 8 H100s, data=4 x tensor=2: 2 layers in loops whose trips are printed."""
    text, ledger = texts["gpu_h100_nano"], ledgers["gpu_h100_nano"]
    assert ledger.complete
    loops = [one for c in parse(text).computations.values() for one in c.instructions.values()
             if one.opcode == "while"]  # fmt: skip
    assert len(loops) == text.count("known_trip_count") == 2
    assert {row.trips for row in ledger} == {1, 2}
    # Half of what overlaps stands in fusions that are themselves started and ended.
    starts, ends = (len(re.findall(rf" all-reduce-{end}\(", text)) for end in ("start", "done"))
    assert starts == ends == 3
    overlapped = [row.name for row in ledger if row.overlapped]
    assert len(overlapped) == 6
    assert sum(name.startswith("all-reduce-start") for name in overlapped) == starts
    # Each layer sums one [batch, length, embed] of 2 rows twice forward and twice backward.
    activation = 4 * 2 * 128 * 64
    layers = [row for row in ledger.where(("tensor",)) if row.trips == 2]
    for phase in ("forward", "backward"):
        sent = sum(row.wire_bytes for row in layers if row.phase == phase)
        assert sent == 2 * 2 * 2 * ring(2, activation), phase
    assert ledger.total() == sum(ledger.by_axes().values()) == 1_053_650


def test_collectives_that_sparse_cores_run(texts, ledgers):
    """Two weights of 4096 x 4096, one split by rows, one by columns, gathered beside the products.

    Compiled with xla_tpu_enable_sparse_core_collective_offload_all_gather.
    """
    text, ledger = texts["tpu_v6e_sparsecore"], ledgers["tpu_v6e_sparsecore"]
    assert text.count('}, execution_thread="sparsecore"') == len(ledger) == 2
    assert ledger.complete, ledger.problems
    assert [row.wire_bytes for row in ledger] == [ring(8, 2 * 4096 * 4096)] * 2
    assert [row.overlapped for row in ledger] == [False, True]
    module = parse(text)
    sources = []
    for row in ledger:
        body = module.computations[row.computation]
        number = find_argument(module, body, body.instructions[row.name].operands[0])
        sources.append(module.computations[module.entry].parameters[number].op_name)
    assert sources == ["up", "down"]


def test_chains_of_asynchronous_fusions_are_one_collective(texts, ledgers):
    """One step for v5e, in chains of fusions that each hold a copy, and for v6e, in plain ops."""
    chained, plain = ledgers["tpu_v5e_fsdp_tensor"], ledgers["tpu_v6e_fsdp_tensor"]
    assert texts["tpu_v5e_fsdp_tensor"].count("%async-collective-start") > 10
    assert "async-collective" not in texts["tpu_v6e_fsdp_tensor"]
    assert chained.complete
    assert plain.complete

    def groups(ledger):
        return Counter((row.kind, row.axes, row.trips, row.payload_bytes) for row in ledger)

    assert groups(chained) == groups(plain)
    assert chained.total() == plain.total()
    hidden = [row for row in chained if row.overlapped]
    assert len(hidden) == 14
    assert not any(row.overlapped for row in plain)


def test_a_chain_hides_behind_the_compute_of_its_steps(texts, ledgers):
    name = "tpu_v5e_fsdp_tensor"
    made = Program(texts[name], MESHES[name], "tpu", "TPU v5 lite")
    timeline = model_time(made, ledgers[name], None)
    assert timeline.problems == ()
    assert timeline.exposed < sum(timeline.communication.values())
    assert timeline.high == pytest.approx(timeline.compute + timeline.exposed)


@pytest.mark.parametrize("name", MESHES)
def test_every_collective_of_the_text_is_visited(name, texts):
    module = parse(texts[name])
    found, problems = find_collectives(module, Slices(MESHES[name], {}))
    assert problems == []
    unquoted = re.sub(r'"(?:[^"\\]|\\.)*"', '""', texts[name])
    places = {place for one in found for place in one.locations}
    assert len(places) == len(SPELLED.findall(unquoted)) > 0


# The smaller texts: every try reads one anew.
SMALL = ("gpu_h100_nano", "tpu_v5p_splash")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", SMALL)
def test_a_text_with_a_gap_is_never_complete(name, seed, texts, ledgers):
    text, chance = texts[name], random.Random(seed)
    cut = text[: chance.randrange(len(text) - 3)]
    assert not read_ledger(cut, MESHES[name]).complete
    lines = text.split("\n")
    weighty = [n for n, line in enumerate(lines) if SPELLED.search(line) or " while(" in line]
    del lines[chance.choice(weighty)]
    assert not read_ledger("\n".join(lines), MESHES[name]).complete


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (" all-reduce(", " all-scatter(", "an unknown kind of collective"),
        ("known_trip_count", "secret", ""),
        ("replica_groups=[", "replica_groups=sparse[", "unknown form"),
        ("source", "sauce", ""),
    ],
)
def test_what_a_gpu_program_says_otherwise_is_said(old, new, problem, texts, ledgers):
    name = "gpu_h100_nano"
    changed = read_ledger(texts[name].replace(old, new), MESHES[name])
    if problem:
        assert any(problem in said for said in changed.problems), changed.problems
    else:
        # Derived where it is not printed, or of no weight: the same, or said to be lacking.
        assert not changed.complete or changed.total() == ledgers[name].total()
