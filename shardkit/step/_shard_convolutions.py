"""Convolutions of gradient shards, each computed on its own device.

`jax.vmap` over gradient shards turns the gradient of a convolution's kernel, whose two operands
both differ by shard, into one grouped convolution, split over its groups. XLA's partitioner for
CPUs and GPUs gets that wrong for kernels of 1 x 1, and for others where a shard has one row
(benchmarks/xla_faults.py). So the traced gradient of one shard is rewritten before `jax.vmap`
sees it: a convolution becomes a primitive that is mapped by `jax.shard_map` over the axes of the
shards instead.

    x [shards, n, h, w, i], dy [shards, n, h, w, o]     over data, dim 0
    vmap         x [n, h, w, shards·i] * dy [n, h, w, shards·o], feature_group_count = shards
    shard_map    x [n, h, w, i]        * dy [n, h, w, o]         on each device
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend import core
from jax.interpreters import batching, mlir
from jax.sharding import Mesh, PartitionSpec

from .._core.tracing import equations
from .._core.types import PyTree

_CONVOLUTION = jax.lax.conv_general_dilated_p
_convolution_p = core.Primitive("shardkit_convolution")


def keep_convolutions_apart(
    run: Callable[..., PyTree], mesh: Mesh, axes: tuple[str, ...]
) -> Callable[..., PyTree]:
    """Makes a function whose convolutions stay on their devices under `jax.vmap` over `axes`.

    Args:
      run: a function of one gradient shard, differentiated already: what it becomes has no
        derivative.
      mesh: the device mesh.
      axes: mesh axes that split the dim to map over, into as many parts as there are devices.
    """

    def rewritten(*args: PyTree) -> PyTree:
        traced, shapes = jax.make_jaxpr(run, return_shape=True)(*args)
        if not any(eqn.primitive is _CONVOLUTION for eqn in equations(traced.jaxpr)):
            return run(*args)
        closed = _exchange(traced, functools.partial(_mapped_apart, mesh=mesh, axes=axes))
        results = core.jaxpr_as_fun(closed)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return rewritten


def _mapped_apart(equation: core.JaxprEqn, mesh: Mesh, axes: tuple[str, ...]) -> core.JaxprEqn:
    if equation.primitive is not _CONVOLUTION:
        return equation
    # The mesh that JAX notes beside a convolution is another one inside of `shard_map`.
    convolution = tuple((k, v) for k, v in equation.params.items() if k != "out_sharding")
    params = {"convolution": convolution, "mesh": mesh, "axes": axes}
    return equation.replace(primitive=_convolution_p, params=params)


def _exchange(x: Any, change: Callable[[core.JaxprEqn], core.JaxprEqn]) -> Any:
    """Changes every equation of a jaxpr and of those in its parameters; leaves the rest."""
    if isinstance(x, core.Jaxpr):  # since jax 0.12 a closed one, too
        return x.replace(eqns=[_exchange(eqn, change) for eqn in x.eqns])
    if isinstance(x, core.ClosedJaxpr):
        return x.replace(jaxpr=_exchange(x.jaxpr, change))
    if isinstance(x, core.JaxprEqn):
        params = {name: _exchange(value, change) for name, value in x.params.items()}
        return change(x.replace(params=params))
    if type(x) in (tuple, list):
        return type(x)(_exchange(item, change) for item in x)
    return x


def _convolve(lhs: jax.Array, rhs: jax.Array, convolution: tuple[tuple[str, Any], ...]) -> Any:
    return jax.lax.conv_general_dilated(lhs, rhs, **dict(convolution))


def _batch(args: Any, dims: Any, *, convolution: Any, mesh: Mesh, axes: tuple[str, ...]) -> Any:
    def convolve(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return _convolve(lhs, rhs, convolution)

    manual = jax.sharding.get_abstract_mesh().manual_axes
    counts = (dict(convolution)[f"{name}_group_count"] for name in ("feature", "batch"))
    grouped = set(counts) != {1}
    if manual or (dims[1] is None and not grouped):
        # One kernel for all shards: their rows are rows of one convolution. Inside of a user's
        # own `shard_map` a device has its shard alone.
        return jax.vmap(convolve, in_axes=dims, spmd_axis_name=axes)(*args), 0
    specs = [PartitionSpec() if dim is None else _at(dim, axes) for dim in dims]

    def local(*shards: jax.Array) -> jax.Array:
        own = [x if d is None else x.squeeze(d) for x, d in zip(shards, dims, strict=True)]
        return convolve(own[0], own[1])[None]

    # The partitioner gets groups of channels wrong that another axis splits, so no axis may.
    manual_axes = {*mesh.axis_names} if grouped else {*axes}
    apart = jax.shard_map(
        local, mesh=mesh, in_specs=tuple(specs), out_specs=_at(0, axes), axis_names=manual_axes
    )
    return apart(*args), 0


def _at(dim: int, axes: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(*[None] * dim, axes)


def _abstract(lhs: Any, rhs: Any, *, convolution: tuple[tuple[str, Any], ...], **_: Any) -> Any:
    shape = jax.eval_shape(functools.partial(_convolve, convolution=convolution), lhs, rhs)
    return ShapedArray(shape.shape, shape.dtype)


_convolution_p.def_abstract_eval(_abstract)
batching.primitive_batchers[_convolution_p] = _batch
mlir.register_lowering(
    _convolution_p,
    mlir.lower_fun(
        lambda lhs, rhs, *, convolution, **_: _convolve(lhs, rhs, convolution),
        multiple_results=False,
    ),
)
