"""The files of one leaf: zarr's format 2, with plain chunks in row-major order.

So a damaged file belongs to one named leaf, and any zarr reader can open the folder. The chunks
form a regular grid whose lines every boundary between shards lies on: each chunk is written by one
process. An example: a leaf [8, 4] of two shards [4, 4], in chunks of two rows.

    0.0   rows 0 1     the first shard
    1.0   rows 2 3
    2.0   rows 4 5     the second
    3.0   rows 6 7
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

HEADER = ".zarray"
# Chunks are read whole. A shard that was saved under another sharding overlaps chunks partly, so
# small chunks waste less reading; but every chunk is a file, so there must not be too many.
_CHUNK_BYTES, _MAX_CHUNKS = 2**22, 2**14

# Start and stop along each dim.
Box = tuple[tuple[int, int], ...]


def choose_chunk_bytes(total_bytes: int) -> int:
    """Returns how large chunks of a state are to be, in bytes."""
    return max(_CHUNK_BYTES, total_bytes // _MAX_CHUNKS)


def choose_chunk(shard: Sequence[int], itemsize: int, wanted: int) -> tuple[int, ...]:
    """Returns the shape of the chunks of shards, which it divides: about `wanted` bytes.

    The first dims are cut first, so that a chunk is one run of bytes. A dim whose divisors are
    far from what is wanted is cut into fewer parts.

    >>> choose_chunk((24, 1024), 4, wanted=2**14), choose_chunk((7919, 6), 4, wanted=2**14)
    ((4, 1024), (7919, 1))
    """
    chunk = list(shard)
    for dim, n in enumerate(shard):
        if math.prod(chunk) * itemsize <= 2 * wanted:
            break
        parts = -(-math.prod(chunk) * itemsize // wanted)
        more = (p for p in range(parts, min(n, 8 * parts) + 1) if n % p == 0)
        fewer = (p for p in range(min(n, parts), 0, -1) if n % p == 0)
        chunk[dim] = n // next(itertools.chain(more, fewer))
    return tuple(chunk)


def format_header(shape: Sequence[int], dtype: np.dtype, chunk: Sequence[int]) -> bytes:
    """Returns the file that describes a leaf."""
    fields = {
        "zarr_format": 2,
        "shape": list(shape),
        "chunks": list(chunk),
        # The small types of `ml_dtypes` have no letter in NumPy, but a name.
        "dtype": dtype.str if dtype.isbuiltin == 1 else dtype.name,
        "order": "C",
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "dimension_separator": ".",
    }
    return json.dumps(fields, indent=1).encode()


def parse_header(header: bytes, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the shape of a leaf's chunks; None if the header is not one of this leaf."""
    try:
        fields = json.loads(header)
        chunk, described = tuple(fields["chunks"]), tuple(fields["shape"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    positive = all(isinstance(size, int) and size > 0 for size in chunk)
    return chunk if positive and len(chunk) == len(shape) and described == shape else None


def chunk_name(leaf: str, at: tuple[int, ...]) -> str:
    """Returns the file of the chunk at coordinates of the grid."""
    return f"{leaf}/{'.'.join(map(str, at)) or '0'}"


def box_of_index(index: Sequence[slice] | None, shape: tuple[int, ...]) -> Box:
    """Returns the box of a shard; the index of a scalar is None on some devices."""
    return tuple(dim.indices(size)[:2] for dim, size in zip(index or (), shape, strict=True))


def chunks_of(box: Box, chunk: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Returns the coordinates of the chunks that a box overlaps."""
    return itertools.product(
        *(
            range(start // size, -(-stop // size))
            for (start, stop), size in zip(box, chunk, strict=True)
        )
    )


def overlaps(
    at: tuple[int, ...], chunk: tuple[int, ...], shards: Mapping[Box, np.ndarray]
) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Yields what of a chunk lies in each shard, and its place there.

    Chunks at the end of a dim may be padded.
    """
    origin = [i * size for i, size in zip(at, chunk, strict=True)]
    for box, shard in shards.items():
        source, target = [], []
        for first, size, (start, stop) in zip(origin, chunk, box, strict=True):
            low, high = max(first, start), min(first + size, stop)
            if low >= high:
                break
            source.append(slice(low - first, high - first))
            target.append(slice(low - start, high - start))
        else:
            # With `...` an element is a view of its place too.
            yield tuple(source), shard[(*target, ...)]


def bytes_of(array: np.ndarray) -> memoryview:
    """Returns the memory of a contiguous array."""
    # NumPy has no buffer protocol for the small types of `ml_dtypes`.
    return array.reshape(-1).view(np.uint8).data


def describe_holders(sharding: Any, shape: tuple[int, ...], element: Sequence[int]) -> str:
    """Returns the processes that hold an element: `process 0 or process 1`."""
    processes = {
        device.process_index
        for device, index in sharding.devices_indices_map(shape).items()
        if all(
            start <= at < stop
            for at, (start, stop) in zip(element, box_of_index(index, shape), strict=True)
        )
    }
    return " or ".join(f"process {process}" for process in sorted(processes))
