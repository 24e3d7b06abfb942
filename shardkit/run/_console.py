"""What a run prints before its first update: the mesh, and the layout of its state as rows."""

import dataclasses
import math
import re
from typing import Any

import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.text import Text

from .._core.errors import count
from .._core.io._console import escape_controls, print_table
from .._core.io._table import Column, Table
from .._core.tree import format_bytes, leaves_by_path, nbytes, short_type

_LARGEST_DRAWN = 16


@dataclasses.dataclass(frozen=True)
class LayoutRow:
    """Leaves of one type and spec whose paths differ only in numbers, such as layers."""

    path: str  # with `*` for the numbers, `layers/*/w`
    leaves: int  # number of leaves
    type: str  # `f32[4,160,448]`
    spec: str  # `P(None, None, 'tensor')`, or "" for leaves of several specs
    whole: int  # bytes of one copy of all leaves
    per_device: int  # bytes that one device holds of them


def layout_rows(tree: Any, limit: int = 14) -> list[LayoutRow]:
    """Groups the leaves of a pytree into rows, the most bytes per device first.

    The leaves are arrays with shardings (`jax.Array` or `jax.ShapeDtypeStruct`). Beyond `limit`
    rows, the smallest leaves share the last one.
    """
    groups: dict[tuple[str, str, str], list[LayoutRow]] = {}
    for path, leaf in leaves_by_path(tree).items():
        row = _make_row(path or "(root)", leaf)
        key = (re.sub(r"(?<![^/])\d+(?![^/])", "*", row.path), row.type, row.spec)
        groups.setdefault(key, []).append(row)
    rows = [
        dataclasses.replace(
            _sum_rows(group, kind, spec), path=path if len(group) > 1 else group[0].path
        )
        for (path, kind, spec), group in groups.items()
    ]
    rows.sort(key=lambda row: (-row.per_device, row.path))
    if len(rows) <= limit:
        return rows
    smaller = _sum_rows(rows[limit - 1 :], "", "")
    path = f"{smaller.leaves} smaller leaves"
    return [*rows[: limit - 1], dataclasses.replace(smaller, path=path)]


def total_row(name: str, tree: Any) -> LayoutRow:
    """Returns the sum over all leaves of a pytree, as a row of that name."""
    rows = [_make_row(path, leaf) for path, leaf in leaves_by_path(tree).items()]
    return dataclasses.replace(_sum_rows(rows, count(len(rows), "leaf"), ""), path=name)


def draw_mesh(mesh: Mesh) -> list[str]:
    r"""Draws device ids: the last axis as columns, all others as rows. Empty for large meshes.

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


def _make_row(path: str, leaf: Any) -> LayoutRow:
    shape, sharding = tuple(leaf.shape), leaf.sharding
    whole = nbytes(shape, leaf.dtype)
    shard = math.prod(sharding.shard_shape(shape))
    spec = re.sub("^PartitionSpec", "P", str(sharding.spec))
    share = whole * shard // math.prod(shape) if whole else 0
    return LayoutRow(
        path=path,
        leaves=1,
        type=short_type(shape, leaf.dtype),
        spec=spec,
        whole=whole,
        per_device=share,
    )


def _sum_rows(rows: list[LayoutRow], kind: str, spec: str) -> LayoutRow:
    return LayoutRow(
        path="",
        leaves=len(rows),
        type=kind,
        spec=spec,
        whole=sum(row.whole for row in rows),
        per_device=sum(row.per_device for row in rows),
    )


SIMULATED = "simulated CPU devices, not a speed claim"


def standard_output() -> Console:
    """Returns a console as wide as its terminal, or 100 columns where the output is a file."""
    console = Console()
    return escape_controls(console if console.is_terminal else Console(width=100))


def label_text(label: str, text: str) -> Text:
    """Returns text behind a bold label; markup in it, as in users' names, is printed as it is.

    >>> label_text("data", " [/nope]").plain
    'data [/nope]'
    """
    return Text.assemble((label, "bold"), text)


def is_simulated(mesh: Mesh) -> bool:
    """Whether several devices of the mesh are threads of one CPU."""
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"


def show_mesh(console: Console, mesh: Mesh) -> None:
    """Prints the axes of a mesh, and which device is at which place."""
    sizes = " × ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    devices = SIMULATED if is_simulated(mesh) else kind
    console.print(label_text("mesh", f" {sizes}  ({mesh.size} devices: {devices})"))
    for line in draw_mesh(mesh):
        console.print(Text(f"  {line}"))


def show_layout(console: Console, state: Any) -> None:
    """Prints a table of the layout of a train state: type, spec, and bytes per device."""
    rows = layout_rows(state.params)
    totals = [total_row("all parameters", state.params)]
    totals.append(total_row("optimizer state", state.opt_state))
    numbers = (Column("whole", right=True), Column("per device", right=True))
    cells = [_format_cells(row) for row in (*rows, *totals)]
    bold = dict.fromkeys(range(len(rows), len(cells)), "bold")
    print_table(console, Table(("parameter", "type", "spec", *numbers), cells, styles=bold))


def _format_cells(row: LayoutRow) -> tuple[str, ...]:
    sizes = format_bytes(row.whole), format_bytes(row.per_device)
    return row.path, row.type, row.spec, *sizes
