"""Token shards: files of token ids that stay on disk until they are read.

A `.npy` file is one document: a one-dimensional array of integers. A `.bin` file holds many
documents and describes itself. All numbers are little-endian:

| byte | type | field |
| --- | --- | --- |
| 0 | 8 bytes | magic, `SHARDTOK` |
| 8 | u32 | version of the format, 2; version 1 has no checksums of blocks |
| 12 | u32 | bytes of one token, 1, 2 or 4; tokens are unsigned |
| 16 | u64 | vocabulary: every id is below it |
| 24 | u64 | tokens |
| 32 | u64 | documents |
| 40 | i64 | id that follows each document (counted among the tokens), or -1 |
| 48 | u32 | CRC-32 of bytes 0 to 47 |
| 52 | u32 | CRC-32 of the checksums of blocks |
| 56 | | zeros up to byte 64 |
| 64 | | the tokens, then zeros up to a multiple of 8 |
| then | u64[documents] | for each document the index of the token behind it, ascending |
| then | u32[blocks] | CRC-32 of every 64 KiB from byte 64 to here |
"""

import dataclasses
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .._core.errors import DataError, Problem, count, format_problems, raise_all
from .._core.io._files import check_regular, local_path, os_errors_as, write_atomic
from ._file_tokens import FileTokens
from ._stream import Stream, TokenFile, check_ids

MAGIC, VERSION, HEADER = b"SHARDTOK", 2, 64
# Bytes with a checksum of their own, and how many such blocks are compared when a shard is opened.
_CHECKED_BLOCK, _SAMPLE = 2**16, 16
SUFFIXES = (".bin", ".npy")
_FIELDS = struct.Struct("<8sIIQQQq")
_DTYPES = {1: "<u1", 2: "<u2", 4: "<u4"}
# Ids beyond so many tokens are checked when they are read: checking them all would take minutes.
_MAX_CHECKED, _BLOCK_TOKENS = 2**29, 2**24


class _InvalidShard(Exception):
    """A file is not a shard; the message says why."""


@dataclasses.dataclass(frozen=True)
class ShardHeader:
    """The first 64 bytes of a `.bin` file."""

    itemsize: int  # bytes of one token
    vocabulary: int  # every id is below it
    tokens: int  # number of tokens
    documents: int  # number of documents
    end: int  # id that follows each document, or -1
    checksum: int | None = None  # CRC-32 of the checksums of blocks; None in files that have none

    @property
    def ends_at(self) -> int:
        """Byte at which the ends of documents begin."""
        return HEADER + -(-self.tokens * self.itemsize // 8) * 8

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self.blocks_at + (0 if self.checksum is None else 4 * self.blocks)

    @property
    def blocks_at(self) -> int:
        """Byte at which the checksums of blocks begin."""
        return self.ends_at + 8 * self.documents

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-(self.blocks_at - HEADER) // _CHECKED_BLOCK)

    def pack(self) -> bytes:
        """Returns the 64 bytes."""
        *values, checksum = dataclasses.astuple(self)
        fields = _FIELDS.pack(MAGIC, VERSION, *values)
        return (fields + struct.pack("<II", zlib.crc32(fields), checksum)).ljust(HEADER, b"\0")

    @staticmethod
    def unpack(raw: bytes) -> "ShardHeader":
        """Reads what `pack` wrote."""
        if len(raw) < HEADER or raw[: len(MAGIC)] != MAGIC:
            raise _InvalidShard(f"begins with {raw[:8]!r}, not with {MAGIC!r}: not a token shard")
        _, version, *fields = _FIELDS.unpack(raw[: _FIELDS.size])
        if version > VERSION:
            raise _InvalidShard(f"has format {version}; this shardkit reads up to {VERSION}")
        crc, checksum = struct.unpack_from("<II", raw, _FIELDS.size)
        if crc != zlib.crc32(raw[: _FIELDS.size]) or fields[0] not in _DTYPES:
            raise _InvalidShard("has a damaged header: its checksum does not match")
        return ShardHeader(*fields, checksum=None if version == 1 else checksum)


def write_tokens(
    path: str | Path,
    documents: Iterable[Sequence[int] | np.ndarray],
    vocabulary: int,
    end: int | None = None,
) -> Path:
    """Writes documents as one `.bin` shard; the file appears when it is complete.

    Args:
      path: of the file, ending in `.bin`.
      documents: token ids of each document; empty ones are skipped. One is in memory at a time.
      vocabulary: number of ids, at most 2³²; a token takes 1, 2 or 4 bytes accordingly.
      end: id to append to each document.

    Returns:
      The path.

    Raises:
      DataError: an id is not in the vocabulary, there is no document, the suffix is not `.bin`, or
        the file cannot be written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "shard.bin"
    >>> stream = open_shards([write_tokens(path, [[5, 6, 7], [8]], vocabulary=300, end=0)])
    >>> stream.size, stream.ends, stream.read(np.array([0, 4]), 3)
    (6, array([4, 6]), array([[0, 5, 6],
           [0, 8, 0]], dtype=int32))
    """
    path = local_path(path, DataError)
    if path.suffix != ".bin":
        problem = Problem(str(path), "does not end in .bin", f'write_tokens("{path.stem}.bin", …)')
        raise DataError(format_problems("The shard's name is not usable.", [problem]))
    fix = "a folder with free space, and permission to write there"
    errors = os_errors_as(DataError, "The shard cannot be written.", path, fix)
    with errors, write_atomic(path) as temporary, open(temporary, "w+b") as file:
        if not _write_shard(file, documents, vocabulary, end):
            why = "no document has a token"
            raise DataError.of("The shard would be empty.", str(path), why, "at least one token")
    return path


def _write_shard(file: BinaryIO, documents: Iterable[Any], vocabulary: int, end: int | None) -> int:
    """Writes the tokens, then the ends, then the header; returns the number of tokens."""
    itemsize = next(size for size in _DTYPES if vocabulary <= 2 ** (8 * size))
    tail = np.array([] if end is None else [end], np.int64)
    ends, total = [], 0
    file.seek(HEADER)
    for document in documents:
        if not len(document):
            continue
        ids = np.append(np.asarray(document, np.int64), tail)
        check_ids(TokenFile(f"document {len(ends)}", ids, ids), ids, 0, vocabulary)
        file.write(ids.astype(_DTYPES[itemsize]).tobytes())
        total += len(ids)
        ends.append(total)
    header = ShardHeader(itemsize, vocabulary, total, len(ends), -1 if end is None else end)
    file.write(bytes(header.ends_at - file.tell()) + np.asarray(ends, "<u8").tobytes())
    table = np.array([_block_checksum(file, header, i) for i in range(header.blocks)], "<u4")
    file.seek(header.blocks_at)
    file.write(table.tobytes())
    file.seek(0)
    file.write(dataclasses.replace(header, checksum=zlib.crc32(table.tobytes())).pack())
    return total


def _block_checksum(file: BinaryIO, header: ShardHeader, block: int) -> int:
    start = HEADER + block * _CHECKED_BLOCK
    file.seek(start)
    return zlib.crc32(file.read(min(_CHECKED_BLOCK, header.blocks_at - start)))


def _check_blocks(file: BinaryIO, header: ShardHeader, most: int | None = None) -> None:
    """Compares checksums of all blocks, or of so many that are evenly spaced."""
    file.seek(header.blocks_at)
    table = file.read(4 * header.blocks)
    if zlib.crc32(table) != header.checksum:
        raise _InvalidShard("is damaged: the checksums of its blocks have another checksum")
    chosen = np.linspace(0, header.blocks - 1, most or header.blocks, dtype=np.int64)
    for block in dict.fromkeys(chosen.tolist()):
        if _block_checksum(file, header, block) != np.frombuffer(table, "<u4")[block]:
            start = HEADER + block * _CHECKED_BLOCK
            stop = min(start + _CHECKED_BLOCK, header.blocks_at)
            raise _InvalidShard(f"is damaged: bytes {start:,} to {stop:,} are not what was written")


def verify_shards(paths: Sequence[str | Path]) -> None:
    """Reads token shards completely, and compares every byte with its checksum.

    Args:
      paths: `.bin` files. `open_shards` compares a sample of their blocks.

    Raises:
      DataError: naming every file that is damaged, or has no checksums: `.npy`, and format 1.
    """
    problems = []
    for path in (local_path(path, DataError) for path in paths):
        try:
            header = _open_shard(path)[1]
            if header is None or header.checksum is None:
                form = "it is of format 1" if header else "only .bin files have them"
                raise _InvalidShard(f"has no checksums: {form}")
            with open(path, "rb") as file:
                _check_blocks(file, header)
        except (_InvalidShard, OSError) as error:
            problems.append(_unusable(path, error))
    _raise_unusable(problems)


def open_shards(paths: Sequence[str | Path], vocabulary: int | None = None) -> Stream:
    """Opens token shards, and checks them as far as possible without reading all of them.

    Args:
      paths: `.bin` and `.npy` files, in the order in which they are read.
      vocabulary: number of ids of the model; None for as many as the shards need.

    Returns:
      Their documents as one stream; tokens stay on disk until they are read.

    Raises:
      DataError: files that are truncated, damaged, of a newer format or not shards, or that have
        ids which the model lacks; all of them in one message.
    """
    files, headers, problems = [], [], []
    for path in (local_path(path, DataError) for path in paths):
        try:
            file, header = _open_shard(path)
        except (_InvalidShard, OSError) as error:
            problems.append(_unusable(path, error))
            continue
        files.append(file)
        headers.append(header)
        problems += _mismatches(file.name, header, headers[0], vocabulary)
    _raise_unusable(problems)
    limit = vocabulary or max([header.vocabulary for header in headers if header], default=0)
    unchecked, largest = _MAX_CHECKED, 0
    for file, header in zip(files, headers, strict=True):
        own_limit = min(limit, header.vocabulary) if header else limit
        largest = max(largest, _check_leading_ids(file, own_limit or 2**31, unchecked))
        unchecked -= len(file.tokens)
    end = headers[0].end if headers and headers[0] and headers[0].end >= 0 else None
    return Stream(tuple(files), limit or largest + 1, end)


_FIX = "write it again with sk.data.write_tokens, or --set data.path=OTHER_SHARDS"


def _unusable(path: Path, error: Exception) -> Problem:
    why = getattr(error, "strerror", None) or str(error)
    return Problem(str(path), f"{why}.", _FIX)


def _raise_unusable(problems: Sequence[Problem]) -> None:
    raise_all(DataError, f"{count(len(problems), 'token shard')} cannot be used.", problems)


def _mismatches(
    name: str, header: ShardHeader | None, first: ShardHeader | None, vocabulary: int | None
) -> list[Problem]:
    """Lists where a valid shard does not fit the model or the first shard."""
    ends = [h.end if h else -1 for h in (header, first)]
    problems = []
    if ends[0] != ends[1]:
        this, other = (f"{n} follows" if n >= 0 else "nothing follows" for n in ends)
        why = f"{this} its documents, and {other} those of the first shard."
        problems.append(Problem(name, why, _FIX))
    if header and vocabulary is not None and header.vocabulary > vocabulary:
        why = f"has a vocabulary of {header.vocabulary} ids; the model has {vocabulary}."
        fix = f"--set model.vocab={header.vocabulary}"
        problems.append(Problem(name, why, fix))
    return problems


def _check_leading_ids(file: TokenFile, limit: int, n: int) -> int:
    """Checks that the first `n` ids of a file are below a limit; returns the largest."""
    largest = 0
    for at in range(0, min(len(file.tokens), max(n, 0)), _BLOCK_TOKENS):
        tokens = file.tokens[at : at + _BLOCK_TOKENS]
        check_ids(file, tokens, at, limit)
        largest = max(largest, int(tokens.max()))
    return largest


def _open_shard(path: Path) -> tuple[TokenFile, ShardHeader | None]:
    return _open_bin(path) if path.suffix == ".bin" else (_open_npy(path), None)


def _open_bin(path: Path) -> tuple[TokenFile, ShardHeader]:
    check_regular(path)
    with open(path, "rb") as file:
        header = ShardHeader.unpack(file.read(HEADER))
    size = path.stat().st_size
    if size < header.nbytes:
        present = max(0, size - HEADER) // header.itemsize
        raise _InvalidShard(
            f"is truncated: its header declares {header.tokens:,} tokens in {header.documents:,} "
            f"documents, {header.nbytes:,} bytes; it has {size:,} bytes, "
            f"at most {min(present, header.tokens):,} tokens"
        )
    if size > header.nbytes:
        raise _InvalidShard(f"has {size:,} bytes; its header declares {header.nbytes:,}")
    if not header.tokens or not header.documents:
        raise _InvalidShard("holds no tokens")
    if header.checksum is not None:
        with open(path, "rb") as file:
            _check_blocks(file, header, _SAMPLE)
    tokens = FileTokens(path, np.dtype(_DTYPES[header.itemsize]), HEADER, header.tokens)
    ends = np.fromfile(path, "<u8", header.documents, offset=header.ends_at).astype(np.int64)
    if ends[-1] != header.tokens or not (np.diff(ends, prepend=0) > 0).all():
        raise _InvalidShard("has document ends that do not ascend to its number of tokens")
    return TokenFile(str(path), tokens, ends), header


def _open_npy(path: Path) -> TokenFile:
    check_regular(path)
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _InvalidShard(f"is truncated, or not a .npy file of numbers: {error}") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not tokens.size:
        shape = ",".join(map(str, tokens.shape))
        raise _InvalidShard(f"is {tokens.dtype}[{shape}], not one-dimensional integers")
    in_file = FileTokens(path, tokens.dtype, tokens.offset, len(tokens))
    return TokenFile(str(path), in_file, np.array([len(tokens)]))
