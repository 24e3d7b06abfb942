"""Collectives of a user's loss over axes that are bound by nobody.

A loss written for `jax.pmap` reduces over the devices that share the batch, as flax's
`BatchNorm(axis_name="batch")` does. The partitioner's program is that of one device with the whole
batch, so there such an axis has size 1. A misspelt mesh axis is an error.
"""

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import Mesh

from .._core.errors import StepError, did_you_mean, first_line
from .._core.source import find_user_line
from .._core.tracing import record_fact, recorded_facts
from ..nn._manual_axis_rules import on_shards

# For an unknown axis most collectives raise a NameError, the specs of a shard_map a ValueError, and
# reductions an AssertionError without a message.
_UNBOUND = re.compile(r"unbound axis name: (\w+)")
_IN_SPECS = re.compile(r"((?:in|out)_specs) refers to '(\w+)'")


def bind_batch_axes(call: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """Returns a loss of the whole batch in which every axis that it names has size 1.

    The names are in its program, see `batch_axes`; one that resembles an axis of the mesh stays
    unbound. On shards nothing is bound here.
    """
    bound: list[str] = []

    def run(*args: Any) -> Any:
        while not on_shards():
            try:
                return _call_with_axes(call, [n for n in bound if not _is_bound(n)], args)
            except (AssertionError, NameError) as error:
                name = next((name for _, name in _find_axis_uses(error)), None)
                if name is None or name in bound or _is_elsewhere(error, name, mesh):
                    raise
                bound.append(name)
        return call(*args)

    return run


def batch_axes(jaxpr: core.Jaxpr) -> tuple[str, ...]:
    """Returns the names that stand for all rows of the batch in a loss, which are no mesh axes."""
    return tuple(str(name) for (name,) in recorded_facts(jaxpr, _BATCH_AXIS))


_BATCH_AXIS = "batch axis"


def _call_with_axes(call: Callable[..., Any], names: list[str], args: tuple[Any, ...]) -> Any:
    if not names:
        return call(*args)
    first, *others = names
    # Nothing that the loss takes is mapped, so no array gets a dim.
    mapped = jax.vmap(lambda _: _call_with_axes(call, others, args), axis_name=first, axis_size=1)
    results = jax.tree.map(lambda x: x[0], mapped(jnp.zeros(1)))
    return record_fact(results, _BATCH_AXIS, first)


def _is_bound(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def _is_elsewhere(error: Exception, name: str, mesh: Mesh | None) -> bool:
    """Whether an axis is misspelt, or is named inside of a `shard_map`, on parts of the batch."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = {frame.f_globals["__name__"] for frame in frames}
    on_parts = any(module.startswith("jax.") and "shard_map" in module for module in modules)
    axes = mesh.axis_names if mesh else ()
    return on_parts or (name not in axes and bool(did_you_mean(name, axes)))


@contextlib.contextmanager
def explain_unbound_axes(mesh: Mesh | None) -> Iterator[None]:
    """Turns JAX's errors about mesh axes, while a loss is traced, into a `StepError`.

    An unknown axis is that of a collective, or in a spec of a `shard_map`. A collective of a known
    one may need another size than it has where all rows are together, or where rows are followed.
    """
    try:
        yield
    except (AssertionError, NameError, NotImplementedError, ValueError) as error:
        if mesh is not None:
            for call, name in _find_axis_uses(error):
                if name not in mesh.axis_names:
                    raise _unbound_error(call, name, mesh) from error
            frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
            for frame in frames:
                if frame.f_globals["__name__"].endswith("lax.parallel"):
                    for name in _axis_names_of(frame):
                        raise _unfit_error(frame, name, error) from error
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


def _unfit_error(frame: FrameType, name: str, error: Exception) -> StepError:
    why = f"raises {type(error).__name__}: {first_line(error)}"
    fix = "jax.lax.stop_gradient of what it takes, not of what it gives"
    if not isinstance(error, NotImplementedError):  # of a derivative
        why += f"; the loss is traced with other sizes of {name!r} too, and 1 for all rows together"
        fix = "jax.lax.psum or pmean, which take any size; or sk.ShardMapLoss(local, reference), "
        fix += "whose local loss alone names mesh axes"
    lines = [*traceback.walk_tb(error.__traceback__)]
    where = find_user_line((frame.f_code.co_filename, line) for frame, line in reversed(lines))
    subject = f"{frame.f_code.co_name}(..., {name!r})" + (f" at {where}" if where else "")
    return StepError.of("A collective of the loss cannot be traced.", subject, why, fix)


def _unbound_error(call: str, name: str, mesh: Mesh) -> StepError:
    known = ", ".join(f"{a}={n}" for a, n in mesh.shape.items())
    why = f"the mesh has {known}.{did_you_mean(name, mesh.axis_names)}"
    fix = f"one of {', '.join(map(repr, mesh.axis_names))}"
    return StepError.of("The loss names a mesh axis that does not exist.", call, why, fix)
