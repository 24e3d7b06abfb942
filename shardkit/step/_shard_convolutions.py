"""Convolutions that XLA's partitioner gets wrong, each computed on its own device.

`jax.vmap` over gradient shards turns the gradient of a convolution's kernel, whose two operands
both differ by shard, into one grouped convolution, split over its groups. XLA's partitioner for
CPUs and GPUs gets that wrong for kernels of 1 x 1, and for others where a shard has one row
(benchmarks/xla_faults.py). So the traced gradient of one shard is rewritten before `jax.vmap`
sees it: a convolution becomes a primitive that is mapped by `jax.shard_map` over the axes of the
shards instead.

    x [shards, n, h, w, i], dy [shards, n, h, w, o]     over data, dim 0
    vmap         x [n, h, w, shards·i] * dy [n, h, w, shards·o], feature_group_count = shards
    shard_map    x [n, h, w, i]        * dy [n, h, w, o]         on each device

Without gradient shards it gets groups of channels wrong on meshes with an axis that splits no
rows, though every weight is replicated (the kernel's gradient of a depthwise convolution is four
times too large on data=2, tensor=4), and on data=8 in a loop over chunks of rows. Those
convolutions are mapped too, over the rows:

    forward, input gradient    lhs split by its batch dim, the kernel whole
    kernel gradient            a sum over rows, which are the feature dim of both operands:
                               both split by it, then one sum over the axes of the rows

The third fault is in spatial dims. Where an axis splits those of images or of a kernel, on a mesh
with another axis that splits neither, gradients count devices twice (images over data, tensor on
data=2, fsdp=2, tensor=2: twice the gradient of a 3 x 3 kernel), and with strides the forward pass
is wrong too. So every other convolution has its spatial dims whole; XLA chooses for the rest.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend import core, source_info_util
from jax.interpreters import batching, mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._core.equations import user_line
from .._core.errors import Problem, StepError, raise_all
from .._core.rewriting import Changes
from .._core.scope_markers import OF_THE_STEP

_CONVOLUTION = jax.lax.conv_general_dilated_p
_convolution_p = core.Primitive("shardkit_convolution")


def on_shards(mesh: Mesh, axes: tuple[str, ...]) -> Changes:
    """Keeps convolutions of a function on their devices under `jax.vmap` over `axes`.

    These split the dim to map over, into as many parts as there are devices.
    """

    def map_apart(equation: core.JaxprEqn) -> core.JaxprEqn:
        params = {"convolution": _own_params(equation), "mesh": mesh, "axes": axes}
        return equation.replace(primitive=_convolution_p, params=params)

    return {_CONVOLUTION.name: map_apart}


def on_their_devices(mesh: Mesh, axes: tuple[str, ...]) -> Changes:
    """Computes grouped convolutions of global arrays on each device for its rows.

    Mesh axes `axes` split these. Where another axis splits channels, they are gathered before; and
    so are the spatial dims of every convolution. Rewriting raises StepError if a `jax.shard_map`,
    such as that of a pipeline, leaves channels of one to the partitioner; with the line of each.
    """
    if mesh.size == 1:
        return {}
    others = {axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in axes}

    def check(shard_map: core.JaxprEqn) -> core.JaxprEqn:
        headline = "XLA would compute wrong numbers for a grouped convolution."
        fix = "a mesh whose other axes all split rows, such as data"
        found = dict.fromkeys(_left_to_xla(shard_map, frozenset(), others))
        raise_all(StepError, headline, list(found), fix)
        return shard_map

    change = functools.partial(_on_devices, mesh=mesh, axes=axes)
    return {_CONVOLUTION.name: change, "shard_map": check}


def _left_to_xla(eqn: core.JaxprEqn, mapped: frozenset[str], others: Set[str]) -> Iterator[Problem]:
    """Grouped convolutions in an equation, where axes without rows are not mapped."""
    free = sorted(others - mapped)
    if eqn.primitive is _CONVOLUTION and _grouped(eqn.params) and free:
        line, _ = user_line(eqn)
        groups = max(eqn.params[f"{name}_group_count"] for name in ("feature", "batch"))
        why = f"has {groups} groups, in a part of the step that maps {sorted(mapped)} alone"
        over = " and ".join(map(repr, free))
        yield Problem(line or "a convolution", f"{why} and leaves {over} to XLA")
    mapped |= eqn.params.get("newly_manual_axes", frozenset())
    for jaxpr in core.jaxprs_in_params(eqn.params):
        for inner in jaxpr.eqns:
            yield from _left_to_xla(inner, mapped, others)


def _grouped(params: Mapping[str, Any]) -> bool:
    return params["feature_group_count"] > 1 or params["batch_group_count"] > 1


def _own_params(equation: core.JaxprEqn) -> tuple[tuple[str, Any], ...]:
    # The mesh that JAX notes beside a convolution is another one inside of `shard_map`.
    return tuple((k, v) for k, v in equation.params.items() if k != "out_sharding")


def _on_devices(equation: core.JaxprEqn, mesh: Mesh, axes: tuple[str, ...]) -> core.JaxprEqn:
    params = _own_params(equation)
    avals: list[Any] = [x.aval for x in equation.invars]
    lhs, rhs = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals)
    if not _grouped(equation.params):
        whole = functools.partial(_with_whole_windows, convolution=params, mesh=mesh)
        return _call_in_place(equation, whole, lhs, rhs)
    lhs_dims, rhs_dims, out_dims = equation.params["dimension_numbers"]
    # Dims 0 and 1 of these are batch and feature of lhs, output and input features of rhs.
    summed = equation.params["batch_group_count"] > 1
    rows = lhs_dims[1 if summed else 0]
    if lhs.shape[rows] % math.prod(mesh.shape[axis] for axis in axes):
        axes = ()
    split = _at(rows, axes), _at(rhs_dims[1], axes) if summed else PartitionSpec()

    def local(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        out = _convolve(lhs, rhs, params)
        return jax.lax.psum(out, axes) if summed and axes else out

    out = PartitionSpec() if summed else _at(out_dims[0], axes)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=out)
    return _call_in_place(equation, mapped, lhs, rhs)


def _call_in_place(equation: core.JaxprEqn, function: Any, *args: Any) -> core.JaxprEqn:
    named = functools.wraps(function)(lambda *args: function(*args))
    named.__name__ = OF_THE_STEP
    # What is computed in place of an equation has its line too.
    with source_info_util.user_context(equation.source_info.traceback):
        [call] = jax.make_jaxpr(jax.jit(named))(*args).eqns
    return call.replace(
        invars=equation.invars, outvars=equation.outvars, source_info=equation.source_info
    )


def _with_whole_windows(
    lhs: jax.Array, rhs: jax.Array, convolution: tuple[tuple[str, Any], ...], mesh: Any
) -> jax.Array:
    """A convolution whose spatial dims no axis splits; XLA chooses for rows and channels."""
    numbers = dict(convolution)["dimension_numbers"]

    def whole(x: jax.Array, dims: Sequence[int]) -> jax.Array:
        entries: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
        for dim in dims[2:]:
            entries[dim] = None
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*entries)))

    out = _convolve(whole(lhs, numbers.lhs_spec), whole(rhs, numbers.rhs_spec), convolution)
    return whole(out, numbers.out_spec)


def _convolve(lhs: jax.Array, rhs: jax.Array, convolution: tuple[tuple[str, Any], ...]) -> Any:
    return jax.lax.conv_general_dilated(lhs, rhs, **dict(convolution))


def _batch(args: Any, dims: Any, *, convolution: Any, mesh: Mesh, axes: tuple[str, ...]) -> Any:
    manual = jax.sharding.get_abstract_mesh().manual_axes
    grouped = _grouped(dict(convolution))

    def convolve(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        here = jax.sharding.get_abstract_mesh()
        if grouped or manual or {*here.axis_names} == {*here.manual_axes} != set():
            return _convolve(lhs, rhs, convolution)
        return _with_whole_windows(lhs, rhs, convolution, mesh if here.empty else here)

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
