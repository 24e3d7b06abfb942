"""Collectives by logical axis, so that the same model code runs on whole arrays and on shards.

Under the partitioner, on one device and outside a step, arrays are whole and these functions do
nothing. In `mode="shard_map"` the model sees one device's shards, and each function is the
collective over the mesh axes that the strategy gives to the logical axis.

The mapping is read while tracing, so it is part of the keys of JAX's trace caches.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from .._core.tracing import TraceContext
from .._core.types import Batch, Key, Params
from ._remat import KEPT_PARAM

Axes = tuple[str, ...]
Dims = tuple[Axes, ...]
Names = tuple[str | None, ...]

use_param_p = core.Primitive("shardkit_use_param")
vary_p = core.Primitive("shardkit_vary")


@dataclasses.dataclass(frozen=True)
class ManualAxisRules:
    """Which mesh axes the logical axes of one step are, in `mode="shard_map"`."""

    # `(logical axis, mesh axes)` of activations and of products
    axes_by_name: tuple[tuple[str, Axes], ...]
    # `(logical axes of a weight, mesh axes per dim)` that `sk.nn.use_param` gathers
    gathered_dims: tuple[tuple[Names, Dims], ...] = ()
    kept_axes: Axes = ()  # mesh axes over which gathered weights are kept from forward to backward
    # dtype in which the gradients of gathered weights are summed; None: their own
    reduce_dtype: str | None = None

    def axes(self, *names: str | None) -> Axes:
        """Returns the mesh axes of some logical axes together, each once."""
        table = dict(self.axes_by_name)
        return tuple(dict.fromkeys(axis for name in names if name for axis in table.get(name, ())))


@dataclasses.dataclass(frozen=True)
class ShardMapLoss:
    """A loss written for shards, beside the same loss written for whole arrays.

    In `mode="shard_map"` the step calls `local` inside `shard_map` over the whole mesh: it sees
    one device's shards of parameters and batch, and reduces with `jax.lax` collectives over named
    mesh axes. Its result may differ along the axes that split the rows; it must be reduced over
    every other axis, or the step refuses it. In every other place, such as the single device that
    `sk.verify` compares with, `reference` is called.

    Attributes:
      local: `(params, batch, key) -> loss` on one device's shards.
      reference: `(params, batch, key) -> loss` on whole arrays.
    """

    local: Callable[..., Any]
    reference: Callable[..., Any]

    def __call__(self, params: Params, batch: Batch, key: Key) -> Any:
        """Calls `local` if shards are being traced, else `reference`."""
        return (self.local if on_shards() else self.reference)(params, batch, key)


_active = TraceContext[ManualAxisRules]("shards")
_untyped = TraceContext[bool]("untyped shards")


def use_manual_axis_rules(rules: ManualAxisRules) -> contextlib.AbstractContextManager[None]:
    """Maps logical axes to mesh axes while a function of shards is traced in the block."""
    return _active.use(rules)


def untyped() -> contextlib.AbstractContextManager[None]:
    """Records casts in the program, while shards are traced without types in the block."""
    return _untyped.use(True)


def gather_param(w: jax.Array, names: Names) -> jax.Array:
    """Returns a weight as products use it: on shards, gathered where only its storage is split."""
    rules = _active.value
    if rules is None:
        return use_param_p.bind(w, names=names)
    for dim, axes in enumerate(dict(rules.gathered_dims).get(names, ())):
        if axes:
            w = gather_dim(w, axes, dim, rules.reduce_dtype)
            w = checkpoint_name(w, KEPT_PARAM) if set(axes) <= set(rules.kept_axes) else w
    return w


def psum(x: jax.Array, *names: str) -> jax.Array:
    """Sums over the shards of dims that each shard has reduced: `vocab` after `x.sum(-1)`."""
    axes = _axes(*names)
    return jax.lax.psum(x, axes) if axes else x


def pmax(x: jax.Array, *names: str) -> jax.Array:
    """Takes the maximum over the shards of dims, as `psum` sums. It has no gradient."""
    axes = _axes(*names)
    return jax.lax.pmax(x, axes) if axes else x


def shard_offset(name: str, size: int) -> Any:
    """Returns the index in the whole dim of a shard's first element; 0 if the dim is whole.

    Args:
      name: logical axis of the dim.
      size: number of elements of the shard in this dim.
    """
    axes = _axes(name)
    return jax.lax.axis_index(axes) * size if axes else 0


def on_shards() -> bool:
    """Whether a function of one device's shards is being traced."""
    return _active.value is not None


def reshard(x: jax.Array, names: Names, source: Names, into: Names, partial: Names) -> jax.Array:
    """Brings a shard from the layout `source` to `names`; see `constrain`."""
    rules = _active.value
    assert rules is not None
    unsummed = rules.axes(*partial)
    for dim, (old, new) in enumerate(zip(source, names, strict=True)):
        before, after = rules.axes(old), rules.axes(new)
        leaving = tuple(axis for axis in before if axis not in after)
        entering = tuple(axis for axis in after if axis not in before)
        if leaving:
            x = jax.lax.all_gather(x, leaving, axis=dim, tiled=True)
        if entering and set(entering) <= set(unsummed):
            x = jax.lax.psum_scatter(x, entering, scatter_dimension=dim, tiled=True)
            unsummed = tuple(axis for axis in unsummed if axis not in entering)
        elif entering:
            x = _slice_shard(x, entering, dim)
    if unsummed:
        x = jax.lax.psum(x, unsummed)
    return pvary(x, rules.axes(*into))


def varying_axes(x: Any) -> frozenset[str]:
    """Returns the mesh axes along which the shards of a value may differ, by its type."""
    return frozenset(jax.typeof(x).mat.varying)


def pvary(x: jax.Array, axes: Axes) -> jax.Array:
    """Types a value as varying along more axes, so that its gradient is summed over them here."""
    if _untyped.value:
        return vary_p.bind(x, axes=axes) if axes else x
    added = tuple(axis for axis in axes if axis not in varying_axes(x))
    return jax.lax.pcast(x, added, to="varying") if added else x


def gather_dim(x: jax.Array, axes: Axes, dim: int, reduce: str | None = None) -> jax.Array:
    """Gathers a dim from its shards; its gradient is summed in the dtype `reduce` and scattered."""
    if reduce is None or reduce == x.dtype:
        return jax.lax.all_gather(x, axes, axis=dim, tiled=True)
    return _gather_reducing(x, axes, dim, reduce)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_reducing(x: jax.Array, axes: Axes, dim: int, reduce: str) -> jax.Array:
    return jax.lax.all_gather(x, axes, axis=dim, tiled=True)


def _gather_bwd(axes: Axes, dim: int, reduce: str, _: None, g: jax.Array) -> tuple[jax.Array]:
    summed = jax.lax.psum_scatter(g.astype(reduce), axes, scatter_dimension=dim, tiled=True)
    return (summed.astype(g.dtype),)


_gather_reducing.defvjp(
    lambda x, axes, dim, reduce: (_gather_reducing(x, axes, dim, reduce), None), _gather_bwd
)


def _axes(*names: str) -> Axes:
    rules = _active.value
    return rules.axes(*names) if rules else ()


def _slice_shard(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    size = x.shape[dim] // jax.lax.axis_size(axes)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * size, size, dim)


def _batch(args: Any, dims: Any, *, names: Names) -> Any:
    return use_param_p.bind(args[0], names=names), dims[0]


def _batch_vary(args: Any, dims: Any, *, axes: Axes) -> Any:
    return vary_p.bind(args[0], axes=axes), dims[0]


use_param_p.def_impl(lambda w, *, names: w)
use_param_p.def_abstract_eval(lambda w, *, names: w)
ad.deflinear2(use_param_p, lambda ct, _, *, names: [ct])
batching.primitive_batchers[use_param_p] = _batch
mlir.register_lowering(use_param_p, lambda ctx, w, *, names: [w])
vary_p.def_abstract_eval(lambda x, *, axes: x)
ad.deflinear2(vary_p, lambda ct, _, *, axes: [jax.lax.psum(ct, axes)])
batching.primitive_batchers[vary_p] = _batch_vary
