"""Text in aligned columns, which folds long cells and never cuts one."""

import dataclasses
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

# A column is not folded to less than this: every word would be in pieces.
_NARROWEST = 8
_CONTINUED = "    "


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
      name: header; may have several lines.
      right: whether its cells are numbers: aligned to the right and never folded.
      most: width to which it is folded before any column is folded further; None for any.
    """

    name: str
    right: bool = False
    most: int | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under named columns.

    Attributes:
      columns: the columns; a text is a left-aligned column of that name.
      rows: the cells of each row, as many as there are columns or fewer; a text in place of a row
        is a line of its own above the rows that follow.
      indent: columns of space before each row, but not before a line of its own.
      gap: columns of space between two columns.
      styles: index of a row → `rich` style in which a terminal shows it.
    """

    columns: Sequence[Column | str]
    rows: Sequence[Sequence[str] | str]
    indent: int = 0
    gap: int = 2
    styles: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def to_text(self, width: int | None = None) -> str:
        """Returns the table as plain text, all of every cell.

        Args:
          width: columns to fold into, as far as numbers and the narrowest columns leave it
            possible; None keeps each line of a cell in one line.

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
        columns = [Column(one) if isinstance(one, str) else one for one in self.columns]
        header = [one.name for one in columns]
        rows = [row if isinstance(row, str) else _padded(row, len(columns)) for row in self.rows]
        table = [header, *(row for row in rows if not isinstance(row, str))]
        gaps = self.indent + self.gap * (len(columns) - 1)
        widths = _fit(columns, table, None if width is None else width - gaps)
        for at, row in enumerate([header, *rows] if any(header) else rows, -any(header)):
            style = self.styles.get(at, "") if at >= 0 else "bold"
            if isinstance(row, str):
                lines = row.split("\n") if width is None else fold_text(row, width, _CONTINUED)
                yield from ((style, line) for line in lines)
                continue
            for cells in _lay_out(row, columns, widths):
                yield style, f"{'':{self.indent}}{(' ' * self.gap).join(cells)}".rstrip()


def fold_text(text: str, width: int, indent: str = "") -> list[str]:
    """Breaks text into lines of at most `width` columns, between words or after a `/` or comma.

    What is longer is broken anywhere. Lines of the text stay lines.

    Args:
      text: one line or several.
      width: columns of a line.
      indent: before each line but the first.

    >>> fold_text("layers/attention is split", 12)
    ['layers/', 'attention is', 'split']
    """
    lines: list[str] = []
    for whole in text.split("\n"):
        rest, first = whole, True
        while True:
            before = "" if first else indent
            end = _break_at(rest, max(1, width - _columns(before)))
            lines.append(before + (rest if end == len(rest) else rest[:end].rstrip()))
            if end == len(rest):
                break
            rest, first = rest[end:].lstrip(" "), False
    return lines


def _break_at(text: str, width: int) -> int:
    """Number of characters for the first line: all, up to the last good break, or what fits."""
    if _columns(text) <= width:
        return len(text)
    fits = next(n for n in range(width, -1, -1) if _columns(text[:n]) <= width) or 1
    # A space may stand in the column behind the line, where it is dropped.
    blank = text.rfind(" ", 0, fits + 1)
    if text[:blank].strip() and blank > 0:
        return blank
    return max(text.rfind(mark, 0, fits) for mark in "/,") + 1 or fits


def _padded(row: Sequence[str], n: int) -> list[str]:
    assert len(row) <= n, f"{len(row)} cells for {n} columns"
    return [*row, *[""] * (n - len(row))]


def _fit(columns: Sequence[Column], table: Sequence[Sequence[str]], room: int | None) -> list[int]:
    """Widths of the columns: those of the longest cells, the widest reduced to fit into `room`."""
    widths = [
        max(_columns(line) for row in table for line in row[at].split("\n"))
        for at in range(len(columns))
    ]
    if room is None:
        return widths
    texts = [at for at, column in enumerate(columns) if not column.right]
    while sum(widths) > room:
        wide = [at for at in texts if widths[at] > (columns[at].most or widths[at])]
        folds = wide or [at for at in texts if widths[at] > _NARROWEST]
        if not folds:
            break
        widths[max(folds, key=lambda at: widths[at])] -= 1
    return widths


def _lay_out(
    row: Sequence[str], columns: Sequence[Column], widths: Sequence[int]
) -> Iterator[list[str]]:
    """The padded cells of each line of one row."""
    cells = [
        cell.split("\n") if column.right else fold_text(cell, width)
        for cell, column, width in zip(row, columns, widths, strict=True)
    ]
    for at in range(max(map(len, cells))):
        line = [lines[at] if at < len(lines) else "" for lines in cells]
        padded = []
        for text, column, width in zip(line, columns, widths, strict=True):
            space = " " * (width - _columns(text))
            padded.append(space + text if column.right else text + space)
        yield padded


def _columns(text: str) -> int:
    """Columns that a terminal takes for a text: East Asian characters take two, marks none."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(one) in "WF" for one in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))
