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
    first = np.arange(0, counts.pop(), parts)

    def mean_of(index: np.ndarray) -> dict[str, float]:
        pairs = run(map_rows(lambda x, dim: take_rows(x, dim, index), batch, dims))
        return {name: float(t) / float(w) if float(w) else 0.0 for name, (t, w) in pairs.items()}

    few, many = mean_of(first), mean_of(np.tile(first, parts))
    # Draws of their own change a mean by far less than a power of the number of parts.
    growth = {name: many[name] / few[name] if few[name] else 1.0 for name in few}
    return {name: _power(ratio, parts) for name, ratio in growth.items()}


def _power(ratio: float, parts: int) -> int:
    """The whole power; 0 for what grows by none, as noise and what is not finite.

    >>> _power(4.1, 4), _power(0.99, 4), _power(-1.0, 4)
    (1, 0, 0)
    """
    exact = math.log(ratio, parts) if math.isfinite(ratio) and ratio > 0 else 0.0
    return round(exact) if abs(exact - round(exact)) < 0.1 else 0
