"""A small state with every kind of leaf, and functions that damage a checkpoint of it."""

import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shardkit._core.train_state import TrainState
from shardkit.mesh import MeshSpec

MESHES = {
    "data=2 x tensor=4": (dict(data=2, tensor=4), P("data", "tensor")),
    "tensor=8": (dict(tensor=8), P(None, "tensor")),
    "one device": (dict(data=1), P()),
}
AXES = {"params/w": ("embed", "mlp"), "params/b": ("mlp",)}


def make_state(seed: int = 0, step: int = 3) -> TrainState:
    """Float, bfloat16, integer, bool, empty and key leaves, on one device, uncommitted."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "w": jax.random.normal(keys[0], (16, 32)),
        "b": jax.random.normal(keys[1], (32,), jnp.bfloat16),
        "none": jnp.zeros((0, 4)),
    }
    opt_state = optax.adam(1e-3).init(params)
    model_state = {"seen": jnp.arange(8, dtype=jnp.int32), "on": jnp.array([True, False])}
    return TrainState(jnp.int32(step), params, opt_state, model_state, keys[2], jnp.bool(False))


def shardings(state: TrainState, mesh: str = "data=2 x tensor=4") -> TrainState:
    """Matrices split by the mesh's spec, everything else replicated."""
    axes, spec = MESHES[mesh]
    size = int(np.prod(list(axes.values())))
    built = MeshSpec(**axes).build(devices=jax.devices()[:size])
    wide = (16, 32)
    return jax.tree.map(
        lambda x: NamedSharding(built, spec if tuple(x.shape) == wide else P()), state
    )


def on_mesh(state: TrainState, mesh: str = "data=2 x tensor=4") -> TrainState:
    return jax.device_put(state, shardings(state, mesh))


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def bits(state) -> dict[str, bytes]:
    """`{path: dtype, shape and bytes}` of every leaf, to be compared with `==`."""
    bare = jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        state,
    )
    return {
        jax.tree_util.keystr(path): f"{x.dtype}{x.shape}".encode() + np.asarray(x).tobytes()
        for path, x in jax.tree_util.tree_leaves_with_path(bare)
    }


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content) * 8)
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(content)


def zero_page(path: Path, rng: random.Random, page: int = 4096) -> None:
    content = bytearray(path.read_bytes())
    start = rng.randrange(-(-len(content) // page)) * page
    content[start : start + page] = bytes(len(content[start : start + page]))
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def swap(path: Path, other: Path) -> None:
    aside = path.with_name(path.name + ".aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to
