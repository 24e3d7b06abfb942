"""A model's own sharding constraints: checked, and moved to gradient shards.

They stay what JAX made of them, equations `sharding_constraint`, wherever the loss sees whole
rows. A gradient shard is mapped by `jax.vmap`, along mesh axes that a constraint may name as well:

    rows of the batch   f32[32, 16]     P("data", "tensor")
    gradient shards     f32[2, 16, 16]  P("data", None, "tensor")

JAX refuses such a constraint under `vmap`, so it is replaced in the traced gradient, after
derivative rules of the user's own have been applied.
"""

from collections.abc import Iterator
from typing import Any, cast

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import batching, mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._core.equations import source_of_equation
from .._core.errors import Problem
from .._core.own_sharding import CONSTRAINT
from .._core.rewriting import Changes
from .._core.tracing import equations, record_fact
from .._core.tree import Leaf
from ..rules import axes_of, check_spec, format_spec

# What `record_fact` tells of a constraint whose axes split nothing in a gradient shard.
DROPPED = "dropped from a constraint"

shard_constraint_p = core.Primitive("shardkit_shard_constraint")


def own_constraints(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Every `with_sharding_constraint` of a jaxpr and its inner jaxprs."""
    return (eqn for eqn in equations(jaxpr) if eqn.primitive.name == CONSTRAINT)


def constraint_problems(jaxpr: core.Jaxpr, mesh: Mesh) -> Iterator[Problem]:
    """What JAX would accept and do otherwise: another mesh, or a dim that does not divide."""
    for eqn in own_constraints(jaxpr):
        sharding, aval = eqn.params["sharding"], cast(Any, eqn.invars[0].aval)
        leaf = Leaf(describe_constraint(eqn)[0], tuple(aval.shape), aval.dtype)
        if not isinstance(sharding, NamedSharding):
            why = f"is constrained to a {type(sharding).__name__}, which names no mesh axes"
            yield Problem(str(leaf), why, "jax.lax.with_sharding_constraint(x, P(...))")
        elif isinstance(sharding.mesh, Mesh) and not _same_devices(sharding.mesh, mesh):
            sizes = ", ".join(f"{axis}={n}" for axis, n in sharding.mesh.shape.items())
            ids = ", ".join(str(device.id) for device in sharding.mesh.devices.flat)
            why = f"is constrained on another mesh ({sizes}) of devices {ids}"
            fix = f"jax.lax.with_sharding_constraint(x, {format_spec(sharding.spec)})"
            yield Problem(str(leaf), why, f"{fix}, which means the mesh of the step")
        else:
            entries = (None if e is PartitionSpec.UNCONSTRAINED else e for e in sharding.spec)
            yield from check_spec(leaf, PartitionSpec(*entries), mesh.shape, "the constraint")


def describe_constraint(eqn: core.JaxprEqn) -> tuple[str, str]:
    """`("with_sharding_constraint at model.py:12", "P('data')")`."""
    source, sharding = source_of_equation(eqn), eqn.params["sharding"]
    place = f" at {source.file}:{source.line}" if source else ""
    spec = format_spec(sharding.spec) if isinstance(sharding, NamedSharding) else str(sharding)
    return f"with_sharding_constraint{place}", spec


def move_to_shards(shard_axes: tuple[str, ...]) -> Changes:
    """Moves the constraints of a function that is mapped over gradient shards."""

    def move(eqn: core.JaxprEqn) -> core.JaxprEqn:
        sharding = eqn.params["sharding"]
        if not isinstance(sharding, NamedSharding) or eqn.params["layout"] is not None:
            return eqn  # JAX refuses it if its axes are those of the shards
        place, _ = describe_constraint(eqn)
        params = {"sharding": sharding, "shard_axes": shard_axes, "place": place}
        return eqn.replace(primitive=shard_constraint_p, params=params)

    return {CONSTRAINT: move}


def _batch(
    args: Any, dims: Any, *, sharding: NamedSharding, shard_axes: tuple[str, ...], place: str
) -> Any:
    (x,), (dim,) = args, dims
    if not {*shard_axes} <= {*sharding.mesh.axis_names}:
        # Another mesh than that of the step, which `constraint_problems` will refuse.
        return jax.lax.with_sharding_constraint(x, sharding), dim
    entries = [*sharding.spec, *[None] * (x.ndim - 1 - len(sharding.spec))]
    kept = [_without(entry, shard_axes) for entry in entries]
    # Axes of dim 0 split the rows, as gradient shards do; those of any other dim split no more.
    dropped = {axis for e in entries[1:] for axis in _axes(e) if axis in shard_axes}
    kept.insert(dim, shard_axes)
    spec = PartitionSpec(*kept)
    x = jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, spec))
    if dropped:
        x = record_fact(x, DROPPED, place, format_spec(sharding.spec), *sorted(dropped))
    return x, dim


def _same_devices(own: Mesh, mesh: Mesh) -> bool:
    return own.axis_names == mesh.axis_names and np.array_equal(own.devices, mesh.devices)


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is PartitionSpec.UNCONSTRAINED else axes_of(entry)


def _without(entry: Any, axes: tuple[str, ...]) -> Any:
    if entry is PartitionSpec.UNCONSTRAINED:
        return entry
    return tuple(axis for axis in axes_of(entry) if axis not in axes) or None


shard_constraint_p.def_impl(lambda x, **_: x)
shard_constraint_p.def_abstract_eval(lambda x, **_: x)
batching.primitive_batchers[shard_constraint_p] = _batch
mlir.register_lowering(  # of an array that is the same for all gradient shards, such as a weight
    shard_constraint_p,
    mlir.lower_fun(
        lambda x, sharding, **_: jax.lax.with_sharding_constraint(x, sharding),
        multiple_results=False,
    ),
)
