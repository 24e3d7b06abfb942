"""ZeRO: optimizer state over an axis that parameters are whole over, for any optax chain."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit._core.tree import Leaf
from shardkit.parallel import Zero
from shardkit.targets import StepSource, compile_for
from shardkit.testing import MUTATIONS, ZERO_MUTATIONS, kill_matrix

from ._declared import WIDTH
from ._quick import some_quick

zero, tensor, fsdp = sk.strategies.zero, sk.strategies.tensor, sk.strategies.fsdp
BATCH = {"x": np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)}


def init(key):
    up, down = jax.random.split(key)
    return {
        "up": sk.WithAxes(jax.random.normal(up, (16, 32)) / 4, ("embed", "mlp")),
        "down": sk.WithAxes(jax.random.normal(down, (32, 16)) / 4, ("mlp", "embed")),
        "odd": sk.WithAxes(jnp.ones((3, 5)), (None, None)),
    }


def loss_fn(params, batch, key):
    h = sk.nn.constrain(jax.nn.relu(batch["x"] @ params["up"]), "batch", "mlp")
    return jnp.mean((h @ params["down"] - batch["x"]) ** 2) * params["odd"].mean()


@functools.cache
def compiled(strategy, optimizer=None, accumulate=1, **sizes):
    return sk.compile_step(
        loss_fn,
        optimizer or ADAM,
        init=init,
        batch=BATCH,
        mesh=sk.MeshSpec(**sizes).build(devices=jax.devices()[: np.prod(list(sizes.values()))]),
        strategy=strategy,
        accumulate=accumulate,
    )


ADAM = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))
MOMENTS = 2 * 2 * 16 * 32 * 4  # two moments of two kernels, f32
REST = 2 * 3 * 5 * 4 + 4  # two moments of the odd leaf, and Adam's count


def specs(step, of="mu"):
    moments = getattr(step.shardings.opt_state[1][0], of)
    return {path: sharding.spec for path, sharding in moments.items()}


@pytest.mark.parametrize("stage", [1, 2])
def test_state_of_leaves_that_divide_takes_one_nth(stage):
    step = compiled(zero(stage=stage), data=4)
    assert {path: s.spec for path, s in step.shardings.params.items()} == dict.fromkeys(
        ("up", "down", "odd"), P()
    )
    assert specs(step) == {"up": P(None, "data"), "down": P("data"), "odd": P()}
    assert step.report().memory.opt_state == MOMENTS // 4 + REST


def test_a_leaf_that_no_dim_divides_stays_whole_and_is_said_so():
    findings = [
        f
        for f in compiled(zero(), data=4).report().findings
        if f.kind == "replicated_optimizer_state"
    ]
    assert {f.leaf for f in findings} == {"opt_state/1/0/mu/odd", "opt_state/1/0/nu/odd"}
    assert "no dim of 1/0/mu/odd f32[3,5] is a multiple of data=4" in findings[0].why
    assert "all 4 devices hold and update the same state" in findings[0].why
    assert findings[0].bytes == 60 * 3 // 4


def test_it_splits_on_top_of_what_other_strategies_split():
    both = compiled(zero() | tensor(), data=2, tensor=4)
    inside = ("tensor", "data")
    assert specs(both) == {"up": P(None, inside), "down": P(inside), "odd": P()}
    assert both.shardings.params["up"].spec == P(None, "tensor")
    assert both.report().memory.opt_state == MOMENTS // 8 + REST
    deep = compiled(zero() | fsdp(), data=2, fsdp=2)
    assert specs(deep)["up"] == P(("fsdp", "data"))
    assert deep.report().memory.opt_state == MOMENTS // 4 + REST


def test_a_dim_that_is_split_already_takes_the_axis_inside_where_it_divides():
    leaf = Leaf("w", (8, 3), np.dtype("float32"))
    assert Zero("data").spec(leaf, P("fsdp"), {"data": 2, "fsdp": 2}) == P(("fsdp", "data"))
    assert Zero("data").spec(leaf, P("fsdp"), {"data": 3, "fsdp": 2}) == P("fsdp", "data")
    assert Zero("data").spec(leaf, P("data"), {"data": 2, "fsdp": 2}) == P("data")


def test_a_dim_of_layers_is_split_only_where_no_other_divides():
    sizes = {"data": 4}
    deep = Leaf("w", (64, 8), np.dtype("float32"), ("layers", "embed"))
    assert Zero("data").spec(deep, P(), sizes) == P(None, "data")
    thin = Leaf("w", (64, 3), np.dtype("float32"), ("layers", "norm"))
    assert Zero("data").spec(thin, P(), sizes) == P("data")


CHAINS = {
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "lion, masked": optax.masked(optax.lion(1e-3), {"up": True, "down": True, "odd": False}),
    "adam of some": optax.multi_transform(
        {"a": optax.adam(1e-2), "b": optax.sgd(1e-2, momentum=0.9)},
        {"up": "a", "down": "b", "odd": "b"},
    ),
}


@pytest.mark.parametrize("name", some_quick(CHAINS, "lion, masked"))
def test_any_optax_chain_gives_the_numbers_of_one_device(name):
    one = compiled(zero(stage=2), CHAINS[name], data=1)
    many = compiled(zero(stage=2), CHAINS[name], data=4)
    assert any("data" in s.spec for s in jax.tree.leaves(many.shardings.opt_state))
    states = [step.init(jax.random.key(0)) for step in (one, many)]
    for _ in range(2):
        states = [step(s, BATCH)[0] for step, s in zip((one, many), states, strict=True)]
    for a, b in zip(*(jax.tree.leaves(s.params) for s in states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_micro_batches_are_reduced_once():
    report = compiled(zero(stage=2), accumulate=2, data=4).report()
    assert report.reductions == {"data": 1.0}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [tpu]")
def test_the_tpu_compiler_scatters_gradients_and_gathers_weights():
    report = compile_for(StepSource("tests._declared:zero"), "tpu:v5e:2x4")
    weights = 4 * WIDTH * WIDTH
    assert report.memory.opt_state == 2 * weights // 8 + 4
    rows = [row for row in report.ledger.where("data") if row.payload_bytes > 1024]
    assert {row.kind for row in rows} == {"reduce-scatter", "all-gather"}
    assert sum(row.wire_bytes for row in rows) == 2 * weights * 7 // 8


def test_a_stage_that_there_is_not():
    with pytest.raises(sk.errors.StepError) as caught:
        zero(stage=3)
    assert "stage=3" in str(caught.value)
    assert "stage 1 splits optimizer state, stage 2 gradients too, stage 3 is fsdp" in str(
        caught.value
    )
    assert "strategies.fsdp('data')" in str(caught.value)


WRONG_SPEC = tuple(one for one in MUTATIONS if one.name == "wrong spec")
LAYOUTS = {
    "zero": (zero(), {"data": 2}, ZERO_MUTATIONS),
    "fsdp": (fsdp(min_size=0), {"fsdp": 2}, WRONG_SPEC),
    "tensor": (sk.strategies.data() | tensor(), {"data": 2, "tensor": 2}, WRONG_SPEC),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_is_not_the_declared_one_is_found(name):
    strategy, sizes, mutations = LAYOUTS[name]

    def factory(mesh):
        return sk.compile_step(loss_fn, ADAM, init=init, batch=BATCH, mesh=mesh, strategy=strategy)

    mesh = sk.MeshSpec(**sizes).build(devices=jax.devices()[: np.prod(list(sizes.values()))])
    kill_matrix(factory, mesh, batches=[BATCH], steps=2, mutations=mutations).check()
