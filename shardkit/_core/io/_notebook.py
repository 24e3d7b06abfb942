"""What a notebook shows for a value: a small, self-contained piece of HTML.

Styles stand on the elements, since notebooks drop style sheets of files that they do not trust.
Every text is escaped: names come from the user.
"""

from collections.abc import Mapping, Sequence
from html import escape

from ..errors import printable
from ._table import Column, Table

Part = str | Mapping[str, str] | Table
_ROWS, _LINES, _CELL = 12, 40, 120
_CARD = "font:13px/1.45 system-ui,sans-serif;max-width:100%;overflow-x:auto"
_LEFT, _RIGHT = ' style="text-align:left"', ' style="text-align:right"'


def notebook_html(title: str, *parts: Part) -> str:
    """Returns a titled card: a paragraph per text, facts per mapping, 12 rows per table.

    >>> notebook_html("Ledger", "2 <rows>").endswith("<b>Ledger</b><div>2 &lt;rows&gt;</div></div>")
    True
    """
    body = "".join(_part_html(part) for part in parts if part)
    return f'<div style="{_CARD}"><b>{_escape(title)}</b>{body}</div>'


def text_html(text: str) -> str:
    """Returns text as it is printed: its first 40 lines, with the number of the others."""
    lines = text.split("\n")
    left = lines[_LINES:]
    shown = lines[:_LINES] + ([f"… and {len(left)} more lines: print() shows them"] if left else [])
    body = escape("\n".join(map(printable, shown)))
    return f'<pre style="max-width:100%;overflow-x:auto;line-height:1.25">{body}</pre>'


def _part_html(part: Part) -> str:
    if isinstance(part, str):
        return f"<div>{_escape(part)}</div>"
    if isinstance(part, Mapping):
        rows = "".join(
            f"<tr><th{_LEFT}>{_escape(name)}</th><td{_LEFT}>{_escape(value)}</td></tr>"
            for name, value in part.items()
            if value
        )
        return f"<table>{rows}</table>"
    return _table_html(part)


def _table_html(table: Table) -> str:
    columns = [Column(column) if isinstance(column, str) else column for column in table.columns]
    aligned = [_RIGHT if column.right else _LEFT for column in columns]
    pairs = zip(columns, aligned, strict=True)
    head = "".join(f"<th{align}>{_escape(column.name)}</th>" for column, align in pairs)
    rows = "".join(_row_html(row, aligned) for row in table.rows[:_ROWS])
    left = len(table.rows) - _ROWS
    more = _row_html(f"and {left} more", aligned) if left > 0 else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}{more}</tbody></table>"


def _row_html(row: Sequence[str], aligned: Sequence[str]) -> str:
    if isinstance(row, str):
        return f'<tr><td colspan="{len(aligned)}"{_LEFT}>{_escape(row)}</td></tr>'
    cells = zip(row, aligned, strict=False)
    return f"<tr>{''.join(f'<td{align}>{_escape(cell)}</td>' for cell, align in cells)}</tr>"


def _escape(text: str) -> str:
    text = printable(text)
    short = text if len(text) <= _CELL else f"{text[: _CELL - 1]}…"
    return escape(short).replace("\n", "<br>")
