"""Large tables: some cells run with the slow tests, all of them by hand."""

import itertools

import pytest


def table(*columns, every):
    """Parameters for the product of some columns, all of them slow.

    One cell in `every`, on a diagonal that meets each value of each column, runs in `.ci/run`. The
    others are `exhaustive` too: `pytest -m exhaustive` runs them.

    Args:
      *columns: sequences of values.
      every: one in how many cells is kept.
    """
    rows = []
    for index, cell in enumerate(itertools.product(*map(tuple, columns))):
        kept = (index + index // max(len(tuple(columns[-1])), 1)) % every == 0
        marks = [pytest.mark.slow] if kept else [pytest.mark.slow, pytest.mark.exhaustive]
        rows.append(pytest.param(*cell, marks=marks, id="-".join(map(str, cell))))
    return rows
