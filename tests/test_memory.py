"""Bytes per device against shardings, the executable, and what devices have."""

import dataclasses
import random

import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from shardkit._core.tree import Leaf
from shardkit.hardware import CHIPS
from shardkit.report import CompiledBytes, PlacedLeaf, Program, Report
from shardkit.report.hlo._hlo import Shape
from shardkit.report.memory._history import _largest_at
from shardkit.report.memory._liveness import Buffer
from shardkit.report.memory._memory import read_memory
from shardkit.report.memory._suggestions import suggest_memory_savings

from ._programs import BATCH, HIDDEN, LAYERS, WIDTH, loss, make_mesh, program, rows, sgd, weights


def momentum(params, opt_state, x):
    params, value = sgd(params, x)
    return params, opt_state, value + jnp.sum(opt_state["up"])


def test_parts_are_exact_and_make_the_executables_arguments():
    mesh = make_mesh(data=2, tensor=4)
    up, down = P(None, None, "tensor"), P(None, ("tensor", "data"), None)
    made = program(
        momentum,
        mesh,
        params=weights(up, down),
        opt_state=weights(P(), P()),
        batch=rows(P("data")),
    )
    memory = read_memory(made)
    matrix = 4 * LAYERS * WIDTH * HIDDEN
    assert memory.params == matrix // 4 + matrix // 8
    assert memory.opt_state == 2 * matrix
    assert memory.batch == 4 * BATCH * WIDTH // 2
    assert memory.model_state == memory.rest == 0
    assert memory.padding == 0
    assert memory.arguments == made.memory.argument
    assert memory.problems == ()
    assert memory.capacity is None
    assert memory.fits is None
    assert memory.total == memory.arguments + memory.output + memory.temp


def test_donated_outputs_count_once():
    mesh = make_mesh(data=8)
    parts = {"params": weights(), "batch": rows(P("data"))}
    kept = read_memory(program(sgd, mesh, **parts))
    donated = read_memory(program(sgd, mesh, donate=("params",), **parts))
    assert kept.output - donated.output == kept.params


def test_an_executable_that_contradicts_its_shardings_is_a_problem():
    mesh = make_mesh(data=8)
    made = program(loss, mesh, params=weights(), batch=rows(P("data")))
    split = [dataclasses.replace(leaf, spec=P(None, "data")) for leaf in made.leaves]
    wrong = dataclasses.replace(made, leaves=tuple(split))
    (problem,) = Report.of(wrong).problems
    assert "6208 bytes of arguments" in problem
    assert "832" in problem


def wide(kind, said):
    leaf = Leaf("w", (1024, 1024, 1024), jnp.dtype("float32"))
    placed = PlacedLeaf("params", leaf, P())
    return Program("", (("data", 4),), "tpu", kind, (placed,), CompiledBytes(**said))


@pytest.mark.parametrize(
    ("kind", "fits"), [("TPU v5 lite", False), ("TPU v5", True), ("TPU v9", None)]
)
def test_what_fits(kind, fits):
    said = {
        "argument": 2**32,
        "output": 2**32,
        "alias": 2**32,
        "temp": 2**34,
        "peak": 2**34 + 2**32,
    }
    made = wide(kind, said)
    memory = read_memory(made)
    assert memory.total == 2**34 + 2**32
    assert memory.fits is fits
    if fits is False:
        assert memory.margin == 2**34 - memory.total
        first, second = suggest_memory_savings(memory, made.leaves, made.sizes)
        assert first.startswith("accumulate=2 or a remat policy: up to 8.00 GiB")
        assert second == "split params over 'data' too: 3.00 GiB less"
    else:
        assert suggest_memory_savings(memory, made.leaves, made.sizes) == []


def test_tiled_layouts_pad_but_never_shrink():
    assert read_memory(wide("TPU v5", {"argument": 2**32 + 512})).padding == 512
    assert read_memory(wide("TPU v5", {"argument": 2**32 + 512})).problems == ()
    assert read_memory(wide("TPU v5", {"argument": 2**31})).problems
    assert read_memory(wide("TPU v5", {})).total is None


def test_capacities_are_those_of_the_hardware_table():
    assert read_memory(wide("NVIDIA H200", {})).capacity == CHIPS["h200"].memory
    assert read_memory(wide("TPU v5 lite", {})).capacity == 16 * 2**30
    # A card of the same name with half the memory is not taken for the larger one.
    assert read_memory(wide("NVIDIA A100-SXM4-40GB", {})).capacity is None


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_buffers_of_each_column_are_those_of_a_search(seed):
    draw = random.Random(seed)
    starts = [draw.randrange(40) for _ in range(60)]
    buffers = [
        Buffer(Shape("u8", ()), draw.randrange(9), start, start + draw.randrange(12), f"b{start}")
        for start in starts
    ]
    at = sorted(draw.sample(range(45), 20))
    searched: dict[int, Buffer] = {}
    for moment in at:
        alive = [one for one in buffers if one.start <= moment <= one.end]
        for one in sorted(alive, key=lambda one: -one.bytes)[:3]:
            searched[id(one)] = one
    assert _largest_at(buffers, at) == list(searched.values())
