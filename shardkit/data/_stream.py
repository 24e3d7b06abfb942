"""Tokens of documents, one behind another, in arrays that may lie on disk."""

import bisect
import dataclasses
import functools
import itertools
import zlib

import numpy as np

from .._core.errors import DataError, Problem, format_problems

# Of larger files a checksum reads this many blocks, evenly over the file.
_WHOLE, _BLOCKS, _BLOCK = 2**26, 64, 2**16


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """Part of a stream: the tokens of a file, or some of them.

    Attributes:
      name: file, for errors.
      tokens: integers[n], also memory-mapped.
      ends: i64[documents], the token behind each document, the last one n.
      first: place of token 0 in the file.
    """

    name: str
    tokens: np.ndarray = dataclasses.field(repr=False)
    ends: np.ndarray = dataclasses.field(repr=False)
    first: int = 0

    def cut(self, at: int) -> tuple["Piece", "Piece"]:
        """Returns the tokens before and from a place, either of which may be none."""
        before, after = self.ends[self.ends <= at], self.ends[self.ends > at] - at
        if not len(before) or before[-1] < at:
            before = np.append(before, at)
        head = Piece(self.name, self.tokens[:at], before, self.first)
        return head, Piece(self.name, self.tokens[at:], after, self.first + at)

    def checksum(self) -> int:
        """CRC-32 of the tokens; of a sample of them where they take more than 64 MiB."""
        raw = self.tokens.view(np.uint8)
        if raw.nbytes <= _WHOLE:
            return zlib.crc32(raw.data)
        crc = zlib.crc32(str(raw.nbytes).encode())
        for at in np.linspace(0, raw.nbytes - _BLOCK, _BLOCKS, dtype=np.int64).tolist():
            crc = zlib.crc32(raw[at : at + _BLOCK].data, crc)
        return crc


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Documents one behind another.

    Where an `end` follows each document it also stands before the first one, so that every
    token is predicted from something: position `s` of the stream is token `s - 1` then, and
    token `s` otherwise.

    Attributes:
      pieces: the tokens.
      vocabulary: every id is to be below.
      end: id that follows each document; None for none.
    """

    pieces: tuple[Piece, ...]
    vocabulary: int
    end: int | None = None

    @functools.cached_property
    def _starts(self) -> list[int]:
        return list(itertools.accumulate((len(p.tokens) for p in self.pieces), initial=0))

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self._starts[-1]

    @property
    def lead(self) -> int:
        """Positions before the first token: 1 where an end stands there."""
        return 0 if self.end is None else 1

    @property
    def predicted(self) -> int:
        """Number of tokens that follow a position: all of them, but for a first one without."""
        return max(0, self.size + self.lead - 1)

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """i64[documents]: the token behind each document."""
        parts = [p.ends + start for p, start in zip(self.pieces, self._starts, strict=False)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def document(self, positions: np.ndarray) -> np.ndarray:
        """The document that is read at each position; a last end begins none and is the last."""
        return np.searchsorted(self.ends, positions, side="right")

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Returns i32[n, length]: positions from each start on, 0 behind the last token.

        Raises:
          DataError: an id that the vocabulary does not have, with file and place.
        """
        rows = np.zeros((len(starts), length), np.int32)
        for row, start in zip(rows, starts.tolist(), strict=True):
            self._fill(row, start - self.lead)
        return rows

    def _fill(self, row: np.ndarray, at: int) -> None:
        if at < 0:
            row[0], row, at = self.end, row[1:], 0
        i = bisect.bisect_right(self._starts, at) - 1
        while len(row) and i < len(self.pieces):
            piece, first = self.pieces[i], at - self._starts[i]
            tokens = piece.tokens[first : first + len(row)]
            check_ids(piece, tokens, first, self.vocabulary)
            row[: len(tokens)] = tokens
            row, at, i = row[len(tokens) :], at + len(tokens), i + 1

    def split(self, share: float) -> tuple["Stream", "Stream"]:
        """Cuts off the last share of the tokens, at the nearest document where there are several.

        Raises:
          DataError: one of the parts is empty.
        """
        at = self.size - round(share * self.size)
        if len(self.ends) > 1:
            inner = self.ends[:-1]
            at = int(inner[np.abs(inner - at).argmin()])
        parts: tuple[list[Piece], list[Piece]] = ([], [])
        for piece, start in zip(self.pieces, self._starts, strict=False):
            both = piece.cut(min(max(at - start, 0), len(piece.tokens)))
            for part, one in zip(parts, both, strict=True):
                part += [one] if len(one.tokens) else []
        head, tail = (Stream(tuple(part), self.vocabulary, self.end) for part in parts)
        return head, tail

    def checksum(self) -> str:
        """Recognizes the tokens, wherever they lie: 8 hexadecimal digits."""
        each = [f"{p.checksum():08x} {len(p.tokens)} {p.tokens.dtype}" for p in self.pieces]
        return f"{zlib.crc32(' '.join(each).encode()):08x}"


def check_ids(piece: Piece, tokens: np.ndarray, first: int, vocabulary: int) -> None:
    """Refuses ids that a vocabulary does not have, naming the first of them.

    Args:
      piece: where they come from.
      tokens: some of its tokens.
      first: place of the first of these in the piece.
      vocabulary: every id is to be below.

    Raises:
      DataError: with file, place and id.
    """
    info = np.iinfo(tokens.dtype)
    if not tokens.size or (info.min == 0 and info.max < vocabulary):
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low >= 0 and high < vocabulary:
        return
    at = int(np.argmax((tokens < 0) | (tokens >= vocabulary)))
    place = piece.first + first + at
    why = f"token {place:,} is id {int(tokens[at])}; the vocabulary has {vocabulary} ids, from 0"
    fix = f"--set model.vocab={high + 1}" if low >= 0 else "tokens of an unsigned type"
    problem = Problem(piece.name, why, f"{fix}, or shards made with the model's tokenizer")
    raise DataError(format_problems("A token is not in the vocabulary.", [problem]))
