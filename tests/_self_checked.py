"""Small steps for `step.self_check`, and what it says of each mutation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.testing import MUTATIONS

ROWS = 16


def init(key):
    up, down = jax.random.split(key)
    scale = jnp.zeros(8)
    return {
        "up": jax.random.normal(up, (4, 8)) / 2,
        "scale": scale,
        "down": jax.random.normal(down, (8, 4)) / 3,
    }


def forward(params, x, key=None):
    h = jnp.tanh(x @ params["up"]) * (1 + params["scale"])
    if key is not None:
        h = jnp.where(jax.random.bernoulli(key, 0.8, h.shape), h, 0)
    return h @ params["down"]


def mean_loss(params, batch, key):
    """A weighted mean over rows, without randomness."""
    error = jnp.mean((forward(params, batch["x"]) - batch["y"]) ** 2, axis=-1)
    return sk.Mean(jnp.sum(batch["w"] * error), batch["w"].sum())


def dropout_loss(params, batch, key):
    error = jnp.mean((forward(params, batch["x"], key) - batch["y"]) ** 2, axis=-1)
    return sk.Mean(jnp.sum(batch["w"] * error), batch["w"].sum()), {"rows": batch["w"].mean()}


def masked_by_hand(params, batch, key):
    """The same mean, divided where no step can see it: another number for each split of rows."""
    mean = mean_loss(params, {**batch, "w": batch["w"] + 0.1}, key)
    return mean.total / mean.weight


def batch():
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((ROWS, 4), np.float32) for _ in range(2))
    w = (rng.random(ROWS) < 0.6).astype(np.float32)
    w[: ROWS // 4] = 0
    return {"x": x, "y": y, "w": w}


STRATEGY = sk.Strategy(
    params=sk.PathRules({"up": P(None, "tensor"), "down": P("tensor"), "scale": sk.REPLICATED}),
    batch=P("data"),
)


def compiled(loss_fn=mean_loss, optimizer=None, **options):
    return sk.compile_step(
        loss_fn,
        optimizer or optax.adamw(1e-2),
        init=options.pop("init", init),
        batch=options.pop("batch", batch()),
        mesh=sk.MeshSpec(data=2, tensor=2).build(devices=jax.devices()[:4]),
        strategy=options.pop("strategy", STRATEGY),
        **options,
    )


def self_checked(step, updates=0):
    """The self check of a step, after some updates."""
    state = step.init(jax.random.key(0))
    for _ in range(updates):
        state, _ = step(state, batch())
    return step.self_check(state, batch())


def verdicts(result):
    """Checks that failed, in order."""
    return tuple(check.name for check in result.failed)


BY_NAME = {mutation.name: mutation for mutation in MUTATIONS}
