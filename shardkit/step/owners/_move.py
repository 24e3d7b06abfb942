"""Moves matrices to their owners, computes there, and moves the results back.

Two layers of `W[D_fsdp, F]` on two devices; each device has half of the rows of both:

    device 0: W0[:D/2] W1[:D/2]     all-to-all     W0     program     its half of both
    device 1: W0[D/2:] W1[D/2:]        →           W1        →        its half of both

Every device sends (n−1)/n of what it holds, each way, once for any number of products. Matrices
are made a multiple of the devices by copies, whose results are dropped.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.sharding import Mesh, PartitionSpec

from ..._core.scope_markers import MATRIX_OWNERS
from ...rules import axes_of
from ._groups import Dims, Group


def run_group(group: Group, mesh: Mesh, values: Mapping[Any, jax.Array]) -> dict[Any, jax.Array]:
    """Computes the results of a group's parts, each on the owners of its matrices.

    `values` are of the parts' arrays and what they share.
    """
    arrays = [values[v] for part in group.parts for v in part.arrays]
    shared = [values[v] for v in group.parts[0].shared]
    specs = tuple(spec for specs in group.specs for spec in specs)
    result_specs = tuple(spec for specs in group.result_specs for spec in specs)

    def on_each_device(*operands: jax.Array) -> tuple[jax.Array, ...]:
        own, common = operands[: len(arrays)], operands[len(arrays) :]
        return _run_on_owners(group, mesh, own, common)

    run = jax.shard_map(
        on_each_device,
        mesh=mesh,
        in_specs=(*specs, *[PartitionSpec()] * len(shared)),
        out_specs=result_specs,
        check_vma=False,
    )
    results = run(*arrays, *shared)
    names = [v for part in group.parts for v in part.results]
    return dict(zip(names, results, strict=True))


def _run_on_owners(
    group: Group, mesh: Mesh, arrays: Sequence[jax.Array], shared: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """The body of the `shard_map`: `arrays` of all parts, as one device holds them."""
    batch, per_part = group.batch, len(group.parts[0].arrays)
    fronts = [x.shape[:batch] for x in arrays[::per_part]]
    counts = [math.prod(front) for front in fronts]
    unit = math.prod(mesh.shape[axis] for axis in group.order)
    padded = -(-sum(counts) // unit) * unit
    with jax.named_scope(MATRIX_OWNERS):
        moved = []
        for i in range(per_part):
            flat = [x.reshape(-1, *x.shape[batch:]) for x in arrays[i::per_part]]
            rows = jnp.pad(
                jnp.concatenate(flat),
                [(0, padded - sum(counts)), *[(0, 0)] * (flat[0].ndim - 1)],
                mode="wrap",
            )
            moved.append(_to_owners(rows, _dims(group.specs[0][i], batch, rows.ndim), group, mesh))

        def one(*matrices: jax.Array) -> list[jax.Array]:
            inputs = [x.reshape(*[1] * batch, *x.shape) for x in matrices]
            results = core.jaxpr_as_fun(group.program)(*inputs, *shared)
            return [x.reshape(x.shape[batch:]) for x in results]

        results = jax.vmap(one)(*moved)
        parts = []
        for x, spec in zip(results, group.result_specs[0], strict=True):
            rows = _from_owners(x, _dims(spec, batch, x.ndim), group)
            ends = [sum(counts[: i + 1]) for i in range(len(counts))]
            pieces = jnp.split(rows[: sum(counts)], ends[:-1])
            parts.append(
                [p.reshape(*front, *p.shape[1:]) for p, front in zip(pieces, fronts, strict=True)]
            )
    return tuple(x for of_part in zip(*parts, strict=True) for x in of_part)


def _to_owners(rows: jax.Array, dims: Dims, group: Group, mesh: Mesh) -> jax.Array:
    """`[matrices, *shards]` → `[matrices of this device, *matrix]`."""
    for axis in group.order:
        dim = _dim_of(axis, dims)
        if dim is None:
            size = rows.shape[0] // mesh.shape[axis]
            rows = lax.dynamic_slice_in_dim(rows, lax.axis_index(axis) * size, size)
        else:
            rows = lax.all_to_all(rows, axis, 0, 1 + dim, tiled=True)
    return rows


def _from_owners(rows: jax.Array, dims: Dims, group: Group) -> jax.Array:
    """`[matrices of this device, *matrix]` → `[matrices, *shards]`."""
    for axis in reversed(group.order):
        dim = _dim_of(axis, dims)
        if dim is None:
            rows = lax.all_gather(rows, axis, tiled=True)
        else:
            rows = lax.all_to_all(rows, axis, 1 + dim, 0, tiled=True)
    return rows


def _dims(spec: PartitionSpec, batch: int, rank: int) -> Dims:
    """Mesh axes of each dim of a matrix; `rank`: of an array with one dim in front of these."""
    entries = [axes_of(entry) for entry in spec][batch:]
    return (*entries, *[()] * (rank - 1 - len(entries)))


def _dim_of(axis: str, dims: Dims) -> int | None:
    return next((i for i, axes in enumerate(dims) if axis in axes), None)


def count_bytes(groups: Sequence[Group], sizes: Mapping[str, int]) -> tuple[tuple[str, float], ...]:
    """The fewest bytes that one device sends for its matrices: `(mesh axis, bytes), …`.

    What several groups use in the same way moves once.
    """
    moves = dict.fromkeys(
        (var, spec, axis)
        for group in groups
        for part, specs, ends in zip(group.parts, group.specs, group.result_specs, strict=True)
        for var, spec in zip((*part.arrays, *part.results), (*specs, *ends), strict=True)
        for axis in group.order
    )
    totals: dict[str, float] = {}
    for var, spec, axis in moves:
        ways = math.prod(sizes[name] for entry in spec for name in axes_of(entry))
        size = var.aval.size * jnp.dtype(var.aval.dtype).itemsize / ways
        totals[axis] = totals.get(axis, 0.0) + (sizes[axis] - 1) / sizes[axis] * size
    return tuple(sorted(totals.items()))
