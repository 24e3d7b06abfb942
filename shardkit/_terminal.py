"""Printing names that users chose: as they are, whatever they look like to `rich`."""

from typing import IO

from rich.console import Console


def literal_console(
    file: IO[str] | None = None,
    *,
    width: int | None = None,
    stderr: bool = False,
    soft_wrap: bool = False,
) -> Console:
    """Returns a console that takes no text for markup or an emoji, in no cell of a table either.

    Args:
      file: takes plain text, without colors; by default the output is this process's.
      width: columns; by default those of the terminal.
      stderr: whether the output is standard error.
      soft_wrap: whether the terminal breaks lines.

    >>> literal_console(width=40).print("attn[local] [/nope] :fire:")
    attn[local] [/nope] :fire:
    """
    return Console(
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
