"""Arrays of a saved step, read chunk by chunk onto any devices and checked as they are read.

A leaf is a folder of plain zarr chunks. Each chunk that overlaps what this process is to hold is
read once, compared with its CRC-32 and copied to where it belongs, so every byte that is used was
checked, no byte is read for a shard that other processes hold, and the host needs room for the
shards of a few leaves at a time beside the state itself.
"""

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ._files import Unreadable, read_checked
from ._manifest import SavedFile

# Shards that are gathered from chunks at once; one alone may be larger.
_AT_ONCE = 2**27
_THREADS = 4

# Start and stop along each dim.
Box = tuple[tuple[int, int], ...]


def read(
    folder: Path, files: Mapping[str, SavedFile], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """Reads leaves, each device only what it is to hold.

    Args:
      folder: of the step.
      files: its files, as they were written.
      wanted: `{folder of the leaf below that of the step: shape, dtype and sharding}`.

    Returns:
      `{folder of the leaf: array}`, and `{file: what is wrong with it}`; a leaf of which a file
      is wrong is not among the arrays.
    """

    def one(below: str) -> tuple[jax.Array | None, dict[str, str]]:
        return _read_leaf(folder, files, below, wanted[below])

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        found = dict(zip(wanted, pool.map(one, wanted), strict=True))
    arrays = {below: array for below, (array, _) in found.items() if array is not None}
    return arrays, {name: why for _, wrong in found.values() for name, why in wrong.items()}


def _read_leaf(
    folder: Path, files: Mapping[str, SavedFile], below: str, wanted: jax.ShapeDtypeStruct
) -> tuple[jax.Array | None, dict[str, str]]:
    wrong: dict[str, str] = {}

    def content(name: str) -> bytes | None:
        try:
            return read_checked(folder, name, files)
        except Unreadable as error:
            wrong[name] = str(error)
            return None

    described = content(f"{below}/.zarray")
    if described is None:
        return None, wrong
    chunk = tuple(json.loads(described)["chunks"])
    sharding = wanted.sharding
    assert sharding is not None
    holders: dict[Box, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(wanted.shape).items():
        holders.setdefault(_box(index or (), wanted.shape), []).append(device)
    pieces = []
    for group in _groups(list(holders), wanted.dtype.itemsize):
        held = {box: np.empty([stop - start for start, stop in box], wanted.dtype) for box in group}
        for at in {at for box in group for at in _chunks_of(box, chunk)}:
            raw = content(f"{below}/{'.'.join(map(str, at)) or '0'}")
            if raw is not None:
                _spread(np.frombuffer(raw, wanted.dtype).reshape(chunk), at, held)
        if not wrong:
            pieces += [jax.device_put(part, d) for box, part in held.items() for d in holders[box]]
    if wrong:
        return None, wrong
    return jax.make_array_from_single_device_arrays(wanted.shape, sharding, pieces), wrong


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))


def _groups(boxes: Sequence[Box], itemsize: int) -> Iterator[list[Box]]:
    """Boxes in order, as many together as fit into `_AT_ONCE`, one at least."""
    group: list[Box] = []
    room = _AT_ONCE
    for box in boxes:
        size = itemsize * int(np.prod([stop - start for start, stop in box], dtype=np.int64))
        if group and size > room:
            yield group
            group, room = [], _AT_ONCE
        group.append(box)
        room -= size
    yield group


def _chunks_of(box: Box, chunk: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Coordinates of the chunks that a box overlaps."""
    return itertools.product(
        *(
            range(start // size, -(-stop // size))
            for (start, stop), size in zip(box, chunk, strict=True)
        )
    )


def _spread(values: np.ndarray, at: tuple[int, ...], held: Mapping[Box, np.ndarray]) -> None:
    """Copies what a chunk has of each box. Chunks at the end of a dim are padded."""
    origin = [i * size for i, size in zip(at, values.shape, strict=True)]
    for box, part in held.items():
        source, target = [], []
        for first, size, (start, stop) in zip(origin, values.shape, box, strict=True):
            low, high = max(first, start), min(first + size, stop)
            if low >= high:
                break
            source.append(slice(low - first, high - first))
            target.append(slice(low - start, high - start))
        else:
            part[tuple(target)] = values[tuple(source)]
