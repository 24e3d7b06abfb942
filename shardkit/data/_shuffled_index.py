"""The order of an epoch: a permutation that every process finds alone, from seed and epoch."""

import functools
from typing import Any

import numpy as np

# Of more rows no permutation is held (128 MiB); one is computed place by place.
_MOST_HELD = 2**24


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, rows: int, length: int = 1) -> tuple[Any, int]:
    """Returns the order of an epoch's rows, and where in the first `length` tokens they begin.

    Another offset in every epoch: no epoch cuts a text where another one did.

    Args:
      seed: of the data.
      epoch: from 0.
      rows: of the epoch.
      length: tokens in a row.
    """
    random = np.random.default_rng((seed % 2**64, epoch))
    if rows <= _MOST_HELD:
        return random.permutation(rows), int(random.integers(length))
    return _shuffled(rows, int(random.integers(2**32))), int(random.integers(length))


def _shuffled(rows: int, seed: int) -> Any:
    """Grain's permutation, which takes no memory."""
    import grain

    return grain.MapDataset.range(rows).seed(seed).shuffle()


def places(seed: int, picked: np.ndarray, rows: int, length: int = 1) -> list[tuple[int, int]]:
    """Says for global row numbers which row of its epoch each is, and that epoch's offset.

    Args:
      seed: of the data.
      picked: i64[n], row numbers over all epochs.
      rows: of an epoch.
      length: tokens in a row.
    """
    found = []
    for row in picked.tolist():
        epoch, place = divmod(row, rows)
        order, offset = epoch_order(seed, epoch, rows, length)
        found.append((int(order[place]), offset))
    return found
