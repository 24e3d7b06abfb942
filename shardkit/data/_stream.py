"""`Stream`: the tokens of documents, one after another, in memory or on disk."""

import bisect
import dataclasses
import functools
import itertools
import zlib

import numpy as np

from .._core.errors import DataError
from ._file_tokens import FileTokens

# Larger files have a checksum of this many blocks, evenly spaced.
_MAX_FULL_CHECKSUM, _BLOCKS, _BLOCK = 2**26, 64, 2**16


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFile:
    """The tokens of a file, or a range of them."""

    name: str  # of the file, for errors
    # integers[n], in memory or in the file
    tokens: np.ndarray | FileTokens = dataclasses.field(repr=False)
    # i64[documents], the index behind each document; the last is n
    ends: np.ndarray = dataclasses.field(repr=False)
    first: int = 0  # index of token 0 in the file

    def cut(self, at: int) -> tuple["TokenFile", "TokenFile"]:
        """Returns the tokens before an index and those from it on; either may be empty."""
        before, after = self.ends[self.ends <= at], self.ends[self.ends > at] - at
        if not len(before) or before[-1] < at:
            before = np.append(before, at)
        head = TokenFile(self.name, self._range(0, at), before, self.first)
        tail = self._range(at, len(self.tokens))
        return head, TokenFile(self.name, tail, after, self.first + at)

    def _range(self, start: int, stop: int) -> np.ndarray | FileTokens:
        if isinstance(self.tokens, FileTokens):
            return self.tokens.cut(start, stop)
        return self.tokens[start:stop]

    def _read_bytes(self, start: int, n: int) -> bytes:
        if isinstance(self.tokens, FileTokens):
            return self.tokens.read_bytes(start, n)
        return self.tokens.view(np.uint8)[start : start + n].tobytes()

    def checksum(self) -> int:
        """Returns the CRC-32 of the tokens, or of a sample if they take more than 64 MiB."""
        size = self.tokens.nbytes
        if size <= _MAX_FULL_CHECKSUM:
            return zlib.crc32(self._read_bytes(0, size))
        crc = zlib.crc32(str(size).encode())
        for at in np.linspace(0, size - _BLOCK, _BLOCKS, dtype=np.int64).tolist():
            crc = zlib.crc32(self._read_bytes(at, _BLOCK), crc)
        return crc


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Documents one after another.

    If an `end` id follows each document, one also precedes the first, so that the first token is
    predicted too. Positions then count from that id. For documents `a b` and `c` with end `.`:

        without end    a b c         position 0 is token 0
        with end     . a b . c .     position 0 is the leading end, position 1 is token 0
    """

    files: tuple[TokenFile, ...]  # the tokens
    vocabulary: int  # every id is smaller
    end: int | None = None  # id that follows each document; None for none

    @functools.cached_property
    def _starts(self) -> list[int]:
        return list(itertools.accumulate((len(p.tokens) for p in self.files), initial=0))

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self._starts[-1]

    @property
    def lead(self) -> int:
        """Positions before the first token: 1 with an `end` id, else 0."""
        return 0 if self.end is None else 1

    @property
    def predicted(self) -> int:
        """Number of tokens that can be predicted: all, or without an `end` id all but the first."""
        return max(0, self.size + self.lead - 1)

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """i64[documents]: the index behind each document."""
        parts = [p.ends + start for p, start in zip(self.files, self._starts, strict=False)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def document_at(self, positions: np.ndarray) -> np.ndarray:
        """Returns the index of the document at each position.

        An end id counts as the start of the document behind it.
        """
        return np.searchsorted(self.ends, positions, side="right")

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Returns i32[n, length]: the tokens from each start on, 0 behind the last one.

        Raises:
          DataError: an id is not in the vocabulary; names file and index.
        """
        rows = np.zeros((len(starts), length), np.int32)
        for row, start in zip(rows, starts.tolist(), strict=True):
            self._fill(row, start - self.lead)
        return rows

    def _fill(self, row: np.ndarray, at: int) -> None:
        if at < 0:
            row[0], row, at = self.end, row[1:], 0
        i = bisect.bisect_right(self._starts, at) - 1
        while len(row) and i < len(self.files):
            file, first = self.files[i], at - self._starts[i]
            tokens = file.tokens[first : first + len(row)]
            check_ids(file, tokens, first, self.vocabulary)
            row[: len(tokens)] = tokens
            row, at, i = row[len(tokens) :], at + len(tokens), i + 1

    def split(self, fraction: float) -> tuple["Stream", "Stream"]:
        """Cuts off the last fraction of the tokens; of several documents none is cut in two."""
        at = self.size - round(fraction * self.size)
        if len(self.ends) > 1:
            inner = self.ends[:-1]
            at = int(inner[np.abs(inner - at).argmin()])
        parts: tuple[list[TokenFile], list[TokenFile]] = ([], [])
        for file, start in zip(self.files, self._starts, strict=False):
            halves = file.cut(min(max(at - start, 0), len(file.tokens)))
            for part, half in zip(parts, halves, strict=True):
                part += [half] if len(half.tokens) else []
        head, tail = (Stream(tuple(part), self.vocabulary, self.end) for part in parts)
        return head, tail

    def checksum(self) -> str:
        """Returns 8 hexadecimal digits that depend on the tokens alone, not on their paths."""
        sums = [f"{f.checksum():08x} {len(f.tokens)} {f.tokens.dtype}" for f in self.files]
        return f"{zlib.crc32(' '.join(sums).encode()):08x}"


def check_ids(file: TokenFile, tokens: np.ndarray, first: int, vocabulary: int) -> None:
    """Raises DataError with file, index and id of the first token that is not in a vocabulary.

    The `tokens` are some of the file's, from index `first`; each id must be smaller than
    `vocabulary`.
    """
    info = np.iinfo(tokens.dtype)
    if not tokens.size or (info.min == 0 and info.max < vocabulary):
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low >= 0 and high < vocabulary:
        return
    at = int(np.argmax((tokens < 0) | (tokens >= vocabulary)))
    place = file.first + first + at
    why = f"token {place:,} is id {int(tokens[at])}; the vocabulary has {vocabulary} ids, from 0"
    fix = f"--set model.vocab={high + 1}" if low >= 0 else "tokens of an unsigned type"
    fix = f"{fix}, or shards made with the model's tokenizer"
    raise DataError.of("A token is not in the vocabulary.", file.name, why, fix)
