"""Finds the rows of a batch that a process reads, and puts them on its devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._core.errors import DataError, Problem, format_problems
from .._core.types import Batch, PyTree
from ..rules import axes_of, format_mesh, shard_count


def device_process(device: Any) -> int:
    """Index of the process that a device belongs to."""
    return device.process_index


def process_rows(
    mesh: Mesh,
    spec: PartitionSpec,
    rows: int,
    process_index: int | None = None,
    process_of: Callable[[Any], int] = device_process,
) -> np.ndarray:
    """Lists the rows of a global batch that the devices of one process hold.

    Only dim 0 of the spec matters: processes that differ along other mesh axes hold the same rows,
    and each of them reads all of these.

    Args:
      mesh: the devices of all processes.
      spec: of the batch; `step.batch_shardings` has one per leaf.
      rows: rows of the batch, over all devices.
      process_index: by default this process.
      process_of: returns the process that a device belongs to; tests simulate processes with it.

    Returns:
      i64[n], global row numbers in ascending order.

    Raises:
      DataError: the rows do not divide over the axes of dim 0, or the process has no device in
        the mesh.

    >>> import jax, shardkit as sk
    >>> mesh = sk.MeshSpec(data=4, tensor=2).build()
    >>> process_rows(mesh, jax.P("data"), 8, 1, lambda device: device.id // 4)
    array([4, 5, 6, 7])
    >>> process_rows(mesh, jax.P(None, "data"), 4, 1, lambda device: device.id // 4)
    array([0, 1, 2, 3])
    """
    process = jax.process_index() if process_index is None else process_index
    axes = spec[0] if len(spec) else None
    shards = shard_count(axes_of(axes), mesh.shape)
    if rows % shards:
        why = f"do not split {shards} ways, over {axes_of(axes)} of mesh {format_mesh(mesh.shape)}"
        fix = f"batch={max(1, round(rows / shards)) * shards}"
        problem = Problem(f"batch of {rows} rows", why, fix)
        raise DataError(format_problems(_HEADLINE, [problem]))
    local = np.zeros(rows, bool)
    indices = NamedSharding(mesh, PartitionSpec(axes)).devices_indices_map((rows,))
    for device, (index,) in indices.items():
        if process_of(device) == process:
            local[index] = True
    if not local.any():
        processes = sorted({process_of(device) for device in mesh.devices.flat})
        why = f"has no device in mesh {format_mesh(mesh.shape)}; processes {processes} have"
        problem = Problem(f"process {process}", why, "MeshSpec(...).build() over all devices")
        raise DataError(format_problems(_HEADLINE, [problem]))
    return np.flatnonzero(local)


_HEADLINE = "The rows of the batch cannot be divided among the processes."


def rows_of_shardings(shardings: PyTree, rows: int) -> np.ndarray:
    """Lists the rows that this process needs for any leaf of a batch: i64[n], ascending."""
    needed = [process_rows(s.mesh, s.spec, rows) for s in jax.tree.leaves(shardings)]
    return np.unique(np.concatenate(needed))


def place_rows(local_batch: Batch, numbers: np.ndarray, rows: int, shardings: PyTree) -> Batch:
    """Puts this process's rows of a batch on its devices.

    Args:
      local_batch: pytree of host arrays [n, ...].
      numbers: i64[n], global numbers of these rows, ascending; all that the devices need.
      rows: rows of the global batch.
      shardings: the same pytree of `NamedSharding`.

    Returns:
      Global arrays [rows, ...]; nothing is sent between processes.
    """
    return jax.tree.map(
        lambda x, sharding: _place(np.asarray(x), numbers, rows, sharding), local_batch, shardings
    )


def _place(x: np.ndarray, numbers: np.ndarray, rows: int, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable and len(numbers) == rows:
        return jax.device_put(x, sharding)
    x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)
    cut: Any = functools.partial(cut_shard, x, numbers, rows)
    return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, cut)


def cut_shard(
    x: np.ndarray, numbers: np.ndarray, rows: int, index: tuple[slice, ...]
) -> np.ndarray:
    """Cuts one device's shard, given by its global index, out of the rows of its process.

    A process with rows 4, 5, 6, 7 of 8 cuts the shard of rows 6:8 out of its rows 2:4.
    """
    start, stop, _ = index[0].indices(rows)
    first = int(np.searchsorted(numbers, start))
    return x[first : first + stop - start][(slice(None), *index[1:])]
