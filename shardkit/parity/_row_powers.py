"""How the loss and metrics grow with rows, found by running them, for the reference's sums.

The step reads it from the traced program (`step/rows/`); the reference shares nothing with it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .._core.row_dims import RowDims, count_rows, map_rows, take_rows
from .._core.types import Batch

Pairs = Mapping[str, tuple[Any, Any]]


def find_row_powers(
    run: Callable[[Batch], Pairs], batch: Batch, dims: RowDims, parts: int
) -> dict[str, int]:
    """Powers of the rows with which results grow: 0 of means of rows, 1 of sums over them.

    Compares the rows of one part with the same rows so often that they fill the batch.

    Args:
      run: `rows → {name: (total, weight)}`.
      batch: of all rows.
      dims: of its leaves.
      parts: micro-batches.
    """
    counts = count_rows(batch, dims)
    if parts == 1 or len(counts) != 1:
        return {}
    rows = counts.pop()

    def pairs_of(index: np.ndarray) -> dict[str, tuple[float, float]]:
        pairs = run(map_rows(lambda x, dim: take_rows(x, dim, index), batch, dims))
        return {name: (float(total), float(weight)) for name, (total, weight) in pairs.items()}

    found: list[dict[str, int]] = []
    # Draws of their own change a mean by far less than a power of the number of parts; a count of
    # few hits they may double, but hardly in two parts.
    for part in range(2):
        first = np.arange(part, rows, parts)
        few, many = pairs_of(first), pairs_of(np.tile(first, parts))
        found.append({name: _grown(few[name], many[name], parts) for name in few})
    return {name: power if found[1][name] == power else 0 for name, power in found[0].items()}


def _grown(few: tuple[float, float], many: tuple[float, float], parts: int) -> int:
    """The power with which a total grows over a weight that stays; 0 where the weight grows too."""
    (total, weight), (total_of_many, weight_of_many) = few, many
    if not total or not weight or not math.isclose(weight, weight_of_many, rel_tol=1e-3):
        return 0
    return _power(total_of_many / total, parts)


def _power(ratio: float, parts: int) -> int:
    """The whole power; 0 for what grows by none, as noise and what is not finite.

    >>> _power(4.1, 4), _power(0.99, 4), _power(-1.0, 4)
    (1, 0, 0)
    """
    exact = math.log(ratio, parts) if math.isfinite(ratio) and ratio > 0 else 0.0
    return round(exact) if abs(exact - round(exact)) < 0.1 else 0
