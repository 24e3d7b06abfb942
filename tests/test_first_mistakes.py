"""What a first call gets wrong is named, with the call that works."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.config import OptimizerConfig

BATCH = {"x": np.ones((8, 8), np.float32)}
STRATEGY = sk.Strategy(params=sk.PathRules({"w": P(None, "tensor")}), batch=P("data"))


def init(key):
    return {"w": jax.random.normal(key, (8, 8))}


def loss_fn(params, batch, key):
    return jnp.mean((batch["x"] @ params["w"]) ** 2)


@pytest.fixture(scope="module")
def mesh():
    return sk.MeshSpec(data=2, tensor=4).build()


def compiled(mesh_, **changes):
    given = {"init": init, "batch": BATCH, "mesh": mesh_, "strategy": STRATEGY, **changes}
    loss, optimizer = given.pop("loss_fn", loss_fn), given.pop("optimizer", optax.sgd(0.1))
    return sk.compile_step(loss, optimizer, **given)


@pytest.fixture(scope="module")
def step(mesh):
    return compiled(mesh)


@pytest.mark.parametrize(
    ("changes", "subject", "fix"),
    [
        (
            {"mesh": sk.MeshSpec(data=2, tensor=4)},
            "mesh  is a MeshSpec that is not built",
            r"\.build\(\)",
        ),
        ({"mesh": None}, "mesh  is of type NoneType", r"sk\.MeshSpec\("),
        ({"batch": {"x": 3}}, "batch/x  is of type int, not an array", r"numpy\.asarray"),
        ({"strategy": {"w": P()}}, "strategy  is of type dict", r"sk\.Strategy\("),
        ({"optimizer": optax.adamw}, "optimizer  is of type function", "called"),
        ({"init": {"w": 1}}, "init  is of type dict", r"def init\(key\)"),
        ({"loss_fn": 3}, "loss_fn  is of type int", r"def loss_fn\(params, batch, key\)"),
    ],
)
def test_arguments_of_the_wrong_kind(mesh, changes, subject, fix):
    with pytest.raises(sk.errors.StepError, match=rf"{subject}[\s\S]*Fix: .*{fix}"):
        compiled(mesh, **changes)


def test_several_wrong_options_are_one_error(mesh):
    with pytest.raises(sk.errors.StepError) as raised:
        compiled(mesh, remat="ful", precision="fp8", accumulate=0)
    text = str(raised.value)
    assert all(part in text for part in ("remat='ful'", "precision='fp8'", "accumulate")), text


def test_a_spec_is_no_rule():
    with pytest.raises(sk.errors.StepError, match=r"params  P\('data',\) is not a rule"):
        sk.Strategy(params=P("data"))
    with pytest.raises(
        sk.errors.StepError, match=r"batch   'data' is not a rule[\s\S]*P\(\"data\"\)"
    ):
        sk.Strategy(params={"w": P()}, batch="data")


def test_an_unknown_field_to_replace(step):
    with pytest.raises(sk.errors.StepError, match=r"meh  is not a field of StepSpec.*'mesh'"):
        step.replace(meh=3)


def test_an_explicit_mesh_of_the_caller_changes_nothing(step, mesh):
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "tensor"))):
        inside = compiled(mesh)
        state = inside.init(jax.random.key(0))
        _, metrics = inside(state, BATCH)
    _, expected = step(step.init(jax.random.key(0)), BATCH)
    assert metrics["loss"] == expected["loss"]


def test_shard_batch_takes_a_batch_from_anywhere(step, mesh):
    elsewhere = {"x": jax.device_put(BATCH["x"], jax.devices()[3])}
    assert step.shard_batch(elsewhere)["x"].sharding.spec == P("data")
    with pytest.raises(
        sk.errors.BatchError, match=r"committed to 1 device[\s\S]*step\.shard_batch\(batch\)"
    ):
        step(step.init(jax.random.key(0)), elsewhere)


def test_an_axis_that_splits_nothing_is_a_finding(mesh, step):
    idle = compiled(mesh, strategy=sk.Strategy(batch=P("data"))).report().findings
    assert [(one.kind, one.axes) for one in idle] == [("idle_axis", ("tensor",))]
    assert not step.report().findings


def test_an_optimizer_that_does_not_want_the_loss(mesh):
    plain = optax.sgd(0.1)
    sharpness_aware = optax.contrib.sam(plain, plain)
    assert compiled(mesh, optimizer=sharpness_aware).abstract_state.opt_state is not None


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_rate_that_is_no_positive_number(rate):
    with pytest.raises(sk.errors.ConfigError, match="must be positive and finite"):
        OptimizerConfig(lr=rate)


def test_a_run_name_stays_below_runs():
    for name in ("", "../../x"):
        with pytest.raises(sk.errors.ConfigError, match="cannot have slashes"):
            sk.Config(name=name)
