"""A model of plain functions for `layer_stack`: dropout, weights, tied params, side inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shardkit as sk

VOCAB, WIDTH, LENGTH = 16, 8, 4


def init(key, layers=4):
    table, up, down = jax.random.split(key, 3)
    return {
        "table": sk.WithAxes(jax.random.normal(table, (VOCAB, WIDTH)), ("vocab", "embed")),
        "scale": sk.WithAxes(jnp.ones((WIDTH,)), ("norm",)),
        "up": sk.WithAxes(
            jax.random.normal(up, (layers, WIDTH, 2 * WIDTH)) / 3, ("layers", "embed", "mlp")
        ),
        "down": sk.WithAxes(
            jax.random.normal(down, (layers, 2 * WIDTH, WIDTH)) / 4, ("layers", "mlp", "embed")
        ),
    }


def first(ends, batch, key):
    x = jnp.take(ends["table"], batch["tokens"], axis=0)
    return sk.nn.constrain(drop(x, key), "batch", "length", "embed")


def layer(weights, x, batch, key):
    h = sk.nn.constrain(jnp.tanh(x @ weights["up"]), "batch", "length", "mlp")
    y = sk.nn.constrain(drop(h @ weights["down"], key), "batch", "length", "embed")
    return x + y * batch["gate"][:, None, None]


def last(ends, x, batch):
    logits = (x * ends["scale"]) @ ends["table"].T
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    weight = batch["weights"].sum()
    size = sk.Mean((jnp.abs(x).mean((1, 2)) * batch["gate"]).sum(), batch["gate"].sum())
    return sk.Mean((nll * batch["weights"]).sum(), weight), {"size": size}


def drop(x, key, rate=0.25):
    if key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def loss(params, batch, key, last=last):
    ends = {name: params[name] for name in ("table", "scale")}
    layers = {name: params[name] for name in ("up", "down")}
    return sk.nn.layer_stack(first, layer, last, ends, layers, batch, key)


def make_batch(rows=16, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 3, (rows, LENGTH)).astype(np.float32)
    weights[: rows // 4] = 0  # the first of four devices has no valid token
    return {
        "tokens": rng.integers(0, VOCAB, (rows, LENGTH)).astype(np.int32),
        "targets": rng.integers(0, VOCAB, (rows, LENGTH)).astype(np.int32),
        "weights": weights,
        "gate": rng.uniform(0.5, 1.5, rows).astype(np.float32),
    }


def step(mesh, strategy, layers=4, rows=16, loss=loss, optimizer=None):
    return sk.compile_step(
        loss,
        optimizer or optax.sgd(0.1),
        init=lambda key: init(key, layers),
        batch=make_batch(rows),
        mesh=mesh,
        strategy=strategy,
    )


def verified(sizes, strategy):
    """The parity report of a layout, in a process that has its devices."""
    mesh = sk.MeshSpec(**sizes)
    return sk.verify(
        lambda mesh: step(mesh, strategy), [mesh], batches=[make_batch()], steps=2
    ).check()
