"""What a run looks like: a live line on a terminal, plain lines elsewhere."""

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from .._tree import format_bytes
from ..data import Baselines, Text
from ._table import Row, draw_mesh, layout_rows, total_row

SIMULATED = "simulated CPU devices, not a speed claim"


def standard_output() -> Console:
    """Returns a console as wide as its terminal, or 100 columns where the output is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=100)


def is_simulated(mesh: Mesh) -> bool:
    """Whether several devices of the mesh are threads of one CPU."""
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"


def show_mesh(console: Console, mesh: Mesh) -> None:
    """Prints the axes and which device stands where."""
    sizes = " × ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    what = SIMULATED if is_simulated(mesh) else kind
    console.print(f"[bold]mesh[/] {sizes}  ({mesh.size} devices: {what})", highlight=False)
    for line in draw_mesh(mesh):
        console.print(f"  {line}", highlight=False, markup=False)


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
    corpus = text.corpus
    console.print(
        f"[bold]data[/] {corpus.source}: {corpus.train_files} files, {len(corpus.train):,} bytes; "
        f"held out: {corpus.held_out_files} files, {len(corpus.held_out):,} bytes",
        highlight=False,
        soft_wrap=True,
    )


def show_scores(
    console: Console, bits: float, scored: int, steps: int, baselines: Baselines | None
) -> None:
    """Prints the model among the compressors, best first, all on the same bytes."""
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
    table.add_column("bits per byte", justify="right")
    table.add_column("coder")
    table.add_column("knows")
    for name, knows, value in sorted(rows, key=lambda row: row[2]):
        style = "bold green" if name == "this model" else ""
        table.add_row(f"{value:.3f}", name, knows, style=style)
    console.print(f"\n[bold]held out[/]: {scored:,} bytes, each scored once", highlight=False)
    console.print(table)


def show_sample(console: Console, lines: Sequence[str]) -> None:
    """Prints generated text, indented."""
    console.print("\n[bold]a sample that it wrote[/]")
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False)


class LiveShow:
    """Progress of a run. On a terminal one line that changes, elsewhere a line now and then."""

    def __init__(self, console: Console, steps: int, log_every: int, simulated: bool) -> None:
        self._console, self._steps, self._log_every = console, steps, log_every
        self._unit = "tokens/s (simulated)" if simulated else "tokens/s"
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("compiled, warming up", total=steps)

    def step(self, done: int, loss: float, rate: float | None, left: float | None) -> None:
        """Tells of a finished update."""
        said = f"loss {loss:.3f}  {loss / math.log(2):.3f} bits/byte"
        if rate is not None and left is not None:
            minutes, seconds = divmod(round(left), 60)
            said += f"  {rate:,.0f} {self._unit}  ETA {minutes}:{seconds:02d}"
        self._progress.update(self._task, completed=done, description=said)
        due = done == 1 or done % self._log_every == 0 or done == self._steps
        if due and not self._console.is_terminal:
            self._print(f"step {done:>{len(str(self._steps))}}/{self._steps}  {said}")

    def evaluation(self, done: int, bits: float, scored: int) -> None:
        """Tells of an evaluation on part of the held-out bytes."""
        self._print(f"step {done}: {bits:.3f} bits/byte on {scored:,} held-out bytes")

    def note(self, line: str) -> None:
        """Tells of something that happened beside the steps."""
        self._print(line)

    def _print(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        """Starts the live line."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves the last line as it is."""
        self._progress.stop()


def _cells(row: Row) -> tuple[str, ...]:
    return row.path, row.type, row.spec, format_bytes(row.whole), format_bytes(row.per_device)
