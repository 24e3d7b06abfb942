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


class RowPowers:
    """Powers of the rows with which results grow: 0 of means of rows, 1 of sums over them."""

    def __init__(self, parts: int) -> None:
        """Takes the number of micro-batches; knows nothing yet."""
        self._parts = parts
        # None where a total was 0, which no number of rows changes: another batch may tell.
        self._powers: dict[str, int | None] = {}

    def find(self, run: Callable[[Batch], Pairs], batch: Batch, dims: RowDims) -> None:
        """Finds the powers that no batch has told yet; what is known of a loss stays.

        Compares the rows of one part with the same rows so often that they fill the batch.
        """
        counts, parts = count_rows(batch, dims), self._parts
        known = self._powers and None not in self._powers.values()
        if known or parts == 1 or len(counts) != 1:
            return
        rows = counts.pop()

        def pairs_of(index: np.ndarray) -> dict[str, tuple[float, float]]:
            pairs = run(map_rows(lambda x, dim: take_rows(x, dim, index), batch, dims))
            return {name: (float(total), float(weight)) for name, (total, weight) in pairs.items()}

        # Draws of their own change a mean by far less than a power of the number of parts; a count
        # of few hits they may double, but hardly in two parts.
        powers_of_parts: list[dict[str, int | None]] = []
        for part in range(2):
            first = np.arange(part, rows, parts)
            few, many = pairs_of(first), pairs_of(np.tile(first, parts))
            powers_of_parts.append({name: _grown(few[name], many[name], parts) for name in few})
        for name, power in powers_of_parts[0].items():
            if self._powers.get(name) is None:
                other = powers_of_parts[1][name]
                is_decided = None not in (power, other)
                self._powers[name] = (power if power == other else 0) if is_decided else None

    def weight_divisor(self, name: str) -> int:
        """What the weight of a part is divided by, so that parts of a sum are added up."""
        return self._parts ** (self._powers.get(name) or 0)


def _grown(few: tuple[float, float], many: tuple[float, float], parts: int) -> int | None:
    """The power with which a total grows over a weight that stays; 0 where the weight grows too."""
    (total, weight), (total_of_many, weight_of_many) = few, many
    if not total or not weight:
        return None
    if not math.isclose(weight, weight_of_many, rel_tol=1e-3):
        return 0
    return _power(total_of_many / total, parts)


def _power(ratio: float, parts: int) -> int:
    """The whole power; 0 for what grows by none, as noise and what is not finite.

    >>> _power(4.1, 4), _power(0.99, 4), _power(-1.0, 4)
    (1, 0, 0)
    """
    exact = math.log(ratio, parts) if math.isfinite(ratio) and ratio > 0 else 0.0
    return round(exact) if abs(exact - round(exact)) < 0.1 else 0
