"""Tables of aligned columns, which fold long cells; nested mappings as their rows."""

import contextlib
import contextvars
import dataclasses
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import printable

# Columns are not folded to less than this, since every word would be broken.
_NARROWEST = 8
_CONTINUED = "    "


# Columns to which the texts of results are folded.
_text_width: contextvars.ContextVar[int] = contextvars.ContextVar("text_width", default=100)


def text_width() -> int:
    """Columns to which the text of a result is folded: 100, or fewer on a narrower terminal."""
    return _text_width.get()


@contextlib.contextmanager
def narrow_texts(columns: int) -> Iterator[None]:
    """Folds texts of results to a terminal of so many columns.

    >>> with narrow_texts(60):
    ...     text_width()
    60
    """
    token = _text_width.set(max(40, min(columns, text_width())))
    try:
        yield
    finally:
        _text_width.reset(token)


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table."""

    name: str  # header; may have several lines
    right: bool = False  # whether its cells are numbers: right-aligned and not folded
    # width to which it is folded before other columns are folded; None for no such width
    most: int | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under named columns."""

    columns: Sequence[Column | str]  # the columns; a text is a left-aligned column of that name
    # the cells of each row, at most one per column; a `str` in place of a row is a line across all
    # columns
    rows: Sequence[Sequence[str] | str]
    indent: int = 0  # spaces before each row, but not before a `str`
    gap: int = 2  # spaces between two columns
    # index of a row → `rich` style in which a terminal shows it
    styles: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def to_text(self, width: int | None = None) -> str:
        """Returns the table as plain text, with the whole text of every cell.

        Args:
          width: columns of the terminal to fold to, unless numbers and the narrowest columns need
            more; None for no folding.

        >>> table = Table(["leaf", Column("bytes", right=True)], [["layers/mlp/gate", "8 KiB"]])
        >>> print(table.to_text())
        leaf             bytes
        layers/mlp/gate  8 KiB
        >>> print(table.to_text(width=18))
        leaf         bytes
        layers/mlp/  8 KiB
        gate
        """
        return "\n".join(line for _, line in self.to_lines(width))

    def to_lines(self, width: int | None = None) -> Iterator[tuple[str, str]]:
        """Yields `(style, line)` for each line of `to_text`."""
        columns = [Column(column) if isinstance(column, str) else column for column in self.columns]
        header = [column.name for column in columns]
        rows = [
            printable(row)
            if isinstance(row, str)
            else _pad_row([printable(cell) for cell in row], len(columns))
            for row in self.rows
        ]
        table = [header, *(row for row in rows if not isinstance(row, str))]
        gaps = self.indent + self.gap * (len(columns) - 1)
        widths = _fit_widths(columns, table, None if width is None else width - gaps)
        for at, row in enumerate([header, *rows] if any(header) else rows, -any(header)):
            style = self.styles.get(at, "") if at >= 0 else "bold"
            if isinstance(row, str):
                lines = row.split("\n") if width is None else fold_text(row, width, _CONTINUED)
                yield from ((style, line) for line in lines)
                continue
            for cells in _fold_row(row, columns, widths):
                yield style, f"{'':{self.indent}}{(' ' * self.gap).join(cells)}".rstrip()


def fold_text(text: str, width: int, indent: str = "") -> list[str]:
    """Breaks text into lines of at most `width` columns, between words or after a `/` or comma.

    A longer word is broken after `.` or `_`, or else anywhere. Line breaks of the text are kept;
    each line but the first is indented.

    >>> fold_text("layers/attention is split", 12)
    ['layers/', 'attention is', 'split']
    """
    lines: list[str] = []
    for remaining in text.split("\n"):
        prefix = ""
        while True:
            end = _find_break(remaining, max(1, width - _count_columns(prefix)))
            is_last = end == len(remaining)
            lines.append(prefix + (remaining if is_last else remaining[:end].rstrip()))
            if is_last:
                break
            remaining, prefix = remaining[end:].lstrip(" "), indent
    return lines


def _find_break(text: str, width: int) -> int:
    """Number of characters of the first line: all, up to the last break, or as many as fit."""
    if _count_columns(text) <= width:
        return len(text)
    fits = next(n for n in range(width, -1, -1) if _count_columns(text[:n]) <= width) or 1
    # A space in the column after the line is dropped, so the line may end there.
    blank = text.rfind(" ", 0, fits + 1)
    if text[:blank].strip() and blank > 0:
        return blank
    for marks in ("/,", "._"):
        if end := max(text.rfind(mark, 0, fits) for mark in marks) + 1:
            return end
    return fits


def _pad_row(row: Sequence[str], n: int) -> list[str]:
    assert len(row) <= n, f"{len(row)} cells for {n} columns"
    return [*row, *[""] * (n - len(row))]


def _fit_widths(
    columns: Sequence[Column], table: Sequence[Sequence[str]], width: int | None
) -> list[int]:
    """Widths of the columns: those of the longest cells, reduced from the widest to fit `width`."""
    widths = [
        max(_count_columns(line) for row in table for line in row[at].split("\n"))
        for at in range(len(columns))
    ]
    if width is None:
        return widths
    texts = [at for at, column in enumerate(columns) if not column.right]
    while sum(widths) > width:
        over = [at for at in texts if widths[at] > (columns[at].most or widths[at])]
        foldable = over or [at for at in texts if widths[at] > _NARROWEST]
        if not foldable:
            break
        widths[max(foldable, key=lambda at: widths[at])] -= 1
    return widths


def _fold_row(
    row: Sequence[str], columns: Sequence[Column], widths: Sequence[int]
) -> Iterator[list[str]]:
    """Yields the padded cells of each line of one row."""
    cells = [
        cell.split("\n") if column.right else fold_text(cell, width)
        for cell, column, width in zip(row, columns, widths, strict=True)
    ]
    for at in range(max(map(len, cells))):
        line = [lines[at] if at < len(lines) else "" for lines in cells]
        padded = []
        for text, column, width in zip(line, columns, widths, strict=True):
            space = " " * (width - _count_columns(text))
            padded.append(space + text if column.right else text + space)
        yield padded


def _count_columns(text: str) -> int:
    """Columns of a text in a terminal: two per East Asian character, none per combining mark."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def flatten(tree: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested mappings by path, in order; a list too is a value.

    An empty mapping is itself a value, so that a group without entries is not lost. `separator` is
    between the names of a path, `prefix` before every path.

    >>> flatten({"train": {"steps": 4, "profile": {}}, "name": "nano"})
    {'train.steps': 4, 'train.profile': {}, 'name': 'nano'}
    >>> flatten({"decoder": {"up": 1}}, separator="/")
    {'decoder/up': 1}
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, separator, f"{path}{separator}")
        else:
            flat[path] = value
    return flat
