"""What a model says of sharding itself, where no mesh decides: traced for any mesh, or left out.

A constraint by a bare `PartitionSpec` can only be traced with a mesh that has its axes. Where a
model is traced to learn what it computes, on one device or for meshes yet to be chosen, axes that
the mesh lacks are added to it with one device each: a constraint over them says nothing.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType

from .rewriting import rewrite
from .tracing import record_p

CONSTRAINT = "sharding_constraint"

# What JAX and flax say where a constraint or a `shard_map` finds no mesh, or not its axis.
_NO_MESH = re.compile(r"non-empty mesh|mesh cannot be empty|mesh context or metadata is required")
_NO_AXIS = re.compile(
    r"Resource axis: (\w+) of .* is not found in mesh|(?:in|out)_specs refers to '(\w+)'"
)


def on_any_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a function that is traced with the mesh axes that its own constraints name.

    At its first call it runs once more for each axis that the mesh around it lacks.

    >>> spec = jax.sharding.PartitionSpec("data")
    >>> constrained = on_any_mesh(lambda x: jax.lax.with_sharding_constraint(x, spec))
    >>> jax.eval_shape(constrained, jax.ShapeDtypeStruct((4,), "float32")).shape
    (4,)
    """
    added: list[str] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        mesh: Any = jax.sharding.get_abstract_mesh()
        while True:
            try:
                with jax.sharding.use_abstract_mesh(_extend(mesh, added)):
                    return function(*args, **kwargs)
            except (ValueError, RuntimeError) as error:
                unknown = _NO_AXIS.search(str(error))
                name = unknown[1] or unknown[2] if unknown else "(none)"
                if name in added or not (unknown or _NO_MESH.search(str(error))):
                    raise
                added.append(name)

    return run


def _extend(mesh: Any, added: list[str]) -> Any:
    """A mesh with more axes, of one device each."""
    if not added:
        return mesh
    types = (*mesh.axis_types, *[AxisType.Auto] * len(added))
    sizes = (*mesh.axis_sizes, *[1] * len(added))
    return AbstractMesh(sizes, (*mesh.axis_names, *added), axis_types=types)


def without_constraints(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function without its sharding constraints, which change no value.

    Nothing differentiates the result, whose derivative rules keep theirs.
    """
    return rewrite(function, {CONSTRAINT: _remove})


def _remove(eqn: core.JaxprEqn) -> core.JaxprEqn:
    return eqn.replace(primitive=record_p, params={"fact": (CONSTRAINT,)})
