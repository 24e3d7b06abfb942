"""Safetensors files, read without trust: every number is checked before anything is mapped.

A file is the length of its header as u64, the header as JSON, and the bytes of all tensors, one
after another. Nothing in it is code, and a name in it never becomes a path.
"""

import dataclasses
import errno
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._core.errors import CheckpointError, Problem, count, did_you_mean, raise_all
from .._core.io._files import check_regular
from .._core.io._foreign import is_own, parse_json
from .._core.tree import short_type
from ..checkpoint._safetensors import DTYPES

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NAMES = {name: code for code, name in DTYPES.items()}
_METADATA = "__metadata__"
# The library's own limit. Llama-3-405B has a header of 100 KB.
_LARGEST_HEADER = 100_000_000
_COMPARED = 2**24
_LARGEST_JSON = 2**26  # an index of 100,000 tensors has 10 MB


class BadFile(Exception):
    """A file is not what it should be; the message says how."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file."""

    file: Path  # that has it
    offset: int  # of its first byte in the file
    shape: tuple[int, ...]  # its dims
    dtype: str  # name of its element type, as numpy and ml_dtypes call it

    @property
    def type(self) -> str:
        """Returns `f32[4096,1024]`."""
        return short_type(self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def map(self, mode: Any = "r") -> np.ndarray:
        """Maps the tensor, so that only the pages that are used are read or written.

        The mapping ends with the last view of it, and takes its pages out of the process.
        """
        dtype = jnp.dtype(self.dtype)
        if not self.nbytes:
            return np.zeros(self.shape, dtype)
        # As bytes: a tensor may start at any byte.
        raw = np.memmap(self.file, np.uint8, mode, self.offset, (self.nbytes,))
        return raw.view(dtype).reshape(self.shape)


def equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are the same bytes; they are compared a few at a time."""
    a, b = (x.map().reshape(-1).view(np.uint8) for x in (one, other))
    starts = range(0, one.nbytes, _COMPARED)
    return one.type == other.type and all(
        np.array_equal(a[at : at + _COMPARED], b[at : at + _COMPARED]) for at in starts
    )


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Reads the headers of all files of a folder: `{name: tensor}`.

    One CheckpointError says that several files have no index, that it names a path or a file that
    is absent, or that a file is truncated or not as it says.
    """
    weight_map, problems = read_index(folder), list[Problem]()
    tensors: dict[str, StoredTensor] = {}
    for name in dict.fromkeys(weight_map.values()) if weight_map else (SINGLE,):
        try:
            here = read_header(folder / name)
        except BadFile as error:
            problems.append(Problem(name, str(error)))
            continue
        if weight_map:
            problems += _index_problems(name, here, weight_map)
        tensors |= here
    fix = "download or export the folder again; sizes and names must be those of its index"
    raise_all(CheckpointError, f"{folder} cannot be read.", problems, fix)
    return tensors


def read_index(folder: Path) -> dict[str, str]:
    """Reads `{tensor: file}`; {} for a single file; raises CheckpointError if there is no index."""
    path, fix = folder / INDEX, f"a folder with {SINGLE}, or with {INDEX} and the files it names"
    why = ""
    if not folder.is_dir():
        why = "is not a folder"
    elif os.path.lexists(path):
        weight_map = load_json(path).get("weight_map")
        files = list(weight_map.values()) if isinstance(weight_map, dict) else []
        unsafe = dict.fromkeys(repr(name) for name in files if not _is_plain_name(name))
        problems = [Problem(f"{INDEX}: {name}", _UNSAFE) for name in unsafe]
        problems += [] if files else [Problem(INDEX, _NO_MAP)]
        if SINGLE not in files and os.path.lexists(folder / SINGLE):
            why = "is there beside the files of the index, and transformers reads it alone"
            problems.append(Problem(SINGLE, why, f"delete it, or {INDEX}"))
        raise_all(CheckpointError, f"{folder} cannot be read.", problems, fix)
        return dict(weight_map or {})
    elif not os.path.lexists(folder / SINGLE):
        names = sorted(p.name for p in folder.iterdir())
        shards = [name for name in names if name.endswith(".safetensors")]
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
        why = f"has no weights: neither {SINGLE} nor {INDEX}"
        if shards:
            why = f"has {count(len(shards), 'shard')} ({shards[0]} …) and no {INDEX}"
        elif pickles:
            why += f"; {pickles[0]} is a pickle, which can run code and is not read"
            fix = "model.save_pretrained(FOLDER) of transformers writes safetensors"
    problems = [Problem(str(folder), why)] if why else []
    raise_all(CheckpointError, "There is no checkpoint to read.", problems, fix)
    return {}


_NO_MAP = "has no weight_map from names of tensors to files"
_UNSAFE = "is not the name of a .safetensors file in the folder"


def _is_plain_name(name: Any) -> bool:
    plain = isinstance(name, str) and name.endswith(".safetensors") and "\0" not in name
    return plain and os.path.basename(name) == name and not name.startswith(".")


def _index_problems(
    file: str, here: Mapping[str, StoredTensor], weight_map: Mapping[str, str]
) -> list[Problem]:
    wanted = {name for name, f in weight_map.items() if f == file}
    problems = [
        Problem(file, f"lacks {name}, which the index says it has.{did_you_mean(name, here)}")
        for name in sorted(wanted - here.keys())
    ]
    return problems + [
        Problem(file, f"has {name}, which the index gives to {weight_map.get(name, 'no file')}")
        for name in sorted(here.keys() - wanted)
    ]


def load_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises CheckpointError if the file is absent, or not one."""
    try:
        value = parse_json(_read_regular(path, _LARGEST_JSON))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else f"is not JSON: {error}"
    else:
        if isinstance(value, dict):
            return value
        why = "is not a JSON object"
    problems = [Problem(path.name, f"{why}", "the file as save_pretrained wrote it")]
    raise_all(CheckpointError, f"{path.parent} cannot be read.", problems)
    raise AssertionError


def _check_own(path: Path) -> None:
    check_regular(path)
    if not is_own(path):
        raise OSError(
            errno.EXDEV, "is a link out of the folder; a copy of its target would be read"
        )


def _read_regular(path: Path, most: int) -> bytes:
    _check_own(path)
    if (size := path.stat().st_size) > most:
        raise OSError(errno.EFBIG, f"it has {size} bytes, and at most {most} are read", str(path))
    return path.read_bytes()


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Reads a file's header; raises BadFile if it is truncated, or not a safetensors file."""
    try:
        _check_own(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            if length > min(_LARGEST_HEADER, size - 8):
                why = f"has {size} bytes, and says that its header alone has {length}"
                raise BadFile(f"{why}; at most {_LARGEST_HEADER} are read")
            header = parse_json(file.read(length))
    except OSError as error:
        raise BadFile(f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadFile(f"has a header that is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise BadFile("has a header that is not an object")
    header.pop(_METADATA, None)
    tensors = {name: _parse_entry(path, name, entry) for name, entry in header.items()}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise BadFile(f"has {name} at byte {tensor.offset} of its data, not at {end}")
        end += tensor.nbytes
    if 8 + length + end != size:
        raise BadFile(f"has {size} bytes; its header describes {8 + length + end}")
    start = 8 + length
    return {n: dataclasses.replace(t, offset=t.offset + start) for n, t in tensors.items()}


def _parse_entry(path: Path, name: str, entry: Any) -> StoredTensor:
    """Returns a tensor whose offset counts from the first byte of the data."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise BadFile(f"has a header without dtype, shape or data_offsets of {name}") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadFile(f"has {name} in dtype {dtype!r}; known: {', '.join(DTYPES)}")
    numbers = [start, stop, *(shape if isinstance(shape, list) else [None])]
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise BadFile(f"has {name} with shape {shape!r} at {[start, stop]!r}")
    tensor = StoredTensor(path, start, tuple(shape), DTYPES[dtype])
    if tensor.nbytes != stop - start:
        raise BadFile(f"has {stop - start} bytes for {name}, {tensor.type} has {tensor.nbytes}")
    return tensor


def create_file(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Creates a file with its header, as `lay_out` returns it, and reserves room for its tensors.

    If the disk is full, it raises OSError before anything is mapped.
    """
    header, start = _render(tensors), min((t.offset for t in tensors.values()), default=8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, start + sum(t.nbytes for t in tensors.values()))


def lay_out(
    path: Path, types: Mapping[str, tuple[tuple[int, ...], str]]
) -> dict[str, StoredTensor]:
    """Places tensors `{name: (shape, dtype)}` one after another in a file."""
    placed, end = {}, 0
    for name, (shape, dtype) in types.items():
        placed[name] = StoredTensor(path, end, shape, dtype)
        end += placed[name].nbytes
    start = 8 + len(_render(placed))
    return {n: dataclasses.replace(t, offset=t.offset + start) for n, t in placed.items()}


def _render(tensors: Mapping[str, StoredTensor]) -> bytes:
    first = min((t.offset for t in tensors.values()), default=0)
    entries = {
        name: {
            "dtype": NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [t.offset - first, t.offset - first + t.nbytes],
        }
        for name, t in tensors.items()
    }
    # Transformers reads no file whose metadata does not name a framework.
    text = json.dumps({_METADATA: {"format": "pt"}, **entries}, separators=(",", ":"))
    return text.encode() + b" " * (-len(text.encode()) % 8)


def split_files(
    types: Mapping[str, tuple[tuple[int, ...], str]], largest: int
) -> Iterator[dict[str, tuple[tuple[int, ...], str]]]:
    """Yields tensors in files of at most `largest` bytes, but at least one tensor."""
    here: dict[str, tuple[tuple[int, ...], str]] = {}
    room = largest
    for name, (shape, dtype) in types.items():
        size = math.prod(shape) * jnp.dtype(dtype).itemsize
        if here and size > room:
            yield here
            here, room = {}, largest
        here[name] = (shape, dtype)
        room -= size
    yield here
