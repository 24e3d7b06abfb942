"""Which rows of a table README's test command runs; the others are `slow`, and CI runs them too."""

from collections.abc import Iterable

import pytest

SLOW = pytest.mark.slow


def some_quick(table: Iterable[object], *quick: object) -> list[object]:
    """The rows of a table, for `parametrize` or a fixture, all but the quick ones marked slow."""
    table = list(table)
    assert set(quick) <= set(table), f"no rows of the table: {set(quick) - set(table)}"
    return [row if row in quick else pytest.param(row, marks=SLOW) for row in table]
