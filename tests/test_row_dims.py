"""Batches whose leaves do not all count rows: against one device, by hand, in plain JAX."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.cli import main

from ._quick import some_quick
from ._uneven_batches import CASES, assert_close, compiled, normal, plain_mean

HOW = {
    "one device": {"sizes": {"data": 1}, "accumulate": 2},
    "data": {},
    "accumulated": {"accumulate": 2},
    "accumulated by rule": {"accumulate": 2, "rule": True},
    "shard_map": {"mode": "shard_map"},
    "accumulated in shard_map": {"mode": "shard_map", "accumulate": 2},
    "accumulated in shard_map by rule": {"mode": "shard_map", "accumulate": 2, "rule": True},
}
QUICK = ("accumulated by rule", "accumulated in shard_map")


def check_update(step, name, rtol=1e-5):
    """One SGD update at rate 1 subtracts the gradient."""
    loss, _, batch, *_ = CASES[name]
    state = step.init(jax.random.key(0))
    params = jax.device_get(state.params)
    value, grads = jax.value_and_grad(lambda p: plain_mean(loss, p, batch))(params)
    after, metrics = step(state, batch)
    assert_close(metrics["loss"], value)
    assert_close(jax.tree.map(jnp.subtract, params, jax.device_get(after.params)), grads, rtol)


@pytest.mark.parametrize("how", some_quick(HOW, *QUICK))
@pytest.mark.parametrize("name", some_quick(CASES, "time-major", "class weights"))
def test_an_update_is_that_of_one_device(name, how):
    check_update(compiled(name, **HOW[how]), name)


@pytest.mark.parametrize("name", some_quick(CASES, "class weights"))
def test_gradients_reduced_in_another_dtype_are_those_of_one_device(name):
    step = compiled(name, precision=sk.Precision(reduce_dtype="bfloat16"))
    check_update(step, name, rtol=2**-7)


def test_a_loop_from_zeros_runs_on_shards_of_a_later_dim():
    batch = normal(6, 8, 3)

    def loss(p, b, key):
        start = jnp.zeros((b.shape[1], 1))
        return jnp.mean(jax.lax.scan(lambda h, x: (jnp.tanh(h + x @ p), None), start, b)[0])

    step = sk.compile_step(
        loss,
        optax.sgd(1.0),
        init=lambda key: jnp.ones((3, 1)),
        batch=batch,
        mesh=sk.MeshSpec(data=4).build(devices=jax.devices()[:4]),
        strategy=sk.strategies.data(),
        row_dims={"**": 1},
        mode="shard_map",
        independent_rows=True,
    )
    gradient = step.gradients(step.init(jax.random.key(0)), batch)[1]
    expected = jax.grad(lambda p: loss(p, batch, None))(jnp.ones((3, 1)))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


# What is unclear, or wrong


def refused(kind, **options):
    options = {"strategy": sk.strategies.data(), "batch": {"x": normal(8, 4)}, **options}
    mesh = sk.MeshSpec(data=4).build(devices=jax.devices()[:4])
    with pytest.raises(kind) as told:
        sk.compile_step(
            options.pop("loss", lambda p, b, key: jnp.mean(b["x"] @ p["w"])),
            optax.sgd(1.0),
            init=lambda key: {"w": jnp.ones((4, 1))},
            mesh=mesh,
            **options,
        )
    return str(told.value)


GRAPH = {"nodes": normal(16, 4), "edges": np.zeros(40, int)}


def test_leaves_that_disagree_are_one_program_where_nothing_splits_rows():
    def loss(p, b, key):
        return jnp.mean(jax.ops.segment_sum((b["nodes"] @ p["w"])[b["edges"]], b["edges"], 16) ** 2)

    for strategy in (
        sk.Strategy(params=sk.PathRules({"w": P(None, "tensor")})),
        sk.Strategy(batch=sk.PathRules({"**": P("tensor")})),
    ):
        step = sk.compile_step(
            loss,
            optax.sgd(1.0),
            init=lambda key: {"w": jax.random.normal(key, (4, 8))},
            batch=GRAPH,
            mesh=sk.MeshSpec(tensor=8).build(),
            strategy=strategy,
        )
        state = step.init(jax.random.key(0))
        params = jax.device_get(state.params)
        assert_close(step(state, GRAPH)[1]["loss"], loss(params, GRAPH, None))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": sk.Strategy(), "accumulate": 2},
        {"strategy": sk.Strategy(batch=sk.PathRules({"**": P("data")})), "mode": "shard_map"},
    ],
)
def test_leaves_that_disagree_are_refused_where_rows_are_split(options):
    loss = lambda p, b, key: jnp.mean(b["nodes"] @ p["w"])  # noqa: E731
    text = refused(sk.ShardkitError, batch=GRAPH, loss=loss, **options)
    assert "batch/nodes f32[16,4]" in text
    assert "has 16 rows, edges has 40" in text
    assert "StepSpec(row_dims={'nodes': None, \"**\": 0})" in text


def test_a_rule_that_splits_several_dims_does_not_say_which_are_rows():
    own = sk.Strategy(batch=sk.PathRules({"**": P("data", "other")}))
    mesh = sk.MeshSpec(data=2, other=2).build(devices=jax.devices()[:4])
    spec = sk.StepSpec(
        loss_fn=lambda p, b, key: jnp.mean(b["x"] @ p["w"]),
        optimizer=optax.sgd(1.0),
        init=lambda key: {"w": jnp.ones((4, 1))},
        batch={"x": normal(8, 4)},
        strategy=own,
    )
    assert spec.replace(row_dims={"**": 0}, accumulate=2).compile(mesh).layout.rows == 8
    with pytest.raises(sk.errors.ShardingError, match="dims 0 and 1, each of which may be rows"):
        spec.replace(accumulate=2).compile(mesh)


@pytest.mark.parametrize(
    ("row_dims", "expected"),
    [
        ({"x": 0}, ["batch/w f32[4]", "no glob of row_dims matches"]),
        ({"**": 1}, ["batch/w f32[4]", "dim 1 counts rows, and it has 1 dims"]),
        ({"**": -1}, ["batch/x f32[8,4]", "dim -1 counts rows"]),
        ({"**": 0}, ["batch/w f32[4]", "has 4 rows, x has 8", "row_dims={'w': None"]),
        ({"z": 1, "**": 0}, ["row_dims['z']", "matches no leaf", "one of w, x"]),
        ({"**": "0"}, ["row_dims", "expected mapping of str to int or none"]),
        ({"**": True}, ["row_dims", "expected mapping of str to int or none"]),
        (0, ["row_dims", "expected mapping of str to int or none or none, got 0"]),
    ],
)
def test_row_dims_that_do_not_fit_the_batch(row_dims, expected):
    batch = {"x": normal(8, 4), "w": normal(4)}
    text = refused(sk.errors.StepError, batch=batch, row_dims=row_dims)
    assert all(part in text for part in expected), text


def test_a_pipeline_takes_rows_on_dim_0_alone():
    stack = dataclasses.replace(sk.strategies.pipeline(micro_batches=2), params=sk.REPLICATED)
    spec = sk.StepSpec(
        loss_fn=lambda p, b, key: jnp.mean(b["x"] @ p["w"]),
        optimizer=optax.sgd(1.0),
        init=lambda key: {"w": jnp.ones((4, 1))},
        batch={"x": normal(8, 4), "c": normal(3)},
        strategy=stack,
        row_dims={"c": None, "**": 0},
    )
    with pytest.raises(sk.errors.StepError, match=r"batch/c f32.3.  counts no rows"):
        spec.compile(sk.MeshSpec(pipe=2).build(devices=jax.devices()[:2]))


def test_a_first_entry_is_that_of_the_rows_whatever_their_dim():
    batch = {"x": normal(6, 8, 4), "c": normal(3)}
    mesh = sk.MeshSpec(data=2, context=2).build(devices=jax.devices()[:4])
    step = sk.compile_step(
        lambda p, b, key: jnp.mean(b["x"] @ p["w"]) + b["c"].sum(),
        optax.sgd(1.0),
        init=lambda key: {"w": jnp.ones((4, 1))},
        batch=batch,
        mesh=mesh,
        strategy=sk.Strategy(batch=P("data", "context")),
        row_dims={"c": None, "**": 1},
    )
    specs = {name: sharding.spec for name, sharding in step.batch_shardings.items()}
    assert specs == {"x": P("context", "data"), "c": P()}
    assert (step.layout.row_axes, list(step.local_rows)) == (("data",), list(range(8)))


@pytest.mark.slow
def test_draws_of_time_major_rows_are_those_of_one_device():
    def loss(p, b, key):
        noisy = b["x"] * jax.random.bernoulli(key, 0.5, b["x"].shape)
        return jnp.mean((noisy @ p["w"]) ** 2)

    spec = sk.StepSpec(
        loss_fn=loss,
        optimizer=optax.sgd(0.1),
        init=lambda key: {"w": jax.random.normal(key, (3, 2))},
        batch={"x": normal(5, 8, 3), "unused": normal(7)},
        strategy=sk.Strategy(batch=sk.PathRules({"x": P(None, "data"), "**": sk.REPLICATED})),
        accumulate=2,
    )
    assert sk.verify(spec, [sk.MeshSpec(data=4)], steps=2).check().ok


@pytest.mark.slow
def test_a_self_check_moves_rows_alone():
    _, _, batch, *_ = CASES["time-major"]
    step = compiled("time-major", sizes={"data": 2}, accumulate=2)
    result = step.self_check(step.init(jax.random.key(0)), batch)
    assert {check.name: check.verdict for check in result.checks}["rows"] == "ok", str(result)


def test_a_plan_sizes_rows_alone():
    loss, shapes, batch, row_dims, _ = CASES["time-major"]
    spec = sk.StepSpec(
        loss_fn=loss,
        optimizer=optax.sgd(1.0),
        init=lambda key: {name: jnp.zeros(shape) for name, shape in shapes.items()},
        batch=batch,
        row_dims=row_dims,
    )
    space = sk.SearchSpace(axes=("data",), remat=("none",))
    planned = sk.plan(spec, "tpu:v5e:2x2", global_batch=16, space=space)
    assert dict(planned.best.mesh) == {"data": 4}


@pytest.mark.slow
def test_two_processes_pass_their_rows_and_leaves_without_rows_whole(capfd, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", ".")
    program = [sys.executable, "-m", "tests._uneven_batches"]
    assert main(["launch", "-n", "2", "--devices", "2", "--", *program]) == 0
    said = [line.split() for line in capfd.readouterr().out.splitlines() if "losses" in line]
    step, batch = compiled("both", accumulate=2), CASES["both"][2]
    state, first = step(step.init(jax.random.key(0)), batch)
    _, second = step(state, batch)
    for line in said:
        assert_close([float(x) for x in line[-2:]], [first["loss"], second["loss"]])
    assert len(said) == 2
