"""`sk.nn.constrain`: logical names of an activation, resolved when a step is lowered.

The names are parameters of a primitive, so a jaxpr holds no mesh. A mesh read while tracing would
stay in the jaxprs that JAX caches by function identity (scan bodies, inner `jit`s), and a second
mesh or strategy would silently get the constraints of the first.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from .._core.errors import StepError, count
from .._core.tracing import TraceContext
from .._core.tree import short_type
from ..rules import axes_of
from ._manual_axis_rules import on_shards, reshard

# Names of the dim that `jax.vmap` adds: over gradient shards by a step, over anything by a user.
GRADIENT_SHARDS = "(gradient shards)"
MAPPED = "(mapped)"

# (names and shape of an activation, mesh axes that are manual around it) -> its sharding.
Resolver = Callable[
    [tuple[str | None, ...], tuple[int, ...], tuple[str, ...]], jax.sharding.NamedSharding | None
]

_resolver = TraceContext[Resolver]("constrain")

constrain_p = core.Primitive("shardkit_constrain")


def constrain(
    x: jax.Array,
    *names: str | None,
    source: tuple[str | None, ...] | None = None,
    into: tuple[str, ...] = (),
    partial: tuple[str, ...] = (),
) -> jax.Array:
    """Names the logical axes of an activation, so that the strategy can lay it out.

    Outside a compiled step, and on one device, this is the identity. Inside a step every call
    becomes a sharding constraint, or the step does not compile: an unknown name or a dim that
    the mesh does not divide is an error, never a silently dropped constraint.

    The keywords are for `mode="shard_map"`, where `x` is one device's shard: they choose the
    collective that brings it to the named layout. Under the partitioner only `source` has an
    effect, and only if a dim that it splits is split further by `names`: without it the
    partitioner gathers that dim first.

    Args:
      x: an array of any shape and dtype.
      *names: one logical axis name per dim, None for a dim that stays whole.
      source: the logical axes of `x` before the call, if they differ from `names`. A dim that is
        split in `source` alone is gathered, one that is split in `names` alone is sliced.
      into: logical axes of the weights that `x` is multiplied with next, as in the input of a
        column-parallel product: its gradient is summed over their shards.
      partial: logical axes that the product which computed `x` contracted, as in the output of a
        row-parallel product: `x` is summed over their shards.

    Returns:
      `x`, unchanged in value.

    Raises:
      StepError: the number of names is not the rank of `x`.

    >>> import jax.numpy as jnp
    >>> constrain(jnp.ones((2, 3)), "batch", "embed").shape
    (2, 3)
    """
    shape = jax.numpy.shape(x)
    if len(names) != len(shape):
        subject = f"constrain({', '.join(map(repr, names))})"
        wanted = short_type(shape, jax.numpy.result_type(x))
        why = f"{count(len(names), 'name')} for {count(len(shape), 'dim')} of {wanted}"
        fix = "name every dim, None for one that stays whole"
        raise StepError.of("sk.nn.constrain does not fit its array.", subject, why, fix)
    if on_shards():
        x = reshard(x, names, source or names, into, partial)
    # JAX's trace caches have the abstract mesh in their keys, so a parameter may depend on it.
    inside = tuple(sorted(jax.sharding.get_abstract_mesh().manual_axes))
    also = tuple(name for name in (*(source or ()), *partial) if name)
    stated = {"inside": inside, "into": tuple(into), "also": also}
    if source not in (None, names):
        x = constrain_p.bind(x, names=source, finer=names, **stated)
    return constrain_p.bind(x, names=names, finer=None, **stated)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def constrain_gradient(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Names the logical axes of the gradient of an activation, and leaves the activation alone.

    If several products of the backward pass use a gradient that has to be gathered, it is gathered
    once. Without the constraint the partitioner gathers it for each product, and does not always
    merge the gathers.
    """
    return x


constrain_gradient.defvjp(lambda x, names: (x, None), lambda names, _, g: (constrain(g, *names),))


def use_resolver(resolver: Resolver) -> contextlib.AbstractContextManager[None]:
    """Makes `resolver` turn names into shardings while a step's module is lowered in the block."""
    return _resolver.use(resolver)


def _lower(
    ctx: mlir.LoweringRuleContext,
    x: Any,
    *,
    names: tuple[str | None, ...],
    finer: tuple[str | None, ...] | None,
    inside: tuple[str, ...],
    **_: Any,
) -> Any:
    aval: Any = ctx.avals_in[0]
    resolver, shape = _resolver.value, aval.shape
    sharding = resolver(names, shape, inside) if resolver else None
    if resolver is None or sharding is None:
        return [x]
    if finer is not None and not _refines(resolver(finer, shape, inside), sharding):
        return [x]
    placed = mlir.lower_fun(
        lambda y: jax.lax.with_sharding_constraint(y, sharding), multiple_results=False
    )
    return placed(ctx, x)


def _refines(finer: jax.sharding.NamedSharding | None, coarser: jax.sharding.NamedSharding) -> bool:
    """Whether `finer` splits a dim further that `coarser` splits already."""
    if finer is None:
        return False
    pairs = zip(finer.spec, coarser.spec, strict=True)
    return any(few and few != more and {*axes_of(few)} <= {*axes_of(more)} for more, few in pairs)


def _batch(
    axis_data: Any,
    args: Any,
    dims: Any,
    *,
    names: tuple[str | None, ...],
    finer: tuple[str | None, ...] | None,
    **stated: Any,
) -> Any:
    (x,), (dim,) = args, dims
    if dim is not None:  # a mapped function also constrains what it does not map, its weights
        added = GRADIENT_SHARDS if axis_data.name == GRADIENT_SHARDS else MAPPED
        names = (*names[:dim], added, *names[dim:])
        finer = finer and (*finer[:dim], added, *finer[dim:])
    return constrain_p.bind(x, names=names, finer=finer, **stated), dim


constrain_p.def_impl(lambda x, **_: x)
constrain_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(constrain_p, lambda ct, _, **stated: [constrain_p.bind(ct, **stated)])
batching.fancy_primitive_batchers[constrain_p] = _batch
mlir.register_lowering(constrain_p, _lower)
