"""Which rows of a batch a process reads, and how they reach its devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._core.errors import DataError, Problem, format_problems
from ..rules import axes_of, format_mesh, shard_count


def process_of_device(device: Any) -> int:
    """The process that a device belongs to, as JAX knows it."""
    return device.process_index


def process_rows(
    mesh: Mesh,
    spec: PartitionSpec,
    rows: int,
    process_index: int | None = None,
    process_of: Callable[[Any], int] = process_of_device,
) -> np.ndarray:
    """Lists the rows of a global batch that the devices of one process hold.

    Only dim 0 of the spec counts: processes that share rows, because other axes or none split
    what lies between them, each read all of these. What is not listed is never read here.

    Args:
      mesh: the devices, those of other processes too.
      spec: of the batch; `step.batch_shardings` has one per leaf.
      rows: of the batch, over all devices.
      process_index: whose rows; this process by default.
      process_of: which process a device belongs to. A test asks for any number of processes.

    Returns:
      i64[n], global row numbers in rising order.

    Raises:
      DataError: the rows do not split over the axes of dim 0, or the process has no device here.

    >>> import jax, shardkit as sk
    >>> mesh = sk.MeshSpec(data=4, tensor=2).build()
    >>> process_rows(mesh, jax.P("data"), 8, 1, lambda device: device.id // 4)
    array([4, 5, 6, 7])
    >>> process_rows(mesh, jax.P(None, "data"), 4, 1, lambda device: device.id // 4)
    array([0, 1, 2, 3])
    """
    own = jax.process_index() if process_index is None else process_index
    first = spec[0] if len(spec) else None
    parts = shard_count(axes_of(first), mesh.shape)
    if rows % parts:
        why = f"do not split {parts} ways, over {axes_of(first)} of mesh {format_mesh(mesh.shape)}"
        fix = f"batch={max(1, round(rows / parts)) * parts}"
        problem = Problem(f"batch of {rows} rows", why, fix)
        raise DataError(format_problems("The rows cannot be given to processes.", [problem]))
    held = np.zeros(rows, bool)
    where = NamedSharding(mesh, PartitionSpec(first)).devices_indices_map((rows,))
    for device, (index,) in where.items():
        if process_of(device) == own:
            held[index] = True
    if not held.any():
        there = sorted({process_of(device) for device in mesh.devices.flat})
        why = f"has no device in mesh {format_mesh(mesh.shape)}; processes {there} have"
        problem = Problem(f"process {own}", why, "MeshSpec(...).build() over all devices")
        raise DataError(format_problems("The rows cannot be given to processes.", [problem]))
    return np.flatnonzero(held)


def rows_of_shardings(shardings: Any, rows: int) -> np.ndarray:
    """The rows that this process needs of a batch whose leaves are laid out in several ways."""
    needed = [process_rows(s.mesh, s.spec, rows) for s in jax.tree.leaves(shardings)]
    return np.unique(np.concatenate(needed))


def place_rows(part: Any, held: np.ndarray, rows: int, shardings: Any) -> Any:
    """Puts the rows that this process holds on its devices.

    Args:
      part: pytree of host arrays [len(held), ...].
      held: i64[n], which rows of the global batch these are, rising; all that its devices need.
      rows: of the global batch.
      shardings: the same pytree of `NamedSharding`.

    Returns:
      Global arrays [rows, ...]; nothing is sent between processes.
    """
    return jax.tree.map(lambda x, s: _place(np.asarray(x), held, rows, s), part, shardings)


def _place(x: np.ndarray, held: np.ndarray, rows: int, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable and len(held) == rows:
        return jax.device_put(x, sharding)
    x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)
    cut: Any = functools.partial(cut_shard, x, held, rows)
    return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, cut)


def cut_shard(x: np.ndarray, held: np.ndarray, rows: int, index: tuple[slice, ...]) -> np.ndarray:
    """Cuts what one device holds, by its global index, out of the rows that a process holds."""
    start, stop, _ = index[0].indices(rows)
    first = int(np.searchsorted(held, start))
    return x[first : first + stop - start][(slice(None), *index[1:])]
