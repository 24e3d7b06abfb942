"""Reads layouts and buffer aliases back from an executable, and compares them with the declared."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from .._core.errors import Problem, ShardingError, raise_all
from .._core.tracing import SETTINGS
from .._core.tree import leaves_by_path
from .._core.types import PyTree
from ._layout import StepLayout

_ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{\}")


def declared_tiles(sharding: NamedSharding, ndim: int) -> np.ndarray:
    """Tile that each device holds, in mesh order: i64[devices, ndim].

    `P(("a", "b"), None)` on a mesh a=2, b=2 gives devices 0 … 3 the tiles (0,0) (1,0) (2,0) (3,0).
    """
    sizes = sharding.mesh.shape
    coordinates = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
    at = dict(zip(sizes, coordinates, strict=True))
    tiles = np.zeros((sharding.mesh.size, ndim), np.int64)
    for dim, entry in enumerate(sharding.spec):
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            tiles[:, dim] = tiles[:, dim] * sizes[axis] + at[axis]
    return tiles


def compiled_tiles(op: Any, devices: int, ndim: int) -> np.ndarray:
    """The same as `declared_tiles`, from an executable's `OpSharding`."""
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
    declared: Sequence[tuple[str, jax.ShapeDtypeStruct, NamedSharding]], compiled: Sequence[Any]
) -> list[Problem]:
    """Compares declared shardings with those of an executable, leaf by leaf, both in one order."""
    problems = []
    for (name, aval, sharding), op in zip(declared, compiled, strict=True):
        if 0 in aval.shape:  # an empty array has no tiles to hold
            continue
        want = declared_tiles(sharding, aval.ndim)
        if not np.array_equal(want, compiled_tiles(op, sharding.mesh.size, aval.ndim)):
            actual = " ".join(str(op).split()) or "replicated"
            problems.append(Problem(name, f"declared {sharding.spec}, compiled as {actual}"))
    return problems


def aliased_arguments(hlo_text: str) -> set[int]:
    """Positions of the arguments whose buffers the results reuse."""
    header = hlo_text.partition("\n")[0]
    _, _, after = header.partition("input_output_alias={")
    table = after.partition(" }")[0]
    return {int(argument) for _, argument in _ALIAS.findall(table)}


def check_executable(compiled: jax.stages.Compiled, layout: StepLayout) -> None:
    """Compares an executable `(state, batch) → (state, metrics)` with the declared layout.

    It has every argument kept and the state donated. Raises ShardingError if an argument or result
    is not laid out as declared, or the new state does not reuse the buffer of a state leaf. Under
    `jax_debug_nans` JAX donates nothing, since it runs a step that made a NaN once more.
    """
    executable = compiled.runtime_executable()
    assert executable is not None
    # The runtime numbers arguments as JAX flattens (state, batch), and results the state first.
    arguments = [
        *_declared_leaves(layout.state, layout.shardings, "state"),
        *_declared_leaves(layout.batch, layout.batch_shardings, "batch"),
    ]
    results = [*_declared_leaves(layout.state, layout.shardings, "new state")]
    problems = []
    if arguments[0][2].mesh.size > 1:  # the executable of one device returns no shardings
        problems += layout_problems(arguments, executable.get_parameter_shardings())
        problems += layout_problems(results, executable.get_output_shardings()[: len(results)])
    reused = aliased_arguments(compiled.as_text() or "")
    donated = () if SETTINGS.jax_debug_nans else arguments
    problems += [
        Problem(argument[0], f"is donated, but no result reuses its buffer; {result[0]} should")
        for number, (argument, result) in enumerate(zip(donated, results, strict=False))
        if number not in reused
    ]
    fix = "report this with the declaration: the compiler did not follow its directives"
    raise_all(ShardingError, "The executable is not what was declared.", problems, fix)


def _declared_leaves(
    tree: PyTree, shardings: PyTree, name: str
) -> Iterator[tuple[str, jax.ShapeDtypeStruct, NamedSharding]]:
    """Path, abstract array and declared sharding of every leaf."""
    by_path = leaves_by_path(tree, name).items()
    for (path, aval), sharding in zip(by_path, jax.tree.leaves(shardings), strict=True):
        yield path, aval, sharding
