"""What a run prints of what it begins with and of what it comes to."""

from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table
from rich.text import Text as Plain

from .._tree import format_bytes
from ..data import Baselines, Text
from ._table import Row, draw_mesh, layout_rows, total_row

SIMULATED = "simulated CPU devices, not a speed claim"


def standard_output() -> Console:
    """Returns a console as wide as its terminal, or 100 columns where the output is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=100)


def labelled(label: str, text: str) -> Plain:
    """Returns a text behind a bold label, on any console as it is: it may hold users' names.

    >>> labelled("data", " [/nope]").plain
    'data [/nope]'
    """
    return Plain.assemble((label, "bold"), text)


def is_simulated(mesh: Mesh) -> bool:
    """Whether several devices of the mesh are threads of one CPU."""
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"


def show_mesh(console: Console, mesh: Mesh) -> None:
    """Prints the axes and which device stands where."""
    sizes = " × ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    what = SIMULATED if is_simulated(mesh) else kind
    console.print(labelled("mesh", f" {sizes}  ({mesh.size} devices: {what})"))
    for line in draw_mesh(mesh):
        console.print(Plain(f"  {line}"))


def show_layout(console: Console, state: Any) -> None:
    """Prints where the bytes of a train state live."""
    rows = layout_rows(state.params)
    totals = [total_row("all parameters", state.params)]
    totals.append(total_row("optimizer state", state.opt_state))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("parameter", "type", "spec"):
        table.add_column(name, no_wrap=True)
    for name in ("whole", "per device"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    table.add_section()
    for row in totals:
        table.add_row(*_cells(row), style="bold")
    console.print(table)


def show_data(console: Console, text: Text) -> None:
    """Prints what is read and what is held out."""
    console.print(labelled("data", f" {text.describe()}"), soft_wrap=True)


def show_scores(
    console: Console, shown: tuple[str, float], scored: str, steps: int, baselines: Baselines | None
) -> None:
    """Prints the model among the compressors, best first, all on the same bytes.

    Args:
      console: where to.
      shown: a unit, and the model's bits per one.
      scored: how many tokens were, in words.
      steps: updates that the model was trained for.
      baselines: the compressors.
    """
    unit, bits = shown
    rows: list[tuple[str, str, float]] = [("this model", f"{steps} steps", bits)]
    if baselines is not None:
        rows += [
            ("order-0", "byte frequencies of the training text", baselines.order0),
            ("bigram", "frequencies given the byte before", baselines.bigram),
            ("gzip -9", "the held-out bytes alone", baselines.gzip),
            ("xz -9", "the held-out bytes alone", baselines.xz),
            ("xz -9 after train", "what they add to the training text", baselines.xz_after_train),
        ]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(f"bits per {unit}", justify="right")
    table.add_column("coder")
    table.add_column("knows")
    for name, knows, value in sorted(rows, key=lambda row: row[2]):
        style = "bold green" if name == "this model" else ""
        table.add_row(f"{value:.3f}", name, knows, style=style)
    console.print(labelled("\nheld out", f": {scored}, each scored once"))
    console.print(table)


def show_sample(console: Console, lines: Sequence[str]) -> None:
    """Prints generated text, indented."""
    console.print("\n[bold]a sample that it wrote[/]")
    for line in lines:
        console.print(Plain(f"  {line}"))


def _cells(row: Row) -> list[Plain]:
    sizes = format_bytes(row.whole), format_bytes(row.per_device)
    return [Plain(cell) for cell in (row.path, row.type, row.spec, *sizes)]
