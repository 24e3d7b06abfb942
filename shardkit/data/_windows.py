"""Batches as a function of (seed, step, row) alone.

An epoch is a permutation of windows that do not overlap. Row `r` of step `s` is global row
`s * batch + r`; its epoch and its place in that epoch follow by division. So any step can be
asked for, in any order, by any process, and a mesh or a restart changes nothing.
"""

import dataclasses
import functools
from typing import TypedDict

import numpy as np

from .._errors import DataError, Problem, raise_all
from ._corpus import END, Corpus, read_corpus, standard_library

VOCAB = 256


class Batch(TypedDict):
    """What one step reads: position `i` of `inputs` is to predict position `i` of `targets`.

    `inputs` i32[batch, length]; `targets` i32[batch, length]; `weights` f32[batch, length], 0
    where a target does not count.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text, and how it is cut.

    Attributes:
      path: a folder or a file of text; None for the Python standard library's source.
      length: bytes in one row.
      batch: rows in one step, over all devices.
      seed: of the order of windows.
      held_out: expected fraction of files that are only scored.
      overlap: bytes of context that a held-out row shares with the row before. Each byte is
        scored once all the same; more overlap gives it more context and costs more rows.
    """

    path: str | None = None
    length: int = 256
    batch: int = 8
    seed: int = 0
    held_out: float = 0.05
    overlap: int = 0

    def __post_init__(self) -> None:
        """Refuses sizes that no text could satisfy."""
        checks = {
            f"length={self.length}": (self.length >= 1, "must be at least 1.", "length=256"),
            f"batch={self.batch}": (self.batch >= 1, "must be at least 1.", "batch=8"),
            f"held_out={self.held_out:g}": (
                0 < self.held_out < 1,
                "is a share of the files: more than 0, less than 1.",
                "held_out=0.05",
            ),
            f"overlap={self.overlap}": (
                0 <= self.overlap < max(self.length, 1),
                f"must be at least 0 and less than data.length={self.length}.",
                "overlap=0",
            ),
        }
        problems = [
            Problem(f"data.{name}", why, f"--set data.{fix}")
            for name, (holds, why, fix) in checks.items()
            if not holds
        ]
        raise_all(DataError, "The data cannot be cut this way.", problems)


@dataclasses.dataclass(frozen=True)
class Text:
    """A corpus cut into rows.

    Attributes:
      corpus: the bytes.
      config: how they are cut.
    """

    corpus: Corpus
    config: DataConfig

    def __post_init__(self) -> None:
        """Refuses rows longer than the text, and batches of more rows than it holds."""
        length, batch = self.config.length, self.config.batch
        problems = []
        sizes = {"train": len(self.corpus.train), "held_out": self.held_out_bytes}
        fix = f"--set data.length={max(1, min(sizes.values()) // 2)}"
        for side, size in sizes.items():
            if length > size:
                why = f"data.length={length} is longer than all its {size:,} bytes."
                problems.append(Problem(f"{self.corpus.source} ({side})", why, fix))
        if not problems and batch > self.rows_per_epoch:
            why = f"data.batch={batch}, but an epoch has {self.rows_per_epoch} rows of {length}."
            fix = f"--set data.batch={self.rows_per_epoch}, or a smaller data.length"
            problems.append(Problem(self.corpus.source, why, fix))
        raise_all(DataError, "There is too little text for these rows.", problems)

    @property
    def rows_per_epoch(self) -> int:
        """Windows that do not overlap, wherever in the first window an epoch begins."""
        return max(1, (len(self.corpus.train) + 1 - self.config.length) // self.config.length)

    @property
    def held_out_bytes(self) -> int:
        """Bytes that the held-out rows score, each once."""
        return len(self.corpus.held_out)

    @property
    def held_out_steps(self) -> int:
        """Number of batches that cover the held-out bytes."""
        rows = -(-self.held_out_bytes // self._stride)
        return -(-rows // self.config.batch)

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Returns the training batch of a step, or some of its rows.

        Args:
          step: any step, from 0.
          rows: which of the `batch` rows to make; the others cost nothing.

        Returns:
          Rows of `length` bytes, all weights 1.
        """
        batch, length = self.config.batch, self.config.length
        picked = np.arange(step * batch, (step + 1) * batch)[rows]
        starts = np.array([self._start(int(row)) for row in picked], np.int64)
        return _rows(self._train, starts, length, np.ones((len(starts), length), np.float32))

    def held_out_batch(self, step: int) -> Batch:
        """Returns the held-out batch of a step in `range(held_out_steps)`, in file order.

        Targets that an earlier row scored already, and the padding behind the last byte, have
        weight 0: over all steps each held-out byte has weight 1 exactly once.
        """
        batch, length, stride = self.config.batch, self.config.length, self._stride
        ends = (np.arange(step * batch, (step + 1) * batch) + 1) * stride
        starts = np.maximum(ends - length, 0)
        target = starts[:, None] + np.arange(length)
        last = np.minimum(ends, self.held_out_bytes)
        fresh = (target >= (ends - stride)[:, None]) & (target < last[:, None])
        return _rows(self._held_out, starts, length, fresh.astype(np.float32))

    @property
    def _stride(self) -> int:
        return self.config.length - self.config.overlap

    # Both streams open with the end of the file before, from which the first byte is predicted.
    @functools.cached_property
    def _train(self) -> np.ndarray:
        return np.frombuffer(END + self.corpus.train, np.uint8)

    @functools.cached_property
    def _held_out(self) -> np.ndarray:
        padding = bytes(self.config.length + self.config.batch * self._stride)
        return np.frombuffer(END + self.corpus.held_out + padding, np.uint8)

    def _start(self, row: int) -> int:
        epoch, place = divmod(row, self.rows_per_epoch)
        order, offset = _epoch(self.config.seed, epoch, self.rows_per_epoch, self.config.length)
        room = len(self.corpus.train) - self.rows_per_epoch * self.config.length
        return min(offset, room) + int(order[place]) * self.config.length


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, rows: int, length: int) -> tuple[np.ndarray, int]:
    """Order of an epoch's windows, and the byte at which they begin: no epoch repeats a cut."""
    random = np.random.default_rng((seed % 2**64, epoch))
    return random.permutation(rows), int(random.integers(length))


def _rows(stream: np.ndarray, starts: np.ndarray, length: int, weights: np.ndarray) -> Batch:
    windows = stream[starts[:, None] + np.arange(length + 1)].astype(np.int32)
    return {"inputs": windows[:, :-1], "targets": windows[:, 1:], "weights": weights}


def load_text(config: DataConfig) -> Text:
    """Reads and cuts the text that a config names.

    Raises:
      DataError: it is missing, unreadable, empty, or too small for the rows asked for.
    """
    corpus = (
        standard_library(config.held_out)
        if config.path is None
        else read_corpus(config.path, config.held_out)
    )
    return Text(corpus, config)
