"""What a run prints before its first update: the mesh, and the layout of its state."""

from typing import Any

from jax.sharding import Mesh
from rich.console import Console
from rich.text import Text

from .._core.io._console import escape_controls, print_table
from .._core.io._table import Column, Table
from .._core.tree import format_bytes
from ._layout_table import LayoutRow, draw_mesh, layout_rows, total_row

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
