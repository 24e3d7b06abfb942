"""Marks the rows of a table that only CI runs as `slow`; README's test command runs the others."""

from collections.abc import Iterable

import pytest

SLOW = pytest.mark.slow
EXHAUSTIVE = (SLOW, pytest.mark.exhaustive)


def some_quick(
    table: Iterable[object], *quick: object, slow: Iterable[object] | None = None
) -> list[object]:
    """The rows of a table, for `parametrize` or a fixture; all but the quick ones are slow.

    Args:
      table: the rows; a tuple holds the values of several parameters.
      *quick: rows that README's command runs.
      slow: rows that `.ci/run` runs besides; `pytest -m exhaustive` runs the others. None: all.
    """
    table = list(table)
    slow = set(table) if slow is None else set(slow)
    chosen = {*quick} if slow == set(table) else {*quick, *slow}
    assert chosen <= set(table), f"no rows of the table: {chosen - set(table)}"
    params = [row if isinstance(row, tuple) else (row,) for row in table]
    return [
        pytest.param(*values, marks=() if row in quick else SLOW if row in slow else EXHAUSTIVE)
        for row, values in zip(table, params, strict=True)
    ]
