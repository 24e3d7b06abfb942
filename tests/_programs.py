"""Small compiled programs, in the form that a step passes to a report."""

import gzip
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardkit._core.tree import list_leaves
from shardkit.report import CompiledBytes, PlacedLeaf, Program

LAYERS, BATCH, WIDTH, HIDDEN = 3, 16, 8, 32
WEIGHTS = 4 * 2 * LAYERS * WIDTH * HIDDEN  # bytes, f32
SCALAR = 4
REPLICATED = P()


def recorded(name):
    path = pathlib.Path(__file__).parent / "data" / f"{name}.hlo.gz"
    return gzip.open(path, "rt").read()


def make_mesh(order=None, **axes):
    devices = np.array(jax.devices())[: np.prod(list(axes.values()))]
    devices = devices if order is None else devices[order]
    types = (AxisType.Auto,) * len(axes)
    return Mesh(devices.reshape(tuple(axes.values())), tuple(axes), axis_types=types)


def ring(n, payload):
    return (n - 1) * payload / n


def layer(x, w):
    with jax.named_scope("mlp"):
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None


def loss(params, x):
    with jax.named_scope("loss"):
        return jnp.mean(jax.lax.scan(layer, x, params)[0] ** 2)


def sgd(params, x, batch_loss=loss):
    value, grads = jax.value_and_grad(batch_loss)(params, x)
    with jax.named_scope("update"):
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, grads), value


def weights(up=REPLICATED, down=REPLICATED):
    return {"up": ((LAYERS, WIDTH, HIDDEN), up), "down": ((LAYERS, HIDDEN, WIDTH), down)}


def rows(spec, *shape):
    return shape or (BATCH, WIDTH), spec


def _leaf(x):
    return isinstance(x, tuple) and isinstance(x[-1], P)


def program(step, mesh, donate=(), whole=(), log="", out=None, **parts):
    """Compiles `step(*parts.values())`, whose parts are pytrees of `(shape, spec)`.

    `donate` and `whole` name parts that are donated, or declared replicated; `out` are the specs of
    the results.
    """
    placed, args = [], []
    for part, tree in parts.items():
        specs = [spec for _, spec in jax.tree.leaves(tree, is_leaf=_leaf)]
        arrays = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x[0], jnp.float32, sharding=NamedSharding(mesh, x[1])),
            tree,
            is_leaf=_leaf,
        )
        args.append(arrays)
        placed += [
            PlacedLeaf(part, leaf, spec, part in donate, part in whole)
            for leaf, spec in zip(list_leaves(arrays), specs, strict=True)
        ]
    numbers = tuple(i for i, part in enumerate(parts) if part in donate)
    placing = {}
    if out is not None:
        placing = {"out_shardings": jax.tree.map(lambda s: NamedSharding(mesh, s), out)}
    jitted = jax.jit(step, donate_argnums=numbers, keep_unused=True, **placing)
    traced = jitted.trace(*args)
    compiled = traced.lower().compile()
    return Program(
        hlo=compiled.as_text(),
        mesh=tuple(mesh.shape.items()),
        platform="cpu",
        device_kind="cpu",
        leaves=tuple(placed),
        memory=CompiledBytes.of(compiled.memory_analysis()),
        jaxpr=traced.jaxpr,
        log=log,
    )
