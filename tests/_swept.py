"""Step factories of research code, good and bad, for sweeps here and in a child process."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import shardkit as sk

WIDTH, ROWS = 8, 4


def init(key):
    return {"w": jax.random.normal(key, (WIDTH, WIDTH))}


def loss(params, batch, key):
    out = batch["x"] @ params["w"]
    return jnp.mean(out**2), {"mean": jnp.mean(out)}


def declared(mesh, *, accumulate, remat):
    """Splits a matrix over `tensor` and rows over `data`."""
    strategy = sk.Strategy(
        params=sk.PathRules({"w": P(None, "tensor")}),
        batch=P("data"),
        accumulate=accumulate,
        remat=remat,
    )
    batch = {"x": jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)}
    stops = {"on_nonfinite": "stop"}  # as configs do; then a step has a metric of its own
    return sk.StepSpec(
        loss_fn=loss,
        optimizer=optax.sgd(0.1),
        init=init,
        batch=batch,
        strategy=strategy,
        **stops,
    )


def picky(mesh, *, accumulate, remat):
    """Raises on some meshes, runs out of memory on one, and is right on the others."""
    sizes = mesh.shape
    if sizes["tensor"] == 2:
        raise KeyError("no such head")
    if sizes["tensor"] == 4:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
    return declared(mesh, accumulate=accumulate, remat=remat)


def deaf(mesh, *, accumulate, remat):
    """Does not do what it is asked."""
    return declared(mesh, accumulate=1, remat=remat)


def unlike(mesh):
    """Takes nothing of what a factory is asked."""
