"""Rows of a stream: windows over it, or whole documents packed side by side.

Both know an epoch as a fixed number of rows and can make any of them, in any order.
"""

import dataclasses
import functools
from typing import Protocol

import numpy as np

from ._shuffled_index import places
from ._stream import Stream

Batch = dict[str, np.ndarray]


class Rows(Protocol):
    """A stream cut into rows."""

    @property
    def per_epoch(self) -> int:
        """Rows that an epoch has."""
        ...

    def make(self, picked: np.ndarray, seed: int) -> Batch:
        """Returns rows by their numbers i64[n] over all epochs, as `[n, length]` arrays."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Windows that do not overlap; an epoch is a permutation of them.

    Attributes:
      stream: what they lie on.
      length: positions in one.
    """

    stream: Stream
    length: int

    @property
    def per_epoch(self) -> int:
        """Windows, wherever in the first window an epoch begins."""
        return max(1, (self.stream.predicted + 1 - self.length) // self.length)

    def make(self, picked: np.ndarray, seed: int) -> Batch:
        """Returns `inputs`, `targets` and `weights`, all of these 1."""
        room = self.stream.predicted - self.per_epoch * self.length
        found = places(seed, picked, self.per_epoch, self.length)
        starts = [min(offset, room) + place * self.length for place, offset in found]
        tokens = self.stream.read(np.array(starts, np.int64), self.length + 1)
        weights = np.ones((len(picked), self.length), np.float32)
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Documents packed into rows, none cut but those that are longer than a row.

    Best fit, longest first (each document goes where it leaves least room): about two seconds
    for a million documents, made once. Every position of a document that has a next token is
    in exactly one row.

    Attributes:
      stream: the documents.
      length: positions in a row.
    """

    stream: Stream
    length: int

    @property
    def per_epoch(self) -> int:
        """Rows."""
        return len(self._plan[2]) - 1

    @property
    def fill(self) -> float:
        """Share of the positions that are no padding."""
        return float(self._plan[1].sum() / (self.per_epoch * self.length))

    @functools.cached_property
    def _plan(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start and size of each part of a document, by row, and where each row's parts begin."""
        ends = self.stream.ends
        starts = np.concatenate([[0], ends[:-1]])
        # With an end between documents every token has a next one, and otherwise the last has not.
        sizes = ends - starts - (1 - self.stream.lead)
        parts = -(-sizes // self.length)
        owner = np.repeat(np.arange(len(ends)), parts)
        number = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)
        starts = starts[owner] + number * self.length
        sizes = np.minimum(sizes[owner] - number * self.length, self.length)
        row = best_fit(sizes, self.length)
        order = np.lexsort((starts, row))
        bounds = np.searchsorted(row[order], np.arange(row.max(initial=-1) + 2))
        return starts[order], sizes[order], bounds

    def make(self, picked: np.ndarray, seed: int) -> Batch:
        """Returns `inputs`, `targets`, `weights` (0 on padding) and `segment_ids`.

        Segments are numbered from 1 in each row; padding is segment 0.
        """
        starts, sizes, bounds = self._plan
        shape = (len(picked), self.length)
        batch: Batch = {
            name: np.zeros(shape, np.int32) for name in ("inputs", "targets", "segment_ids")
        }
        batch["weights"] = np.zeros(shape, np.float32)
        found = places(seed, picked, self.per_epoch)
        for i, (place, _) in enumerate(found):
            at = 0
            for segment, part in enumerate(range(bounds[place], bounds[place + 1]), 1):
                size = int(sizes[part])
                tokens = self.stream.read(starts[part : part + 1], size + 1)[0]
                own = (i, slice(at, at + size))
                batch["inputs"][own], batch["targets"][own] = tokens[:-1], tokens[1:]
                batch["segment_ids"][own], batch["weights"][own] = segment, 1
                at += size
        return batch


def best_fit(sizes: np.ndarray, room: int) -> np.ndarray:
    """Packs things into bins, the largest first, each where it leaves least room.

    Args:
      sizes: i64[n], each at most `room`.
      room: of a bin.

    Returns:
      i64[n], the bin of each.

    >>> best_fit(np.array([3, 6, 2, 5, 4]), 10)
    array([1, 0, 1, 1, 0])
    """
    bins = np.zeros(len(sizes), np.int64)
    left: list[list[int]] = [[] for _ in range(room + 1)]  # bins by the room that they have left
    some, made = 0, 0  # bit r of `some`: whether there is a bin with r left
    for i in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[i])
        fits = some >> size
        if fits:
            at = size + (fits & -fits).bit_length() - 1
            bins[i] = left[at].pop()
            some ^= 0 if left[at] else 1 << at
        else:
            at, bins[i], made = room, made, made + 1
        left[at - size].append(int(bins[i]))
        some |= 1 << (at - size)
    return bins


def segment_positions(segment_ids: np.ndarray) -> np.ndarray:
    """Counts positions within each segment, for models that look positions up.

    The reference decoder does not need them: its rotary embedding sees differences alone.

    Args:
      segment_ids: integers[n, length], equal within a segment and different in the next one.

    Returns:
      i32[n, length], from 0 in every segment.

    >>> segment_positions(np.array([[1, 1, 2, 2, 2, 0, 0], [5, 5, 5, 5, 5, 5, 6]]))
    array([[0, 1, 0, 1, 2, 0, 1],
           [0, 1, 2, 3, 4, 5, 0]], dtype=int32)
    """
    at = np.arange(segment_ids.shape[1], dtype=np.int32)
    begins = np.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return at - np.maximum.accumulate(np.where(begins, at, 0), axis=1)


def segments(stream: Stream, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of positions of a stream: the document, counted from the row's first, and what counts.

    Args:
      stream: the documents.
      positions: i64[n, length].

    Returns:
      i32[n, length] from 1, and whether the next token belongs to the same document.
    """
    own = stream.document(positions)
    if stream.lead:
        follows = np.ones(own.shape, bool)  # the end of the document before opens one
    else:
        follows = stream.document(positions + 1) == own
    return (own - own[:, :1] + 1).astype(np.int32), follows
