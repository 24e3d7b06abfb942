"""Reads the arrays of a saved step chunk by chunk onto any devices, and checks every chunk.

A leaf is a folder of plain zarr chunks. Each chunk that overlaps a shard of this process is read,
compared with its CRC-32 and copied into the shard. So every byte that is used is checked, chunks
of other processes' shards are not read, and besides the state the host needs memory for the
shards of a few leaves at a time.

An example: a leaf [6, 4] in chunks of [4, 4], restored to two devices that hold rows 0:3 and 3:6.

    chunk 0   rows 0 1 2 | 3      device 0 takes rows 0:3 of chunk 0
    chunk 1   rows         4 5    device 1 takes row 3 of chunk 0 and rows 0:2 of chunk 1
"""

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ._files import UnreadableFile, read_checked
from ._manifest import SavedFile

# Bytes of shards that are assembled from chunks at once; a single shard may be larger.
_GROUP_BYTES = 2**27
_THREADS = 4

# Start and stop along each dim.
Box = tuple[tuple[int, int], ...]


def read_leaves(
    folder: Path, files: Mapping[str, SavedFile], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """Reads leaves; each device gets its shards only.

    Args:
      folder: of the step.
      files: its files, as they were written.
      wanted: `{folder of the leaf below that of the step: shape, dtype and sharding}`.

    Returns:
      `{folder of the leaf: array}`, and `{file: what is wrong with it}`; a leaf with a damaged
      file is not among the arrays.
    """

    def read_leaf(name: str) -> tuple[jax.Array | None, dict[str, str]]:
        return _read_leaf(folder, files, name, wanted[name])

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        results = dict(zip(wanted, pool.map(read_leaf, wanted), strict=True))
    arrays = {leaf: array for leaf, (array, _) in results.items() if array is not None}
    return arrays, {name: why for _, wrong in results.values() for name, why in wrong.items()}


def find_missing(
    folder: Path, expected: Mapping[str, jax.ShapeDtypeStruct], files: Mapping[str, SavedFile]
) -> dict[str, str]:
    """Compares the files of a step with the leaves that were to be written.

    Args:
      folder: of the step.
      expected: `{folder of the leaf below that of the step: shape, dtype and sharding}`.
      files: those that are there.

    Returns:
      `{file: why it is missing}`; files that are too short among them.
    """
    missing = {}
    for leaf, x in expected.items():
        header = f"{leaf}/.zarray"
        chunk = _chunk_shape((folder / header).read_bytes(), x.shape) if header in files else None
        if chunk is None:
            missing[header] = "was not written"
            continue
        size = math.prod(chunk) * x.dtype.itemsize
        for at in _chunks_of(tuple((0, n) for n in x.shape), chunk):
            name = _chunk_name(leaf, at)
            if name not in files or files[name].bytes != size:
                missing[name] = f"was not written by {_describe_writers(x, at, chunk)}"
    return missing


def _describe_writers(x: jax.ShapeDtypeStruct, at: tuple[int, ...], chunk: tuple[int, ...]) -> str:
    """Returns the processes that hold a chunk."""
    assert x.sharding is not None
    origin = [i * size for i, size in zip(at, chunk, strict=True)]
    holders = {
        device.process_index
        for device, index in x.sharding.devices_indices_map(x.shape).items()
        if all(
            start <= first < stop
            for first, (start, stop) in zip(
                origin, _box_of_index(index or (), x.shape), strict=True
            )
        )
    }
    return " or ".join(f"process {process}" for process in sorted(holders))


def _chunk_name(leaf: str, at: tuple[int, ...]) -> str:
    return f"{leaf}/{'.'.join(map(str, at)) or '0'}"


def _read_leaf(
    folder: Path, files: Mapping[str, SavedFile], leaf: str, wanted: jax.ShapeDtypeStruct
) -> tuple[jax.Array | None, dict[str, str]]:
    wrong: dict[str, str] = {}

    def read_file(name: str, into: memoryview | None = None) -> memoryview | None:
        try:
            return read_checked(folder, name, files, into)
        except UnreadableFile as error:
            wrong[name] = str(error)
            return None

    header = read_file(f"{leaf}/.zarray")
    if header is None:
        return None, wrong
    chunk = _chunk_shape(bytes(header), wanted.shape)
    if chunk is None:
        return None, {f"{leaf}/.zarray": "is not the header of this leaf"}
    buffer = np.empty(chunk, wanted.dtype)
    chunk_bytes = buffer.nbytes
    sharding = wanted.sharding
    assert sharding is not None
    devices: dict[Box, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(wanted.shape).items():
        devices.setdefault(_box_of_index(index or (), wanted.shape), []).append(device)
    on_devices = []
    for group in _group_boxes(list(devices), wanted.dtype.itemsize):
        shards = {
            box: np.empty([stop - start for start, stop in box], wanted.dtype) for box in group
        }
        for at in {at for box in group for at in _chunks_of(box, chunk)}:
            name, parts = _chunk_name(leaf, at), list(_overlaps(at, chunk, shards))
            if name in files and files[name].bytes != chunk_bytes:
                why = f"has {files[name].bytes} bytes, a chunk of this leaf has {chunk_bytes}"
                wrong[name] = why
                continue
            (_, first), *others = parts
            # A chunk that is one piece of one shard is read into its place.
            if not others and first.nbytes == chunk_bytes and first.flags.c_contiguous:
                read_file(name, _bytes_of(first))
            elif read_file(name, _bytes_of(buffer)) is not None:
                for source, target in parts:
                    target[...] = buffer[source]
        if not wrong:
            on_devices += [
                jax.device_put(shard, device)
                for box, shard in shards.items()
                for device in devices[box]
            ]
    if wrong:
        return None, wrong
    return jax.make_array_from_single_device_arrays(wanted.shape, sharding, on_devices), wrong


def _chunk_shape(header: bytes, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the shape of a leaf's chunks; None if the header is not one of this leaf."""
    try:
        fields = json.loads(header)
        chunk, described = tuple(fields["chunks"]), tuple(fields["shape"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    positive = all(isinstance(size, int) and size > 0 for size in chunk)
    return chunk if positive and len(chunk) == len(shape) and described == shape else None


def _box_of_index(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(dim.indices(size)[:2] for dim, size in zip(index, shape, strict=True))


def _group_boxes(boxes: Sequence[Box], itemsize: int) -> Iterator[list[Box]]:
    """Yields boxes in order, in groups of at most `_GROUP_BYTES` but at least one box."""
    group: list[Box] = []
    room = _GROUP_BYTES
    for box in boxes:
        size = itemsize * int(np.prod([stop - start for start, stop in box], dtype=np.int64))
        if group and size > room:
            yield group
            group, room = [], _GROUP_BYTES
        group.append(box)
        room -= size
    yield group


def _chunks_of(box: Box, chunk: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Returns the coordinates of the chunks that a box overlaps."""
    return itertools.product(
        *(
            range(start // size, -(-stop // size))
            for (start, stop), size in zip(box, chunk, strict=True)
        )
    )


def _bytes_of(array: np.ndarray) -> memoryview:
    # NumPy has no buffer protocol for the small types of `ml_dtypes`.
    return array.reshape(-1).view(np.uint8).data


def _overlaps(
    at: tuple[int, ...], chunk: tuple[int, ...], shards: Mapping[Box, np.ndarray]
) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Yields what of a chunk lies in each shard, and its place there.

    Chunks at the end of a dim are padded.
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
