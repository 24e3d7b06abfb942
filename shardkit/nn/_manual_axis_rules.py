"""What a model says of its split dims, so that the same lines run on whole arrays and on shards.

Under auto partitioning, on one device and outside a step these are nothing: arrays are whole. In
`mode="shard_map"` the model sees the shards of one device, and each of these is the collective
that its strategy calls for. The model names logical axes only.

What a name means is read while tracing, and so it is part of the key of JAX's trace caches.
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
from ._remat import KEPT

Axes = tuple[str, ...]
Dims = tuple[Axes, ...]
Names = tuple[str | None, ...]

weight_p = core.Primitive("shardkit_weight")


@dataclasses.dataclass(frozen=True)
class ManualAxisRules:
    """What logical names mean on the shards of one step.

    Attributes:
      used: `(logical axis, mesh axes)` of activations and of products.
      gathered: `(names of a weight, mesh axes per dim)` that its use gathers.
      kept: mesh axes over which gathered weights are kept from forward to backward.
      reduce: dtype in which the gradients of gathered weights are summed; None: their own.
    """

    used: tuple[tuple[str, Axes], ...]
    gathered: tuple[tuple[Names, Dims], ...] = ()
    kept: Axes = ()
    reduce: str | None = None

    def axes(self, *names: str | None) -> Axes:
        """Mesh axes of some logical axes together, each once."""
        table = dict(self.used)
        return tuple(dict.fromkeys(axis for name in names if name for axis in table.get(name, ())))


@dataclasses.dataclass(frozen=True)
class ShardMapLoss:
    """A loss that is written for shards, with the same loss written for whole arrays.

    In `mode="shard_map"` the step calls `local` inside of `shard_map` over the whole mesh: it sees
    one device's shards of parameters and batch, and reduces with `jax.lax` collectives by
    the names of mesh axes. What it returns may differ over the axes that split the rows, as one
    device's rows do; over every other axis it must be reduced, or the step says so. Everywhere
    else `reference` is called, on one device above all, so that `sk.verify` compares the two.

    Attributes:
      local: `(params, batch, key) -> loss` of one device's shards.
      reference: the same of whole arrays.
    """

    local: Callable[..., Any]
    reference: Callable[..., Any]

    def __call__(self, params: Any, batch: Any, key: Any) -> Any:
        """Calls the one that fits where it is traced."""
        return (self.local if on_shards() else self.reference)(params, batch, key)


_active = TraceContext[ManualAxisRules]("shards")


def manual_axis_rules(made: ManualAxisRules) -> contextlib.AbstractContextManager[None]:
    """Makes names mean this while a function of shards is traced."""
    return _active.use(made)


def gather_param(w: jax.Array, names: Names) -> jax.Array:
    """A weight as its products see it; on shards, what splits it only in storage is gathered."""
    now = _active.value
    if now is None:
        return weight_p.bind(w, names=names)
    for dim, axes in enumerate(dict(now.gathered).get(names, ())):
        if axes:
            w = gather(w, axes, dim, now.reduce)
            w = checkpoint_name(w, KEPT) if set(axes) <= set(now.kept) else w
    return w


def psum(x: jax.Array, *names: str) -> jax.Array:
    """Sums over the shards of dims that were reduced on each shard: `vocab` after `x.sum(-1)`."""
    axes = _axes(*names)
    return jax.lax.psum(x, axes) if axes else x


def pmax(x: jax.Array, *names: str) -> jax.Array:
    """The largest over the shards of dims, as `psum`. It has no gradient."""
    axes = _axes(*names)
    return jax.lax.pmax(x, axes) if axes else x


def shard_offset(name: str, size: int) -> Any:
    """Index in the whole dim of the first of a shard's `size` elements: 0 where it is whole."""
    axes = _axes(name)
    return jax.lax.axis_index(axes) * size if axes else 0


def on_shards() -> bool:
    """Whether a function of shards is being traced."""
    return _active.value is not None


def reshard(x: jax.Array, names: Names, source: Names, into: Names, partial: Names) -> jax.Array:
    """Brings a shard from one layout to another; see `constrain`."""
    now = _active.value
    assert now is not None
    unsummed = now.axes(*partial)
    for dim, (old, new) in enumerate(zip(source, names, strict=True)):
        before, after = now.axes(old), now.axes(new)
        leaving = tuple(axis for axis in before if axis not in after)
        entering = tuple(axis for axis in after if axis not in before)
        if leaving:
            x = jax.lax.all_gather(x, leaving, axis=dim, tiled=True)
        if entering and set(entering) <= set(unsummed):
            x = jax.lax.psum_scatter(x, entering, scatter_dimension=dim, tiled=True)
            unsummed = tuple(axis for axis in unsummed if axis not in entering)
        elif entering:
            x = _part(x, entering, dim)
    if unsummed:
        x = jax.lax.psum(x, unsummed)
    return pvary(x, now.axes(*into))


def varying(x: Any) -> frozenset[str]:
    """Mesh axes along which the shards of a value may differ, by its type."""
    return frozenset(jax.typeof(x).mat.varying)


def pvary(x: jax.Array, axes: Axes) -> jax.Array:
    """Types a value as differing over more axes, so that its gradient is summed over them here."""
    more = tuple(axis for axis in axes if axis not in varying(x))
    return jax.lax.pcast(x, more, to="varying") if more else x


def gather(x: jax.Array, axes: Axes, dim: int, reduce: str | None = None) -> jax.Array:
    """The whole dim from its shards; its gradient is summed in `reduce` and scattered."""
    if reduce is None or reduce == x.dtype:
        return jax.lax.all_gather(x, axes, axis=dim, tiled=True)
    return _gather_reducing(x, axes, dim, reduce)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_reducing(x: jax.Array, axes: Axes, dim: int, reduce: str) -> jax.Array:
    return jax.lax.all_gather(x, axes, axis=dim, tiled=True)


def _gather_bwd(axes: Axes, dim: int, reduce: str, kept: Any, g: jax.Array) -> tuple[jax.Array]:
    wide = g.astype(reduce)
    summed = jax.lax.psum_scatter(wide, axes, scatter_dimension=dim, tiled=True)
    return (summed.astype(g.dtype),)


_gather_reducing.defvjp(
    lambda x, axes, dim, reduce: (_gather_reducing(x, axes, dim, reduce), None), _gather_bwd
)


def _axes(*names: str) -> Axes:
    now = _active.value
    return now.axes(*names) if now else ()


def _part(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    size = x.shape[dim] // jax.lax.axis_size(axes)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * size, size, dim)


def _batch(args: Any, dims: Any, *, names: Names) -> Any:
    return weight_p.bind(args[0], names=names), dims[0]


weight_p.def_impl(lambda w, *, names: w)
weight_p.def_abstract_eval(lambda w, *, names: w)
ad.deflinear2(weight_p, lambda ct, _, *, names: [ct])
batching.primitive_batchers[weight_p] = _batch
mlir.register_lowering(weight_p, lambda ctx, w, *, names: [w])
