"""Adapters of `sk.lora` beside the weights of a folder: no file has them, so a key draws them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding

from .._core.errors import CheckpointError, Problem, raise_all
from .._core.tree import leaves_by_path
from .._core.types import Key, Loss, Variables, strip_axes
from ..rules import matches
from ..step import StepSpec, around_init


def list_adapters(spec: StepSpec, leaves: Iterable[str], rules: Mapping[str, str]) -> list[str]:
    """Returns the paths of the adapters among the leaves of a step that `rules` do not name."""
    if not isinstance(spec.loss_fn, Loss):
        return []
    own = {follows.path for follows in spec.loss_fn.follows}
    named = {path for path in own for glob in rules if matches(glob, path)}
    return [path for path in leaves if path in own - named]


def adapter_problems(adapters: Sequence[str], key: Any) -> list[Problem]:
    """What is wrong with the key that draws adapters."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        why = "draws nothing: the step has no adapters that partial= leaves to it"
        return [] if adapters else [Problem("key", why, "key=None")]
    if key is not None:
        return [Problem("key", f"is {key!r}, not a typed key", "key=jax.random.key(0)")]
    why = "is an adapter, which no folder has"
    return [Problem(path, why, "load(..., key=jax.random.key(0))") for path in adapters]


def draw_adapters(
    spec: StepSpec, mesh: Mesh, shardings: Mapping[str, Sharding], key: Key
) -> dict[str, jax.Array]:
    """Draws some leaves of `init` on their devices; raises CheckpointError if it lacks one.

    The other leaves are never made.
    """

    def draw(key: Key) -> dict[str, Any]:
        initial = spec.init(key)
        params = initial.params if isinstance(initial, Variables) else initial
        bare = strip_axes(params)
        leaves = leaves_by_path(bare)
        missing = [
            Problem(path, "is not drawn by init") for path in shardings if path not in leaves
        ]
        raise_all(CheckpointError, "Adapters cannot be drawn.", missing)
        return {path: leaves[path] for path in shardings}

    with around_init(mesh):
        return jax.jit(draw, out_shardings=dict(shardings))(key)
