"""Equinox modules through `sk.from_equinox`, against Equinox alone on one device."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk

RNG = np.random.default_rng(0)
BATCH = {"x": jnp.asarray(RNG.normal(size=(16, 4)), jnp.float32)}
OPTIMIZER = optax.trace(0.0)
AXES = {"up/weight": ("mlp", "embed"), "down/weight": ("embed", "mlp"), "**/bias": (None,)}


class Net(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    activation: object

    def __init__(self, key):
        up, down = jax.random.split(key)
        self.up = eqx.nn.Linear(4, 8, key=up)
        self.down = eqx.nn.Linear(8, 4, key=down)
        self.dropout, self.activation = eqx.nn.Dropout(0.5), jax.nn.silu

    def __call__(self, x, key=None):
        return self.down(self.dropout(self.activation(self.up(x)), key=key))


def loss_of(module, batch, key):
    keys = jax.random.split(key, batch["x"].shape[0])
    return jnp.mean((jax.vmap(module)(batch["x"], keys) - 1) ** 2)


def compiled(model, strategy, sizes, mode="auto"):
    mesh = sk.MeshSpec(**sizes).build()
    options = {"init": model.init, "batch": BATCH, "mesh": mesh, "strategy": strategy}
    return sk.compile_step(model.loss_fn, OPTIMIZER, mode=mode, **options)


LAYOUTS = {
    "tensor": (sk.strategies.data() | sk.strategies.tensor(), {"data": 2, "tensor": 4}, "auto"),
    "fsdp": (sk.strategies.data() | sk.strategies.fsdp(), {"data": 2, "fsdp": 4}, "shard_map"),
}


@pytest.mark.parametrize("layout", [pytest.param("tensor", marks=pytest.mark.slow), "fsdp"])
def test_a_module_with_dropout(layout):
    model = sk.from_equinox(Net, loss_of, axes=AXES)
    step = compiled(model, *LAYOUTS[layout])
    state = step.init(jax.random.key(0))
    module = Net(jax.random.key(0))
    # The key of step 0, which dropout draws its masks from.
    key = jax.random.fold_in(jax.random.wrap_key_data(jax.random.key_data(state.key)), 0)
    loss, gradients = eqx.filter_value_and_grad(loss_of)(module, BATCH, key)
    quiet = loss_of(eqx.nn.inference_mode(module), BATCH, key)
    np.testing.assert_allclose(step.evaluate(state, BATCH)["loss"], quiet, rtol=1e-5)
    np.testing.assert_allclose(loss_of(model.bind(state.params), BATCH, key), quiet, rtol=1e-5)
    state, metrics = step(state, BATCH)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for name in ("up", "down"):
        ours, theirs = state.opt_state.trace[name]["weight"], getattr(gradients, name).weight
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


class Counting(eqx.Module):
    """Batch norm, and an array that is not trained."""

    up: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    scale: jax.Array

    def __init__(self, key):
        self.up = eqx.nn.Linear(4, 8, key=key)
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
        self.scale = jnp.arange(8)

    def __call__(self, x, state):
        x, state = self.norm(self.up(x) * self.scale, state)
        return x, state


def stateful_loss(module, state, batch):
    mapped = jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    y, state = mapped(batch["x"], state)
    return (jnp.mean((y - 1) ** 3), {"mean": jnp.mean(y)}), state


@pytest.mark.slow
def test_a_module_with_state():
    def make(key):
        return eqx.nn.make_with_state(Counting)(key=key)

    model = sk.from_equinox(make, stateful_loss)
    step = compiled(model, sk.Strategy(params=sk.REPLICATED, batch=P("data")), {"data": 8})
    state = step.init(jax.random.key(0))
    module, own = make(jax.random.key(0))

    @eqx.filter_value_and_grad(has_aux=True)
    def by_equinox(module, own):
        (loss, _), own = stateful_loss(module, own, BATCH)
        return loss, own

    for _ in range(2):
        (loss, own), gradients = by_equinox(module, own)
        module = eqx.apply_updates(module, gradients)
        state, metrics = step(state, BATCH)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    with pytest.raises(sk.ShardkitError, match=r"bind\(state.params, state.model_state\)"):
        model.bind(state.params)
    ours, ours_state = model.bind(state.params, state.model_state)
    np.testing.assert_array_equal(ours.scale, np.arange(8))
    expected = stateful_loss(eqx.nn.inference_mode(module), own, BATCH)[0][0]
    np.testing.assert_allclose(stateful_loss(ours, ours_state, BATCH)[0][0], expected, rtol=1e-5)


class Named(eqx.Module):
    """A trained part named `state`, beside a state; dict keys that contain a `/`."""

    state: eqx.nn.Linear
    tables: dict
    norm: eqx.nn.BatchNorm
    counts: dict

    def __init__(self, key):
        self.state = eqx.nn.Linear(4, 4, key=key)
        self.tables = {"a": jnp.ones(2), "a/b": jnp.full(2, 2.0)}
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
        self.counts = {"state": jnp.arange(2)}


def test_a_part_is_of_the_state_by_what_it_is_not_by_its_name():
    def make(key):
        return eqx.nn.make_with_state(Named)(key=key)

    model = sk.from_equinox(
        make, stateful_loss, axes={"state/*": (None,), "tables/a/b": ("embed",)}
    )
    variables = model.init(jax.random.key(0))
    assert {*variables.params} >= {"state", "tables"}
    assert variables.params["tables"]["a/b"].axes == ("embed",)
    assert "counts" in variables.model_state
    arrays = [
        jax.tree.map(lambda x: getattr(x, "value", x), tree, is_leaf=lambda x: hasattr(x, "axes"))
        for tree in (variables.params, variables.model_state)
    ]
    bound = jax.tree.leaves(eqx.filter(model.bind(*arrays), eqx.is_array))
    made = jax.tree.leaves(eqx.filter(make(jax.random.key(0)), eqx.is_array))
    assert len(bound) == len(made)
    assert all(map(jnp.array_equal, bound, made))


def test_two_arrays_of_one_path_are_refused():
    class Twice(eqx.Module):
        tables: dict

        def __init__(self, key):
            self.tables = {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)}

    with pytest.raises(sk.errors.TreeError, match="tables/a/b"):
        sk.from_equinox(Twice, loss_of)


def test_axes_that_match_nothing_are_refused():
    with pytest.raises(sk.errors.ShardingError) as raised:
        sk.from_equinox(Net, loss_of, axes={"top/weight": ("mlp", "embed")})
    text = str(raised.value)
    assert "axes['top/weight']  matches no parameter; there are up/weight, up/bias" in text


def test_a_loss_that_loses_the_state_is_refused():
    model = sk.from_equinox(
        lambda key: eqx.nn.make_with_state(Counting)(key=key),
        lambda module, state, batch: stateful_loss(module, state, batch)[0][0],
    )
    with pytest.raises(sk.errors.StepError, match="return loss, state"):
        compiled(model, sk.Strategy(params=sk.REPLICATED, batch=P("data")), {"data": 8})


def test_without_equinox_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "equinox", None)
    with pytest.raises(sk.errors.StepError, match="pip install equinox"):
        sk.from_equinox(Net, loss_of)
