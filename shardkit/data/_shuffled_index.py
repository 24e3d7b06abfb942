"""The order of an epoch: a permutation that every process computes from seed and epoch."""

import functools
from typing import Any

import numpy as np

# Up to so many rows (128 MiB) the permutation is an array; of more, each index is computed.
_MAX_IN_MEMORY = 2**24


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, rows: int, length: int = 1) -> tuple[Any, int]:
    """Returns the permutation of an epoch's rows, and the token at which its first row starts.

    Each epoch starts at another token below `length`, so that epochs cut a text at different
    places.
    """
    random = np.random.default_rng((seed % 2**64, epoch))
    if rows <= _MAX_IN_MEMORY:
        return random.permutation(rows), int(random.integers(length))
    return _shuffle_lazily(rows, int(random.integers(2**32))), int(random.integers(length))


def _shuffle_lazily(rows: int, seed: int) -> Any:
    """Grain's permutation, which takes no memory."""
    import grain

    return grain.MapDataset.range(rows).seed(seed).shuffle()


def shuffled_index(
    seed: int, rows: np.ndarray, rows_per_epoch: int, length: int = 1
) -> list[tuple[int, int]]:
    """Returns, for rows i64[n] numbered over all epochs, the index in the unshuffled data.

    Row 25 of epochs of 10 rows is entry 5 of the third permutation. With each index comes the first
    token of its epoch.
    """
    pairs = []
    for row in rows.tolist():
        epoch, place = divmod(row, rows_per_epoch)
        order, offset = epoch_order(seed, epoch, rows_per_epoch, length)
        pairs.append((int(order[place]), offset))
    return pairs
