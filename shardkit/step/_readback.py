"""What an executable really does with its arguments: layouts and aliases, read back from it."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from .._core.errors import Problem, ShardingError, raise_all
from .._core.tree import leaves_by_path

_ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{\}")


def declared_tiles(sharding: NamedSharding, ndim: int) -> np.ndarray:
    """Tile that each device holds, in mesh order: i64[devices, ndim]."""
    sizes = sharding.mesh.shape
    coordinates = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
    at = dict(zip(sizes, coordinates, strict=True))
    tiles = np.zeros((sharding.mesh.size, ndim), np.int64)
    for dim, entry in enumerate(sharding.spec):
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            tiles[:, dim] = tiles[:, dim] * sizes[axis] + at[axis]
    return tiles


def compiled_tiles(op: Any, devices: int, ndim: int) -> np.ndarray:
    """The same from an executable's `OpSharding`."""
    dims = list(op.tile_assignment_dimensions)
    if not dims:
        return np.zeros((devices, ndim), np.int64)
    order = list(op.tile_assignment_devices)
    if not order:
        iota = np.arange(devices).reshape(op.iota_reshape_dims)
        order = iota.transpose(op.iota_transpose_perm).reshape(-1)
    tiles = np.zeros((devices, len(dims)), np.int64)
    tiles[np.asarray(order)] = np.indices(dims).reshape(len(dims), -1).T
    return tiles[:, :ndim]


def layout_problems(
    declared: Sequence[tuple[str, Any, NamedSharding]], compiled: Sequence[Any]
) -> list[Problem]:
    """Compares declared shardings with those of an executable, leaf by leaf.

    Args:
      declared: name, abstract array and sharding of each argument or result, in order.
      compiled: the executable's `OpSharding`s in the same order.
    """
    problems = []
    for (name, aval, sharding), op in zip(declared, compiled, strict=True):
        if 0 in aval.shape:  # an empty array has no tiles to hold
            continue
        want = declared_tiles(sharding, aval.ndim)
        if not np.array_equal(want, compiled_tiles(op, sharding.mesh.size, aval.ndim)):
            found = " ".join(str(op).split()) or "replicated"
            problems.append(Problem(name, f"declared {sharding.spec}, compiled as {found}"))
    return problems


def aliased_arguments(hlo_text: str) -> set[int]:
    """Numbers of the arguments whose buffers the results reuse."""
    header = hlo_text.partition("\n")[0]
    _, found, rest = header.partition("input_output_alias={")
    table = rest.partition(" }")[0] if found else ""
    return {int(argument) for _, argument in _ALIAS.findall(table)}


def check_executable(compiled: Any, state: Any, shardings: Any, batch: Any, placed: Any) -> None:
    """Compares an executable `(state, batch) → (state, metrics)` with what was declared.

    Args:
      compiled: the `jax.stages.Compiled`, with every argument kept and the state donated.
      state: abstract state.
      shardings: its declared `NamedSharding`s.
      batch: abstract batch.
      placed: its declared `NamedSharding`s.

    Raises:
      ShardingError: an argument or result is not laid out as declared, or the buffer of a state
        leaf is not reused by the new state.
    """
    inputs, outputs = {"state": state, "batch": batch}, {"new state": state}
    executable = compiled.runtime_executable()
    # The runtime numbers arguments as JAX flattens (state, batch), and results the state first.
    into = [*_declared(inputs, {"state": shardings, "batch": placed}, ("state", "batch"))]
    out = [*_declared(outputs, {"new state": shardings}, ("new state",))]
    problems = []
    if into[0][2].mesh.size > 1:  # one device has no layouts, and its executable tells none
        problems += layout_problems(into, executable.get_parameter_shardings())
        problems += layout_problems(out, executable.get_output_shardings()[: len(out)])
    reused = aliased_arguments(compiled.as_text())
    pairs = [(one[0], other[0]) for one, other in zip(into, out, strict=False)]
    problems += [
        Problem(name, f"is donated, but no result reuses its buffer; {result} should")
        for number, (name, result) in enumerate(pairs)
        if number not in reused
    ]
    fix = "report this with the declaration: the compiler did not do what it was told"
    raise_all(ShardingError, "The executable is not what was declared.", problems, fix)


def _declared(
    trees: dict[str, Any], shardings: dict[str, Any], order: tuple[str, ...]
) -> Iterator[tuple[str, Any, NamedSharding]]:
    """Name, abstract array and declared sharding of every leaf, in the runtime's order."""
    for part in order:
        found = leaves_by_path(trees[part], part).items()
        for (path, aval), sharding in zip(found, jax.tree.leaves(shardings[part]), strict=True):
            yield path, aval, sharding
