"""Step factories, good and bad, for sweeps in this process and in a child."""

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
    stops = {"on_nonfinite": "stop"}  # as in configs; adds the metric `skipped`
    return sk.StepSpec(
        loss_fn=loss,
        optimizer=optax.sgd(0.1),
        init=init,
        batch=batch,
        strategy=strategy,
        **stops,
    )


def picky(mesh, *, accumulate, remat):
    """Raises on some meshes, runs out of memory on one, and works on the others."""
    sizes = mesh.shape
    if sizes["tensor"] == 2:
        raise KeyError("no such head")
    if sizes["tensor"] == 4:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
    return declared(mesh, accumulate=accumulate, remat=remat)


def deaf(mesh, *, accumulate, remat):
    """Ignores `accumulate`."""
    return declared(mesh, accumulate=1, remat=remat)


def unlike(mesh):
    """Does not take the options of a factory."""
