"""Marks the rows of a table that only CI runs as `slow`; README's test command runs the others."""

from collections.abc import Iterable

import pytest

SLOW = pytest.mark.slow


def some_quick(table: Iterable[object], *quick: object) -> list[object]:
    """The rows of a table, for `parametrize` or a fixture; all but the quick ones are slow.

    A tuple holds the values of several parameters.
    """
    table = list(table)
    assert set(quick) <= set(table), f"no rows of the table: {set(quick) - set(table)}"
    params = [row if isinstance(row, tuple) else (row,) for row in table]
    return [
        pytest.param(*values, marks=() if row in quick else SLOW)
        for row, values in zip(table, params, strict=True)
    ]
