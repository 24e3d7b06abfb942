"""JAX's errors about a model's own sharding, while it is traced, in terms of the step."""

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator

from jax.sharding import Mesh

from .._core.errors import Problem, ShardingError, ShardkitError, did_you_mean, format_problems
from .._core.source import find_user_line
from ..rules import format_mesh

_AUTO = "jax.lax.with_sharding_constraint(x, P(...)): the axes of a step are of type Auto"
_MANUAL = "sk.nn.constrain(x, ...), which leaves such axes out; or no constraint there"
_SPLIT = 'accumulate=sk.Accumulate(k, "every"), whose micro-batches are not split by device'
_ONCE = "each mesh axis once in a spec; under accumulate, a jit inside the model without shardings"
_WHOLE_JIT = "a jit inside the model without in_shardings and out_shardings"
_LOGICAL = "nn.with_logical_partitioning(init, names), if the names are not those of mesh axes"
_AGAIN = " (of "  # in the name of an axis that an earlier logical name has taken


@contextlib.contextmanager
def explain_refused_constraints(mesh: Mesh) -> Iterator[None]:
    """Turns JAX's errors about a constraint or a `shard_map` of the model into a `ShardingError`.

    It has the line of the user's code, what JAX says, and what to write instead.
    """
    try:
        yield
    except ShardkitError:
        raise
    except Exception as error:  # JAX raises several kinds
        problem = _explain(error, mesh)
        if problem is None:
            raise
        headline = f"The model's own sharding cannot be met on mesh {format_mesh(mesh.shape)}."
        raise ShardingError(format_problems(headline, [problem])) from error


def _explain(error: Exception, mesh: Mesh) -> Problem | None:
    """Why JAX refuses, where, and a fix; None for any other error."""
    for pattern, explain in _REFUSALS:
        if match := re.search(pattern, str(error), re.DOTALL):
            why, fix = explain(match, mesh)
            frames = list(traceback.walk_tb(error.__traceback__))
            place = find_user_line((f.f_code.co_filename, line) for f, line in reversed(frames))
            if any(frame.f_code.co_name == "unbox" for frame, _ in frames):
                fix = f"{_LOGICAL}; {fix}"
            return Problem(f"sharding{f' at {place}' if place else ''}", why, fix)
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


def _says(fix: str, why: str = "{0}") -> Callable[[re.Match[str], Mesh], tuple[str, str]]:
    """Explains by what JAX says, or by a text with the groups of what it says."""
    return lambda match, mesh: (
        why.format(match[0].strip(), *match.groups()).replace(",)", ")"),
        fix,
    )


_MANUAL_AXES = (
    "{1} names axes that are manual there, in a shard_map of the model or of the strategy: an "
    "array is one device's shard along them"
)
_EXPLICIT_AXES = "{1} is on a mesh of Explicit axes, which a step takes as Auto"

_REFUSALS: tuple[tuple[str, Callable[[re.Match[str], Mesh], tuple[str, str]]], ...] = (
    (r"Resource axis: (.+?) of (P\w*\(.+\)) is not found in mesh", _unknown_axis),
    (r"P\S*\([^\n]*\) has duplicate entries for `\w+`", _says(_ONCE)),
    (
        r"spec=(P\w*\([^\n]*?\))\)?: Sharding [^\n]* is only valid for values of (rank[^\n]*)",
        _says("at most one entry per dim", "{1} is only valid for values of {2}"),
    ),
    (r"Got spec=(P\w*\([^\n]*?\)) and mesh=[^\n]*Manual", _says(_MANUAL, _MANUAL_AXES)),
    (
        r"Axes mentioned in `manual_axis_type` field [^\n]* with axis: (\w+)",
        _says(
            "jax.device_put(x) without a sharding",
            "a sharding of jax.device_put names {1!r}, which is manual there: an array is one "
            "device's shard along it",
        ),
    ),
    (r"pspec (P\w*\([^\n]*?\)) contains a manual axes", _says(_WHOLE_JIT, _MANUAL_AXES)),
    (r"Got spec=(P\w*\([^\n]*?\)) and mesh=[^\n]*Explicit", _says(_AUTO, _EXPLICIT_AXES)),
    (
        r"(PartitionSpec passed to \w+) cannot contain axis names that are of type Auto or Manual",
        _says(_AUTO),
    ),
    (
        r"The context mesh .* should match the mesh passed to shard_map (.*)",
        _says(
            "jax.shard_map(...) without mesh=, which takes that of the step",
            "shard_map is given another mesh than that of the step, whose axes are Auto: {1}",
        ),
    ),
    (
        r"shard_map applied to .* not evenly divisible by .*?(the passed [^\n]*?)(?:\.|\n)",
        _says("sizes that divide", "{1}"),
    ),
    (
        r"spec=(P\w*\([^\n]*?\))[^\n]* implies that (array axis \d+ is .*?dimension size is \d+)",
        _says("sizes that divide, or no in_shardings and out_shardings there", "{1}: {2}"),
    ),
    (
        r"Received incompatible devices for jitted computation\. ([^\n]*)",
        _says("P(...) in place of a NamedSharding, which means the mesh of the step", "{1}"),
    ),
    (r"vmap spmd_axis_name[^\n]* cannot appear in[^\n]*", _says(_SPLIT)),
    (
        r"Dimensions \([^)]*\) occur more than once in array names",
        _says("a logical axis once in a constraint, None for the other dim"),
    ),
)


def taken_axis(axis: str, name: str) -> str:
    """The axis of a logical name whose own mesh axis splits another dim: JAX knows none such."""
    return f"{axis}{_AGAIN}{name!r})"
