"""`sk.nn.constrain`: logical names on an activation, resolved when a step is lowered.

The names travel as parameters of a primitive, so no jaxpr ever holds a mesh. A context read
while tracing would be baked into jaxprs that JAX caches by function identity (scan bodies,
inner `jit`s), and the second mesh or strategy would silently get the first one's constraints.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from .._core.errors import Problem, StepError, count, format_problems
from .._core.tracing import TraceContext
from .._core.tree import short_type
from ._manual_axis_rules import on_shards, reshard

# The dim that `jax.vmap` adds when a step maps over lanes, or a user over anything else.
LANES = "(lanes)"
MAPPED = "(mapped)"

# Names and shape of what is constrained, and the mesh axes that are manual where it stands.
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
    """States the logical axes of an activation, so that a strategy can lay it out.

    Outside a compiled step, and on one device, this is the identity. Inside a step every call
    becomes a sharding constraint, or the step does not compile: an unknown name or a dim that
    the mesh does not divide is an error, never a silently dropped constraint.

    The keywords matter in `mode="shard_map"`, where `x` is one device's shard and the partitioner
    cannot see what it is a shard of: they say what brings it to the named layout. Otherwise
    `source` alone does, and only where a dim that it splits is to be split finer: the partitioner
    gathers that dim first if it is not told that `x` has it split already.

    Args:
      x: an array of any shape and dtype.
      *names: one logical axis name per dim, None for a dim that stays whole.
      source: the logical axes that `x` has so far, where some differ from `names`. A dim that
        was split and is not any more is gathered, one that was not is cut.
      into: logical axes of the weights that `x` is multiplied with next, as in the input of a
        column-split product: its gradient is summed over their shards.
      partial: logical axes that the product which made `x` contracted, as in the output of a
        row-split product: `x` is summed over their shards.

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
        raise StepError(format_problems("A constraint does not fit.", [Problem(subject, why)], fix))
    if on_shards():
        x = reshard(x, names, source or names, into, partial)
    # Part of the context by which JAX keeps traces, so no trace is used where it does not hold.
    inside = tuple(sorted(jax.sharding.get_abstract_mesh().manual_axes))
    also = tuple(name for name in (*(source or ()), *partial) if name)
    stated = {"inside": inside, "into": tuple(into), "also": also}
    if source not in (None, names):
        x = constrain_p.bind(x, names=source, finer=names, **stated)
    return constrain_p.bind(x, names=names, finer=None, **stated)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def constrain_gradient(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """States the logical axes of the gradient that arrives at an activation, and not its own.

    Where several products of the backward pass use a gradient that has to be gathered, it is then
    gathered once. Left alone the partitioner gathers it for each, and not always merges the two.

    Args:
      x: an array of any shape and dtype.
      names: as those of `constrain`.
    """
    return x


def _keep(x: jax.Array, names: tuple[str | None, ...]) -> tuple[jax.Array, None]:
    return x, None


def _constrain_arrived(names: tuple[str | None, ...], _: None, g: jax.Array) -> tuple[jax.Array]:
    return (constrain(g, *names),)


constrain_gradient.defvjp(_keep, _constrain_arrived)


def resolving(resolver: Resolver) -> contextlib.AbstractContextManager[None]:
    """Makes `resolver` turn names into shardings while a step's module is lowered."""
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
    resolver, shape = _resolver.value, ctx.avals_in[0].shape
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
    """Whether one sharding splits a dim more that the other splits already."""
    if finer is None:
        return False
    pairs = zip(finer.spec, coarser.spec, strict=True)
    return any(few and few != more and set(_axes(few)) <= set(_axes(more)) for more, few in pairs)


def _axes(dim: Any) -> tuple[str, ...]:
    return (dim,) if isinstance(dim, str) else dim or ()


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
        added = LANES if axis_data.name == LANES else MAPPED
        names = (*names[:dim], added, *names[dim:])
        finer = finer and (*finer[:dim], added, *finer[dim:])
    return constrain_p.bind(x, names=names, finer=finer, **stated), dim


constrain_p.def_impl(lambda x, **_: x)
constrain_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(constrain_p, lambda ct, _, **stated: [constrain_p.bind(ct, **stated)])
batching.fancy_primitive_batchers[constrain_p] = _batch
mlir.register_lowering(constrain_p, _lower)
