"""Rows of a stream: contiguous parts of it, or whole documents packed side by side.

In both an epoch has a fixed number of rows, and any row can be made at any time.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ._shuffled_index import shuffled_index
from ._stream import Stream

TokenBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class ContiguousSequences:
    """Contiguous parts of a stream that do not overlap; an epoch is a permutation of them.

    Each epoch cuts at another offset. With `length` 4, 18 tokens to predict and offset 2:

        token   0 1 | 2 3 4 5 | 6 7 8 9 | 10 11 12 13 | 14 …
                      row 0     row 1     row 2          not read in this epoch
    """

    stream: Stream  # the tokens
    length: int  # tokens of a row

    @property
    def per_epoch(self) -> int:
        """Rows that fit behind every offset below `length`."""
        return max(1, (self.stream.predicted + 1 - self.length) // self.length)

    def make(self, rows: np.ndarray, seed: int) -> TokenBatch:
        """Returns `inputs`, `targets`, and `weights` of 1, of rows i64[n] over all epochs."""
        largest_offset = self.stream.predicted - self.per_epoch * self.length
        starts = [
            min(offset, largest_offset) + index * self.length
            for index, offset in shuffled_index(seed, rows, self.per_epoch, self.length)
        ]
        tokens = self.stream.read(np.array(starts, np.int64), self.length + 1)
        weights = np.ones((len(rows), self.length), np.float32)
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


@dataclasses.dataclass(frozen=True, eq=False)
class PackedSequences:
    """Documents packed into rows; only documents longer than a row are cut.

    Packing takes about two seconds for a million documents, once. Every position of a document
    that has a next token is in exactly one row.
    """

    stream: Stream  # the documents
    length: int  # tokens of a row

    @property
    def per_epoch(self) -> int:
        """Number of rows."""
        return len(self._layout[2]) - 1

    @property
    def fill(self) -> float:
        """Fraction of the positions that hold a token, not padding."""
        return float(self._layout[1].sum() / (self.per_epoch * self.length))

    @functools.cached_property
    def _layout(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start and size of each segment, ordered by row, and the first segment of each row.

        Rows of 10 for documents of 3, 25 and 5 tokens: the second is cut into 10, 10 and 5, and
        the segments 3 and 5, 5 are packed into what is left.

            starts  3 13 | 23 28 | 0        rows:  [3…12] [13…22] [23…27 28…32] [0…2]
            sizes  10 10 |  5  5 | 3        bounds: 0 1 2 4 5
        """
        ends = self.stream.ends
        starts = np.concatenate([[0], ends[:-1]])
        # With an end id between documents every token has a next one; without, the last has none.
        sizes = ends - starts - (1 - self.stream.lead)
        segments = -(-sizes // self.length)  # per document
        document = np.repeat(np.arange(len(ends)), segments)
        number = np.arange(len(document)) - np.repeat(np.cumsum(segments) - segments, segments)
        starts = starts[document] + number * self.length
        sizes = np.minimum(sizes[document] - number * self.length, self.length)
        row = pack_best_fit(sizes, self.length)
        order = np.lexsort((starts, row))
        bounds = np.searchsorted(row[order], np.arange(row.max(initial=-1) + 2))
        return starts[order], sizes[order], bounds

    def make(self, rows: np.ndarray, seed: int) -> TokenBatch:
        """Returns the rows numbered i64[n] over all epochs; see `fill_rows`."""
        starts, sizes, bounds = self._layout
        ones = np.ones(self.length, np.float32)

        def segments(row: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for part in range(bounds[row], bounds[row + 1]):
                size = int(sizes[part])
                yield self.stream.read(starts[part : part + 1], size + 1)[0], ones[:size]

        picked = shuffled_index(seed, rows, self.per_epoch)
        return fill_rows([segments(row) for row, _ in picked], self.length)


Sequences = ContiguousSequences | PackedSequences


def fill_rows(rows: Sequence[Iterable[tuple[np.ndarray, np.ndarray]]], length: int) -> TokenBatch:
    """Places segments side by side: integers [size + 1], and the weights [size] of their targets.

    Returns `inputs`, `targets` and `segment_ids` i32[n, length], segments numbered from 1 in each
    row and padding 0; and `weights` f32[n, length], 0 on padding.
    """
    names = ("inputs", "targets", "segment_ids")
    batch: TokenBatch = {name: np.zeros((len(rows), length), np.int32) for name in names}
    batch["weights"] = np.zeros((len(rows), length), np.float32)
    for i, segments in enumerate(rows):
        at = 0
        for number, (tokens, weights) in enumerate(segments, 1):
            here = (i, slice(at, at + len(weights)))
            batch["inputs"][here], batch["targets"][here] = tokens[:-1], tokens[1:]
            batch["weights"][here], batch["segment_ids"][here] = weights, number
            at += len(weights)
    return batch


def pack_best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Packs items into bins, the largest first, each into the fullest bin that has room.

    Returns i64[n], the bin of each item; their `sizes` are i64[n], each at most `capacity`.

    >>> pack_best_fit(np.array([3, 6, 2, 5, 4]), 10)
    array([1, 0, 1, 1, 0])
    """
    # `bins_by_room[r]` lists the bins with room r; bit r of `rooms` is set if there is one, so the
    # fullest bin with room for an item is the lowest set bit from `size` up. The example above:
    #   size  bins_by_room              rooms (bits)   goes to
    #      6  {}                        -              new bin 0, room 10 - 6 = 4
    #      5  {4: [0]}                  4              no bit from 5 up: new bin 1, room 5
    #      4  {4: [0], 5: [1]}          4, 5           bit 4: bin 0, room 0
    #      3  {0: [0], 5: [1]}          0, 5           bit 5: bin 1, room 2
    #      2  {0: [0], 2: [1]}          0, 2           bit 2: bin 1, room 0
    bins = np.zeros(len(sizes), np.int64)
    bins_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, count = 0, 0
    for i in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[i])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            bins[i] = bins_by_room[room].pop()
            rooms ^= 0 if bins_by_room[room] else 1 << room
        else:
            room, bins[i], count = capacity, count, count + 1
        bins_by_room[room - size].append(int(bins[i]))
        rooms |= 1 << (room - size)
    return bins


def segment_positions(segment_ids: np.ndarray) -> np.ndarray:
    """Counts positions within each segment, for models with a table of positions.

    The reference decoder does not need them: its rotary embedding only depends on differences.

    Args:
      segment_ids: integers[n, length], equal within a segment and different in the next one.

    Returns:
      i32[n, length], from 0 in every segment.

    >>> segment_positions(np.array([[1, 1, 2, 2, 2, 0, 0], [5, 5, 5, 5, 5, 5, 6]]))
    array([[0, 1, 0, 1, 2, 0, 1],
           [0, 1, 2, 3, 4, 5, 0]], dtype=int32)
    """
    at = np.arange(segment_ids.shape[1], dtype=np.int32)
    is_start = np.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return at - np.maximum.accumulate(np.where(is_start, at, 0), axis=1)


def segment_ids_at(stream: Stream, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns segment ids i32[n, length] of positions, and the targets that stay in the document.

    Documents are numbered from 1 in each row; targets are bool[n, length].
    """
    document = stream.document_at(positions)
    if stream.lead:
        same = np.ones(document.shape, bool)  # the end id before a document opens it
    else:
        same = stream.document_at(positions + 1) == document
    return (document - document[:, :1] + 1).astype(np.int32), same
