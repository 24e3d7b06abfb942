"""Where every byte of a state lives, in at most twenty lines of a hundred columns."""

import dataclasses
import math
import re
from typing import Any

import numpy as np
from jax.sharding import Mesh

from .._tree import leaves_by_path, nbytes, short_type

_LARGEST_DRAWN = 16


@dataclasses.dataclass(frozen=True)
class Row:
    """Leaves of one shape and one spec whose paths differ in numbers alone.

    Attributes:
      path: with `*` for numbers that differ.
      leaves: how many.
      type: `f32[4,160,448]`.
      spec: `P(None, None, 'tensor')`, or "" for a row that sums several specs.
      whole: bytes of one copy of all leaves.
      per_device: bytes that one device holds of them.
    """

    path: str
    leaves: int
    type: str
    spec: str
    whole: int
    per_device: int


def layout_rows(tree: Any, limit: int = 14) -> list[Row]:
    """Groups a pytree of sharded arrays, largest on each device first.

    Args:
      tree: arrays with shardings (`jax.Array` or `jax.ShapeDtypeStruct`).
      limit: most rows; the smallest share the last one.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for path, leaf in leaves_by_path(tree).items():
        row = _row(path or "(root)", leaf)
        key = (re.sub(r"(?<![^/])\d+(?![^/])", "*", row.path), row.type, row.spec)
        groups.setdefault(key, []).append(row)
    rows = [
        dataclasses.replace(_total(rows, *key[1:]), path=key[0] if len(rows) > 1 else rows[0].path)
        for key, rows in groups.items()
    ]
    rows.sort(key=lambda row: (-row.per_device, row.path))
    if len(rows) <= limit:
        return rows
    rest = _total(rows[limit - 1 :], "", "")
    return [*rows[: limit - 1], dataclasses.replace(rest, path=f"{rest.leaves} smaller leaves")]


def total_row(name: str, tree: Any) -> Row:
    """Sums a pytree of sharded arrays under one name."""
    rows = [_row(path, leaf) for path, leaf in leaves_by_path(tree).items()]
    return dataclasses.replace(_total(rows, f"{len(rows)} leaves", ""), path=name)


def draw_mesh(mesh: Mesh) -> list[str]:
    r"""Draws which device stands where: the last two axes as a grid, one grid for all before.

    >>> import jax, numpy as np
    >>> devices = np.array(jax.devices()[:8]).reshape(2, 4)
    >>> print("\n".join(draw_mesh(jax.sharding.Mesh(devices, ("data", "tensor")))))
              tensor
              0  1  2  3
    data 0    0  1  2  3
    data 1    4  5  6  7
    """
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    if max(ids.shape) > _LARGEST_DRAWN or ids.size > 4 * _LARGEST_DRAWN:
        return []
    *outer, column = mesh.axis_names
    labels = [
        " ".join(f"{axis} {i}" for axis, i in zip(outer, place, strict=True))
        for place in np.ndindex(ids.shape[:-1])
    ]
    margin = max(len(label) for label in labels) + 2
    grid = ids.reshape(-1, ids.shape[-1])
    width = len(str(ids.max())) + 2
    cells = ["".join(f"{n:>{width}}" for n in row) for row in (range(ids.shape[-1]), *grid)]
    rows = [f"{label:<{margin}}{row}" for label, row in zip(["", *labels], cells, strict=True)]
    return [" " * (margin + width - 1) + column, *rows]


def _row(path: str, leaf: Any) -> Row:
    shape, sharding = tuple(leaf.shape), leaf.sharding
    whole = nbytes(shape, leaf.dtype)
    shard = math.prod(sharding.shard_shape(shape))
    spec = re.sub("^PartitionSpec", "P", str(sharding.spec))
    share = whole * shard // math.prod(shape) if whole else 0
    return Row(path, 1, short_type(shape, leaf.dtype), spec, whole, share)


def _total(rows: list[Row], kind: str, spec: str) -> Row:
    whole = sum(row.whole for row in rows)
    return Row("", len(rows), kind, spec, whole, sum(row.per_device for row in rows))
