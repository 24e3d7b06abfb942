"""Names the mesh axis of a user's own collective if the mesh does not have it."""

import contextlib
import re
import traceback
from collections.abc import Iterator
from types import FrameType

from jax.sharding import Mesh

from .._core.errors import Problem, StepError, did_you_mean, format_problems

# For an unknown axis most collectives raise a NameError, the specs of a shard_map a ValueError, and
# reductions an AssertionError without a message.
_UNBOUND = re.compile(r"unbound axis name: (\w+)")
_IN_SPECS = re.compile(r"((?:in|out)_specs) refers to '(\w+)'")


@contextlib.contextmanager
def explain_unbound_axes(mesh: Mesh | None) -> Iterator[None]:
    """Turns JAX's errors about an unknown mesh axis, while a loss is traced, into a `StepError`.

    Raises:
      StepError: a collective, or a spec of a `shard_map`, names an axis that is not in the mesh.
    """
    try:
        yield
    except (AssertionError, NameError, ValueError) as error:
        if mesh is not None:
            for call, name in _find_axis_uses(error):
                if name not in mesh.axis_names:
                    raise StepError(_format_unbound(call, name, mesh)) from error
        raise


def _find_axis_uses(error: Exception) -> Iterator[tuple[str, str]]:
    """The calls of the traceback that name an axis: `("psum(..., 'x')", "x")`."""
    if spec := _IN_SPECS.search(str(error)):
        yield f"shard_map({spec[1]}=... {spec[2]!r} ...)", spec[2]
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    unbound = _UNBOUND.search(str(error))
    # No message, and raised inside JAX, not by an `assert` of the loss.
    silent = not str(error) and frames[-1].f_globals["__name__"].startswith("jax.")
    if unbound or (silent and isinstance(error, AssertionError)):
        named = [(frame.f_code.co_name, name) for frame in frames for name in _axis_names_of(frame)]
        name = unbound[1] if unbound else next((name for _, name in reversed(named)), "")
        # The outermost frame with this axis name is the function that the loss called.
        yield from ((f"{call}(..., {name!r})", name) for call, used in named if used == name)


def _axis_names_of(frame: FrameType) -> list[str]:
    value = frame.f_locals.get("axis_name")
    names = value if isinstance(value, tuple | list) else (value,)
    return [name for name in names if isinstance(name, str)]


def _format_unbound(call: str, name: str, mesh: Mesh) -> str:
    known = ", ".join(f"{a}={n}" for a, n in mesh.shape.items())
    problem = Problem(call, f"the mesh has {known}.{did_you_mean(name, mesh.axis_names)}")
    fix = f"one of {', '.join(map(repr, mesh.axis_names))}"
    return format_problems("The loss names a mesh axis that does not exist.", [problem], fix)
