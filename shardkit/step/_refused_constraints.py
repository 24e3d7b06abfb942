"""JAX's errors about a model's own sharding, while it is traced, in terms of the step."""

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator

from jax.sharding import Mesh

from .._core.equations import find_user_line
from .._core.errors import Problem, ShardingError, ShardkitError, did_you_mean, format_problems
from ..rules import format_mesh

# The functions of JAX that take a model's shardings, and the code to write instead.
_CALLS = ("with_sharding_constraint", "reshard", "shard_map")

_AUTO = "jax.lax.with_sharding_constraint(x, P(...)): the axes of a step are of type Auto"
_MANUAL = "leave it out inside of a shard_map, where an array is one device's shard"
_SPLIT = 'accumulate=sk.Accumulate(k, "every"), whose micro-batches are not split by device'
_AGAIN = " (of "  # in the name of an axis that an earlier logical name has taken


@contextlib.contextmanager
def explain_refused_constraints(mesh: Mesh) -> Iterator[None]:
    """Turns JAX's errors about a constraint or a `shard_map` of the model into a `ShardingError`.

    Raises:
      ShardingError: with the line of the user's code, what JAX says, and what to write instead.
    """
    try:
        yield
    except ShardkitError:
        raise
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        found = _explain(str(error), mesh)
        if found is None:
            raise
        why, fix = found
        frames = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
        names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
        call = next((name for name in _CALLS if name in names), "sharding")
        place = find_user_line(reversed(frames))
        problem = Problem(f"{call}{f' at {place}' if place else ''}", why, fix)
        headline = f"The model's own sharding cannot be met on mesh {format_mesh(mesh.shape)}."
        raise ShardingError(format_problems(headline, [problem])) from error


def _explain(said: str, mesh: Mesh) -> tuple[str, str] | None:
    """Why JAX refuses, and a fix; None for any other error."""
    for pattern, explain in _REFUSALS:
        if match := re.search(pattern, said, re.DOTALL):
            return explain(match, mesh)
    return None


def _unknown_axis(match: re.Match[str], mesh: Mesh) -> tuple[str, str]:
    axis, spec = match[1], match[2]
    if _AGAIN in axis:
        axis, name = axis.removesuffix(")").split(_AGAIN)
        why = f"logical axis {name} is split over {axis!r}, which splits another dim already"
        return why, f"strategy.with_names(activations={{{name}: None}})"
    known = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    why = f"{spec} uses axis {axis!r}; mesh has {known}.{did_you_mean(axis, mesh.axis_names)}"
    return why, f"one of {', '.join(map(repr, mesh.axis_names))}; or a mesh with axis {axis!r}"


def _says(fix: str) -> Callable[[re.Match[str], Mesh], tuple[str, str]]:
    return lambda match, mesh: (match[0].strip(), fix)


_REFUSALS: tuple[tuple[str, Callable[[re.Match[str], Mesh], tuple[str, str]]], ...] = (
    (r"Resource axis: (.+?) of (P\w*\(.+\)) is not found in mesh", _unknown_axis),
    (r"P\S*\([^\n]*\) has duplicate entries for `\w+`", _says("each mesh axis once in a spec")),
    (r"is only valid for values of rank at least[^\n]*", _says("at most one entry per dim")),
    (r"Got spec=[^\n]*Manual[^\n]*?\)\)?", _says(_MANUAL)),
    (r"can only refer to Auto axes of the mesh", _says(_AUTO)),
    (r"cannot contain axis names that are of type Auto or Manual", _says(_AUTO)),
    (
        r"The context mesh .* should match the mesh passed to shard_map[^\n]*",
        _says("jax.shard_map(...) without mesh=, which takes that of the step"),
    ),
    (r"vmap spmd_axis_name[^\n]* cannot appear in[^\n]*", _says(_SPLIT)),
    (
        r"Dimensions \([^)]*\) occur more than once in array names",
        _says("a logical axis once in a constraint, None for the other dim"),
    ),
    (r"requires a non-empty mesh[^\n]*", _says("a mesh that is known where this is traced")),
)


def taken_axis(axis: str, name: str) -> str:
    """The axis of a logical name whose own mesh axis splits another dim: JAX knows none such."""
    return f"{axis}{_AGAIN}{name!r})"
