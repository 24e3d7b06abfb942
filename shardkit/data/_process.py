"""Finds the rows of a batch that a process reads, and puts them on its devices."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._core.errors import DataError
from .._core.row_dims import RowDims, with_dim
from .._core.types import Batch, PyTree
from ..rules import axes_of, format_mesh, shard_count


def process_rows(
    mesh: Mesh,
    spec: PartitionSpec,
    rows: int,
    process_index: int | None = None,
    process_of: Callable[[Any], int] = operator.attrgetter("process_index"),
    row_dim: int = 0,
) -> np.ndarray:
    """Lists the rows of a global batch that the devices of one process hold.

    Only the spec's dim of rows matters: processes that differ along other mesh axes hold the same
    rows, and each of them reads all of these.

    Args:
      mesh: the devices of all processes.
      spec: of the batch; `step.batch_shardings` has one per leaf.
      rows: rows of the batch, over all devices.
      process_index: by default this process.
      process_of: returns the process that a device belongs to; tests simulate processes with it.
      row_dim: the dim of the spec that counts rows.

    Returns:
      i64[n], global row numbers in ascending order.

    Raises:
      DataError: the rows do not divide over the axes of their dim, or the process has no device in
        the mesh.

    >>> import jax, shardkit as sk
    >>> mesh = sk.MeshSpec(data=4, tensor=2).build()
    >>> process_rows(mesh, jax.P("data"), 8, 1, lambda device: device.id // 4)
    array([4, 5, 6, 7])
    >>> process_rows(mesh, jax.P(None, "data"), 4, 1, lambda device: device.id // 4)
    array([0, 1, 2, 3])
    """
    process = jax.process_index() if process_index is None else process_index
    axes = spec[row_dim] if row_dim < len(spec) else None
    shards = shard_count(axes_of(axes), mesh.shape)
    if rows % shards:
        why = f"do not split {shards} ways, over {axes_of(axes)} of mesh {format_mesh(mesh.shape)}"
        fix = f"batch={max(1, round(rows / shards)) * shards}"
        raise DataError.of(_HEADLINE, f"batch of {rows} rows", why, fix)
    local = np.zeros(rows, bool)
    indices = NamedSharding(mesh, PartitionSpec(axes)).devices_indices_map((rows,))
    for device, (index,) in indices.items():
        if process_of(device) == process:
            local[index] = True
    if not local.any():
        processes = sorted({process_of(device) for device in mesh.devices.flat})
        why = f"has no device in mesh {format_mesh(mesh.shape)}; processes {processes} have"
        fix = "MeshSpec(...).build() over all devices"
        raise DataError.of(_HEADLINE, f"process {process}", why, fix)
    return np.flatnonzero(local)


_HEADLINE = "The rows of the batch cannot be divided among the processes."


def rows_of_shardings(shardings: PyTree, rows: int, row_dims: RowDims | None = None) -> np.ndarray:
    """Lists the rows that this process needs for any leaf of a batch: i64[n], ascending.

    Args:
      shardings: pytree of `NamedSharding`.
      rows: rows of the global batch.
      row_dims: the dim of each leaf that counts rows; by default dim 0 of all.
    """
    leaves = jax.tree.leaves(shardings)
    pairs = zip(leaves, row_dims or (0,) * len(leaves), strict=True)
    needed = [process_rows(s.mesh, s.spec, rows, row_dim=d) for s, d in pairs if d is not None]
    return np.unique(np.concatenate(needed)) if needed else np.arange(rows)


def place_rows(
    local_batch: Batch,
    numbers: np.ndarray,
    rows: int,
    shardings: PyTree,
    row_dims: RowDims | None = None,
) -> Batch:
    """Puts this process's rows of a batch on its devices.

    Args:
      local_batch: pytree of host arrays, each with its rows on one dim, or whole.
      numbers: i64[n], global numbers of these rows, ascending; all that the devices need.
      rows: rows of the global batch.
      shardings: the same pytree of `NamedSharding`.
      row_dims: the dim of each leaf that counts rows; by default dim 0 of all.

    Returns:
      Global arrays; nothing is sent between processes.
    """
    leaves, structure = jax.tree.flatten(local_batch)
    columns = leaves, jax.tree.leaves(shardings), row_dims or (0,) * len(leaves)
    return structure.unflatten(
        [
            _place(np.asarray(x), numbers, rows, dim, sharding)
            for x, sharding, dim in zip(*columns, strict=True)
        ]
    )


def _place(
    x: np.ndarray, numbers: np.ndarray, rows: int, dim: int | None, sharding: NamedSharding
) -> jax.Array:
    if sharding.is_fully_addressable and len(numbers) == rows:
        return jax.device_put(x, sharding)
    x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)
    if dim is None:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    cut: Any = functools.partial(cut_shard, x, numbers, rows, row_dim=dim)
    return jax.make_array_from_callback(with_dim(x.shape, dim, rows), sharding, cut)


def cut_shard(
    x: np.ndarray, numbers: np.ndarray, rows: int, index: tuple[slice, ...], row_dim: int = 0
) -> np.ndarray:
    """Cuts one device's shard, given by its global index, out of the rows of its process.

    A process with rows 4, 5, 6, 7 of 8 cuts the shard of rows 6:8 out of its rows 2:4.
    """
    start, stop, _ = index[row_dim].indices(rows)
    first = int(np.searchsorted(numbers, start))
    return x[with_dim(index, row_dim, slice(first, first + stop - start))]
