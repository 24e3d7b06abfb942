"""Losses whose gradient is not their derivative: what is behind `stop_gradient` stays as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk
from shardkit.step import _gradients

from ._quick import some_quick

stop = jax.lax.stop_gradient
X, Z = np.random.default_rng(0).normal(size=(2, 16, 8)).astype("f")
BATCH = {"x": X, "z": Z}


def init(key):
    keys = dict(zip("gdo", jax.random.split(key, 3), strict=True))
    shapes = {"g": (8, 8), "d": (8, 8), "o": (8,)}
    return {name: 0.5 * jax.random.normal(keys[name], shape) for name, shape in shapes.items()}


def gan(p, b, key):
    """Both losses in one: each network has a gradient through its own alone."""

    def judge(p, x):
        return jnp.tanh(x @ p["d"]) @ p["o"]

    fake = jnp.tanh(b["z"] @ p["g"])
    real = jax.nn.softplus(-judge(p, b["x"])).mean()
    return (
        real
        + jax.nn.softplus(judge(p, stop(fake))).mean()
        + jax.nn.softplus(-judge(stop(p), fake)).mean()
    )


def own_target(p, b, key):
    target = jnp.tanh(1.5 * b["z"] @ p["d"] + p["o"])
    return jnp.mean((jnp.tanh(b["x"] @ p["g"]) - stop(target)) ** 2)


def straight_through(p, b, key):
    h = b["x"] @ p["g"]
    return jnp.mean(((h + stop(jnp.round(4 * h) / 4 - h)) @ p["d"]) ** 2)


def one_step_of_a_fixed_point(p, b, key):
    def turn(z):
        return jnp.tanh(0.3 * z @ p["g"] + b["x"])

    z = jax.lax.fori_loop(0, 20, lambda _, z: turn(z), jnp.zeros_like(b["x"]))
    return jnp.mean((turn(stop(z)) @ p["d"]) ** 2)


LOSSES = {
    loss.__name__: loss for loss in (gan, own_target, straight_through, one_step_of_a_fixed_point)
}
FORMS = ({}, {"mode": "shard_map"}, {"accumulate": 2}, {"precision": "bfloat16"})
ROWS = [(loss, i) for loss in LOSSES for i in range(len(FORMS))]


def self_checked(loss, **options):
    step = sk.compile_step(
        loss,
        optax.adam(1e-3),
        init=init,
        batch=BATCH,
        mesh=sk.MeshSpec(fsdp=4).build(devices=jax.devices()[:4]),
        strategy=sk.strategies.fsdp(min_size=0),
        **options,
    )
    return step.self_check(step.init(jax.random.key(0)), BATCH)


@pytest.mark.parametrize(("loss", "form"), some_quick(ROWS, ("gan", 0), ("straight_through", 1)))
def test_a_right_gradient_passes_though_it_is_not_the_derivative(loss, form):
    result = self_checked(LOSSES[loss], **FORMS[form])
    assert result["gradient"].verdict == "ok", str(result)


def test_a_wrong_gradient_beside_it_is_found(monkeypatch):
    def wrong(grads, weight, divide=_gradients.divide_by_weight):
        return {**divide(grads, weight), "g": -divide(grads, weight)["g"]}

    monkeypatch.setattr(_gradients, "divide_by_weight", wrong)
    result = self_checked(gan)
    assert result["gradient"].verdict == "FAILED"
    assert "params/g" in result["gradient"].leaf
