"""Rules of propagation in closed form, on programs of one or two operations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardkit._core.types import Accumulate
from shardkit.hardware import CHIPS
from shardkit.planner._estimate import EFFICIENCY, Machine, ShardCounts, compute_seconds, estimate
from shardkit.planner._network import Network
from shardkit.planner._program import flatten_jaxpr
from shardkit.planner._propagator import Propagator
from shardkit.planner._symbolic_sharding import SymbolicSharding, replicated
from shardkit.planner._trace import StepCosts

F32, BF16 = jnp.float32, jnp.bfloat16


def shape(*dims: int, dtype=F32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def run_propagator(run, ins: list[SymbolicSharding], *args, tile_width: int = 1):
    """The costs of a function, and the most bytes that it holds where nothing is split."""
    flat = flatten_jaxpr(jax.make_jaxpr(run)(*args))
    propagator = Propagator(lambda names, shape: ((),) * len(shape), tile_width)
    _, live = propagator.run(flat, ins, [None] * len(flat.outputs))
    return propagator.costs, max(sum(point.values()) for point in live)


@pytest.mark.parametrize(("before", "width"), [(BF16, 2), (F32, 4)])
def test_a_sum_is_made_in_the_dtype_before_its_cast(before, width):
    def run(x, w):
        return jnp.tanh((x @ w).astype(F32))

    split = [SymbolicSharding(((), ("tensor",))), SymbolicSharding((("tensor",), ()))]
    costs, _ = run_propagator(run, split, shape(8, 16, dtype=before), shape(16, 32, dtype=before))
    (sent,) = costs.collectives
    assert (sent.kind, sent.axes) == ("all-reduce", {"tensor"})
    assert sent.payload == {frozenset(): 8 * 32 * width}


def test_a_loop_writes_a_stacked_result_when_it_is_made():
    layers, n = 5, 16

    def run(x, ws):
        def body(x, w):
            y = x @ w
            return w @ x, y

        return jax.lax.scan(body, x, ws)

    _, held = run_propagator(run, [replicated(2), replicated(3)], shape(n, n), shape(layers, n, n))
    # The stack, the carry behind the loop, and in it one of the two products at a time.
    assert held == (layers + 1 + 1) * n * n * 4


def test_tiles_are_filled_along_the_dim_that_wastes_least():
    _, held = run_propagator(
        lambda x, w: x @ w, [replicated(2)] * 2, shape(64, 8), shape(8, 96), tile_width=128
    )
    assert held == 64 * 128 * 4  # and not 128 x 96
    split = [SymbolicSharding(((), ())), SymbolicSharding(((), ("tensor",)))]
    costs, held = run_propagator(
        lambda x, w: x @ w, split, shape(64, 8), shape(8, 96), tile_width=128
    )
    assert held == 128 * 96 * 4  # a split dim is none that a compiler may choose
    assert not costs.collectives


def test_products_fill_whole_tiles_of_the_unit_that_multiplies():
    x = jax.ShapeDtypeStruct((512, 2048), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((2048, 512), jnp.bfloat16)
    propagator = Propagator(lambda names, shape: ((),) * len(shape))
    laid = [SymbolicSharding(((), ("a",))), SymbolicSharding((("a",), ()))]
    propagator.run(flatten_jaxpr(jax.make_jaxpr(jnp.dot)(x, w)), laid, [None])
    sizes = (1, 2, 32)
    parts = ShardCounts([({"a": n}, Accumulate()) for n in sizes], 1.0)
    chip = dataclasses.replace(CHIPS["v5p"], memory_bandwidth=1e18)
    machine = Machine(Network(chip, (32,)), "bf16")
    compute, _ = compute_seconds(StepCosts(propagator.costs, [], (), frozenset()), parts, machine)
    ideal = 2.0 * 512 * 512 * 2048 / chip.flops["bf16"] / EFFICIENCY["tpu"]
    filled = [ideal / 1, ideal / 2, ideal / 32 * 2]  # sums of 64 fill half of a tile
    np.testing.assert_allclose(compute.sum(axis=0), filled)


def test_slices_of_stacks_are_copied():
    def run(x, ws):
        return jax.lax.scan(lambda c, w: (c + w, c + w), x, ws)[1]

    x, ws = jax.ShapeDtypeStruct((8,), jnp.float32), jax.ShapeDtypeStruct((3, 8), jnp.float32)
    propagator = Propagator(lambda names, shape: ((),) * len(shape))
    propagator.run(
        flatten_jaxpr(jax.make_jaxpr(run)(x, ws)), [replicated(1), replicated(2)], [None]
    )
    (stack,) = [one for one in propagator.costs.compute if one.name == "stack"]
    assert stack.site.trips == 3
    assert stack.bytes_moved == {frozenset(): 2 * (32 + 32)}  # one read from `ws`, one written


def test_unreduced_gradients_are_summed_at_once_where_rows_are_split_by_data():
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    propagator = Propagator(lambda names, shape: ((),) * len(shape))
    propagator.run(flatten_jaxpr(jax.make_jaxpr(lambda x: x @ x.T)(x)), [replicated(2)], [None])
    cases = [
        ({"data": data, "fsdp": 4}, Accumulate(k, "end")) for data, k in ((2, 2), (1, 2), (2, 1))
    ]
    machine = Machine(Network(CHIPS["v5p"], (8,)), "bf16")
    found = estimate(
        StepCosts(propagator.costs, [{}], (), frozenset()), cases, machine, unreduced=[4096.0] * 3
    )
    # 2 · 7/8 of the 1024 gradients, 2 bytes each; `fsdp` alone is left to propagation.
    np.testing.assert_allclose(found.wire["data", "fsdp"], [2 * 7 / 8 * 2048, 0, 0])
