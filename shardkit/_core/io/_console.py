"""Text on a terminal; `rich` is imported when the first console is created."""

import contextlib
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, cast

from ..errors import printable
from ._table import Table

if TYPE_CHECKING:
    from rich.console import Console, RenderHook


def make_console(
    file: IO[str] | None = None,
    *,
    width: int | None = None,
    stderr: bool = False,
    soft_wrap: bool = False,
) -> "Console":
    """Returns a console that prints text literally, not as markup, emoji or control characters.

    `file` receives plain text, without colors; None for standard output, with `stderr` for standard
    error. `width` counts columns, None for those of the terminal. With `soft_wrap` the terminal,
    and not the console, breaks lines.

    >>> make_console(width=40).print("attn[local] [/nope] :fire:")
    attn[local] [/nope] :fire:
    """
    from rich.console import Console

    return escape_controls(
        Console(
            file=file,
            width=width,
            stderr=stderr,
            soft_wrap=soft_wrap,
            markup=False,
            emoji=False,
            highlight=False,
            color_system=None if file else "auto",
            legacy_windows=False if file else None,
        )
    )


class _Escaped:
    """A render hook of rich that escapes control characters in text, but for tabs."""

    def process_renderables(self, renderables: list[Any]) -> list[Any]:
        from rich.text import Text

        for text in renderables:
            if isinstance(text, Text):
                text.plain = "\t".join(map(printable, text.plain.split("\t")))
        return renderables


def escape_controls(console: "Console") -> "Console":
    r"""Escapes what could command a terminal in every text that a console prints.

    >>> make_console(width=40).print("step \x1b[2J 3")
    step \x1b[2J 3
    """
    console.push_render_hook(cast("RenderHook", _Escaped()))
    return console


@contextlib.contextmanager
def show_task(console: "Console", task: str) -> Iterator[None]:
    """Shows what is being done: with a clock on a terminal, as one line elsewhere.

    >>> with show_task(make_console(), "compiling"):
    ...     pass
    compiling ...
    """
    if not console.is_terminal:
        console.print(f"{task} ...", highlight=False, soft_wrap=True)
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}", markup=False)
    with Progress(
        SpinnerColumn(), text, TimeElapsedColumn(), console=console, transient=True
    ) as shown:
        shown.add_task(task)
        yield


def print_table(console: "Console", table: Table) -> None:
    """Prints a table: folded to the width of a terminal, and unfolded elsewhere.

    >>> print_table(make_console(width=10), Table(["leaf", "type"], [["layers/mlp/up", "f32[8]"]]))
    leaf           type
    layers/mlp/up  f32[8]
    """
    from rich.text import Text

    width = console.width if console.is_terminal else None
    for style, line in table.to_lines(width):
        console.print(Text(line, style), soft_wrap=True)
