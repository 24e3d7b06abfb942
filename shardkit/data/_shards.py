"""Token shards: files of ids that are mapped into memory and read in place.

A `.npy` file is one document: a one-dimensional array of integers. A `.bin` file has many, and
says of itself what a reader must know. All numbers are little-endian:

| byte | type | field |
| --- | --- | --- |
| 0 | 8 bytes | magic, `SHARDTOK` |
| 8 | u32 | version of the format, 1 |
| 12 | u32 | bytes of one token, 1, 2 or 4; tokens are unsigned |
| 16 | u64 | vocabulary: every id is below it |
| 24 | u64 | tokens |
| 32 | u64 | documents |
| 40 | i64 | id that follows each document (counted among the tokens), or -1 |
| 48 | u32 | CRC-32 of bytes 0 to 47 |
| 52 | | zeros up to byte 64 |
| 64 | | the tokens, then zeros up to a multiple of 8 |
| then | u64[documents] | for each document the token behind it, rising; the last is all tokens |
"""

import dataclasses
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .._core.errors import DataError, Problem, count, format_problems, raise_all
from .._core.io._files import os_errors_as, write_atomic
from ._stream import Piece, Stream, check_ids

MAGIC, VERSION, HEADER = b"SHARDTOK", 1, 64
SUFFIXES = (".bin", ".npy")
_FIELDS = struct.Struct("<8sIIQQQq")
_TYPES = {1: "<u1", 2: "<u2", 4: "<u4"}
# Ids of more tokens than these are only looked at as they are read: a scan would take minutes.
_SCANNED, _AT_ONCE = 2**29, 2**24


class _Broken(Exception):
    """Why a file is no shard, and how to mend it."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What a `.bin` file says of itself.

    Attributes:
      itemsize: bytes of one token.
      vocabulary: every id is below it.
      tokens: number of tokens.
      documents: number of documents.
      end: id that follows each document, or -1.
    """

    itemsize: int
    vocabulary: int
    tokens: int
    documents: int
    end: int

    @property
    def ends_at(self) -> int:
        """Byte at which the ends of documents begin."""
        return HEADER + -(-self.tokens * self.itemsize // 8) * 8

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self.ends_at + 8 * self.documents

    def pack(self) -> bytes:
        """Returns the first 64 bytes of a file."""
        fields = _FIELDS.pack(MAGIC, VERSION, *dataclasses.astuple(self))
        return (fields + struct.pack("<I", zlib.crc32(fields))).ljust(HEADER, b"\0")

    @staticmethod
    def unpack(raw: bytes) -> "Header":
        """Reads what `pack` wrote."""
        if len(raw) < HEADER or raw[: len(MAGIC)] != MAGIC:
            raise _Broken(f"begins with {raw[:8]!r}, not with {MAGIC!r}: no token shard")
        _, version, *fields = _FIELDS.unpack(raw[: _FIELDS.size])
        if version > VERSION:
            raise _Broken(f"is of format {version}; this shardkit reads up to {VERSION}")
        (crc,) = struct.unpack_from("<I", raw, _FIELDS.size)
        if crc != zlib.crc32(raw[: _FIELDS.size]) or fields[0] not in _TYPES:
            raise _Broken("has a damaged header: its checksum does not fit")
        return Header(*fields)


def write_tokens(
    path: str | Path,
    documents: Iterable[Sequence[int] | np.ndarray],
    vocabulary: int,
    end: int | None = None,
) -> Path:
    """Writes documents as one `.bin` shard, which appears when it is whole.

    Args:
      path: of the file, ending in `.bin`.
      documents: ids of each; empty ones are left out. One at a time is held in memory.
      vocabulary: number of ids, at most 2³²; a token takes 1, 2 or 4 bytes accordingly.
      end: id to put behind each document.

    Returns:
      The path.

    Raises:
      DataError: an id outside of the vocabulary, no document at all, another suffix, or the file
        cannot be written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "shard.bin"
    >>> stream = open_shards([write_tokens(path, [[5, 6, 7], [8]], vocabulary=300, end=0)])
    >>> stream.size, stream.ends, stream.read(np.array([0, 4]), 3)
    (6, array([4, 6]), array([[0, 5, 6],
           [0, 8, 0]], dtype=int32))
    """
    path = Path(path)
    if path.suffix != ".bin":
        problem = Problem(str(path), "ends in no .bin", f'write_tokens("{path.stem}.bin", ...)')
        raise DataError(format_problems("The shard has no usable name.", [problem]))
    fix = "a folder with free space, and permission to write there"
    refusals = os_errors_as(DataError, "The shard cannot be written.", path, fix)
    with refusals, write_atomic(path) as part, open(part, "wb") as file:
        if not _write(file, documents, vocabulary, end):
            problem = Problem(str(path), "no document has a token", "at least one token")
            raise DataError(format_problems("The shard would be empty.", [problem]))
    return path


def _write(file: BinaryIO, documents: Iterable[Any], vocabulary: int, end: int | None) -> int:
    """Writes the tokens, then the ends, then the header; returns the number of tokens."""
    itemsize = next(size for size in _TYPES if vocabulary <= 2 ** (8 * size))
    tail = np.array([] if end is None else [end], np.int64)
    ends, total = [], 0
    file.seek(HEADER)
    for document in documents:
        if not len(document):
            continue
        ids = np.append(np.asarray(document, np.int64), tail)
        check_ids(Piece(f"document {len(ends)}", ids, ids), ids, 0, vocabulary)
        file.write(ids.astype(_TYPES[itemsize]).tobytes())
        total += len(ids)
        ends.append(total)
    header = Header(itemsize, vocabulary, total, len(ends), -1 if end is None else end)
    file.write(bytes(header.ends_at - file.tell()) + np.asarray(ends, "<u8").tobytes())
    file.seek(0)
    file.write(header.pack())
    return total


def open_shards(paths: Sequence[str | Path], vocabulary: int | None = None) -> Stream:
    """Opens token shards and checks all that can be known of them without training.

    Args:
      paths: `.bin` and `.npy` files, in the order in which they are to be read.
      vocabulary: ids that the model has; None: as many as the shards need.

    Returns:
      Their documents as one stream; tokens stay on disk until they are read.

    Raises:
      DataError: a file that is truncated, damaged, newer, no shard at all, of a larger
        vocabulary than the model's, or with an id past it; all of them in one message.
    """
    pieces, headers, problems = [], [], []
    for path in map(Path, paths):
        try:
            piece, header = _open(path)
        except (_Broken, OSError) as error:
            why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            problems.append(Problem(str(path), f"{why}.", _MEND))
            continue
        pieces.append(piece)
        headers.append(header)
        problems += _misfits(piece.name, header, headers[0], vocabulary)
    n = count(len(problems), "token shard")
    raise_all(DataError, f"{n} cannot be used.", problems)
    sizes = [h.vocabulary for h in headers if h] or [0]
    limit = vocabulary or max(sizes)
    room, largest = _SCANNED, 0
    for piece, header in zip(pieces, headers, strict=True):
        own = min(limit, header.vocabulary) if header else limit
        largest = max(largest, _scan(piece, own or 2**31, room))
        room -= len(piece.tokens)
    end = headers[0].end if headers and headers[0] and headers[0].end >= 0 else None
    return Stream(tuple(pieces), limit or largest + 1, end)


_MEND = "write it again with sk.data.write_tokens, or --set data.path=OTHER_SHARDS"


def _misfits(
    name: str, header: Header | None, first: Header | None, vocabulary: int | None
) -> list[Problem]:
    """What keeps a whole shard from being read with this model, or with the shards before it."""
    own, other = (h.end if h else -1 for h in (header, first))
    problems = []
    if own != other:
        said = [f"{n} follows" if n >= 0 else "nothing follows" for n in (own, other)]
        why = f"{said[0]} its documents, and {said[1]} those of the first shard."
        problems.append(Problem(name, why, _MEND))
    if header and vocabulary is not None and header.vocabulary > vocabulary:
        why = f"has a vocabulary of {header.vocabulary} ids, the model one of {vocabulary}."
        fix = f"--set model.vocab={header.vocabulary}"
        problems.append(Problem(name, why, fix))
    return problems


def _scan(piece: Piece, limit: int, room: int) -> int:
    """Checks the ids of a piece as far as there is time; returns the largest."""
    largest = 0
    for at in range(0, min(len(piece.tokens), max(room, 0)), _AT_ONCE):
        tokens = piece.tokens[at : at + _AT_ONCE]
        check_ids(piece, tokens, at, limit)
        largest = max(largest, int(tokens.max()))
    return largest


def _open(path: Path) -> tuple[Piece, Header | None]:
    return _open_bin(path) if path.suffix == ".bin" else (_open_npy(path), None)


def _open_bin(path: Path) -> tuple[Piece, Header]:
    with open(path, "rb") as file:
        header = Header.unpack(file.read(HEADER))
    size = path.stat().st_size
    if size < header.nbytes:
        held = max(0, size - HEADER) // header.itemsize
        raise _Broken(
            f"is truncated: its header says {header.tokens:,} tokens in {header.documents:,} "
            f"documents, {header.nbytes:,} bytes; it has {size:,}, "
            f"of at most {min(held, header.tokens):,} tokens"
        )
    if size > header.nbytes:
        raise _Broken(f"has {size:,} bytes, and its header says {header.nbytes:,}")
    if not header.tokens or not header.documents:
        raise _Broken("holds no tokens")
    tokens = np.memmap(path, _TYPES[header.itemsize], "r", HEADER, (header.tokens,))
    ends = np.fromfile(path, "<u8", header.documents, offset=header.ends_at).astype(np.int64)
    if ends[-1] != header.tokens or not (np.diff(ends, prepend=0) > 0).all():
        raise _Broken("has ends of documents that do not rise to its number of tokens")
    return Piece(str(path), np.asarray(tokens), ends), header


def _open_npy(path: Path) -> Piece:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _Broken(f"is truncated, or no .npy file of numbers: {error}") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not tokens.size:
        shape = ",".join(map(str, tokens.shape))
        raise _Broken(f"is {tokens.dtype}[{shape}], not a row of integers")
    return Piece(str(path), np.asarray(tokens), np.array([len(tokens)]))
