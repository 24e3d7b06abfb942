"""Mesh axes that a user's own collectives are asked for, told by name where there is none."""

import contextlib
import re
import traceback
from collections.abc import Iterator
from types import FrameType

from jax.sharding import Mesh

from .._core.errors import Problem, StepError, did_you_mean, format_problems

# An unknown axis is a NameError of most collectives, a ValueError of the specs of a shard_map,
# and an AssertionError without a word of the reductions.
_UNBOUND = re.compile(r"unbound axis name: (\w+)")
_IN_SPECS = re.compile(r"((?:in|out)_specs) refers to '(\w+)'")


@contextlib.contextmanager
def explain_unbound_axes(mesh: Mesh | None) -> Iterator[None]:
    """Says which mesh axis of a loss's own collectives does not exist, while it is traced.

    Raises:
      StepError: a collective, or a spec of a `shard_map`, names an axis that is not in the mesh.
    """
    try:
        yield
    except (AssertionError, NameError, ValueError) as error:
        for call, name in _find_axis_uses(error) if mesh is not None else ():
            if name not in mesh.axis_names:
                raise StepError(_format_unbound(call, name, mesh)) from error
        raise


def _find_axis_uses(error: Exception) -> Iterator[tuple[str, str]]:
    """Calls in the words of their author, with the axes that they name."""
    if found := _IN_SPECS.search(str(error)):
        yield f"shard_map({found[1]}=... {found[2]!r} ...)", found[2]
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    unbound = _UNBOUND.search(str(error))
    # Without a word, and not of the loss itself.
    silent = not str(error) and frames[-1].f_globals["__name__"].startswith("jax.")
    if unbound or (silent and isinstance(error, AssertionError)):
        named = [(frame.f_code.co_name, name) for frame in frames for name in _axis_names_of(frame)]
        name = unbound[1] if unbound else next((name for _, name in reversed(named)), "")
        # What the loss called is the outermost of JAX's functions that were handed the name.
        yield from ((f"{call}(..., {name!r})", name) for call, one in named if one == name)


def _axis_names_of(frame: FrameType) -> list[str]:
    asked = frame.f_locals.get("axis_name")
    every = asked if isinstance(asked, tuple | list) else (asked,)
    return [name for name in every if isinstance(name, str)]


def _format_unbound(call: str, name: str, mesh: Mesh) -> str:
    known = ", ".join(f"{a}={n}" for a, n in mesh.shape.items())
    problem = Problem(call, f"the mesh has {known}.{did_you_mean(name, mesh.axis_names)}")
    fix = f"one of {', '.join(map(repr, mesh.axis_names))}"
    return format_problems("The loss names a mesh axis that is not there.", [problem], fix)
