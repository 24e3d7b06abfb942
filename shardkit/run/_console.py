"""What a run prints of what it begins with and of what it comes to."""

from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh
from rich.console import Console
from rich.text import Text as Plain

from .._core.io import Column, Table, print_table
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
    numbers = (Column("whole", right=True), Column("per device", right=True))
    cells = [_cells(row) for row in (*rows, *totals)]
    bold = dict.fromkeys(range(len(rows), len(cells)), "bold")
    print_table(console, Table(("parameter", "type", "spec", *numbers), cells, styles=bold))


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
    rows.sort(key=lambda row: row[2])
    cells = [(f"{value:.3f}", name, knows) for name, knows, value in rows]
    own = [at for at, row in enumerate(rows) if row[0] == "this model"]
    columns = (Column(f"bits per {unit}", right=True), "coder", "knows")
    console.print(labelled("\nheld out", f": {scored}, each scored once"))
    print_table(console, Table(columns, cells, styles=dict.fromkeys(own, "bold green")))


def show_sample(console: Console, lines: Sequence[str]) -> None:
    """Prints generated text, indented."""
    console.print("\n[bold]a sample that it wrote[/]")
    for line in lines:
        console.print(Plain(f"  {line}"))


def _cells(row: Row) -> tuple[str, ...]:
    return row.path, row.type, row.spec, format_bytes(row.whole), format_bytes(row.per_device)
