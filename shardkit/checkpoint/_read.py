"""Reads the arrays of a saved step chunk by chunk onto any devices.

Each chunk that overlaps a shard of this process is read and copied into the shard. So chunks of
other processes' shards are not read, and besides the state the host needs memory for the shards of
a few leaves at a time. Sizes are compared here, and bits by the fingerprints of what was read.

An example: a leaf [6, 4] in chunks of [4, 4], restored to two devices that hold rows 0:3 and 3:6.

    chunk 0   rows 0 1 2 | 3      device 0 takes rows 0:3 of chunk 0
    chunk 1   rows         4 5    device 1 takes row 3 of chunk 0 and rows 0:2 of chunk 1
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ._files import UnreadableFile, read_file
from ._grid import (
    HEADER,
    Box,
    box_of_index,
    bytes_of,
    chunk_name,
    chunks_of,
    overlaps,
    parse_header,
)
from ._manifest import SavedFile

# Bytes of shards that are assembled from chunks at once; a single shard may be larger.
_GROUP_BYTES = 2**27
_THREADS = 4
# XLA takes host memory as that of a CPU device, without a copy, from this alignment on.
_ALIGNMENT = 64


def read_leaves(
    folder: Path,
    files: Mapping[str, SavedFile],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    done: Callable[[str, jax.Array], None],
) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """Reads leaves of a step's folder; each device gets its shards only.

    `wanted` is `{folder of the leaf below that of the step: shape, dtype and sharding}`; `done`
    gets each leaf when it is complete, in a thread that reads. Returns `{folder of the leaf:
    array}`, and `{file: what is wrong with it}`; a leaf with a damaged file is not among the
    arrays.
    """
    scratch = threading.local()
    with ThreadPoolExecutor(_THREADS) as leaves, ThreadPoolExecutor(_THREADS) as chunks:

        def read_leaf(name: str) -> tuple[jax.Array | None, dict[str, str]]:
            array, wrong = _LeafReader(folder, files, name, chunks, scratch).read(wanted[name])
            if array is not None:
                done(name, array)
            return array, wrong

        results = dict(zip(wanted, leaves.map(read_leaf, wanted), strict=True))
    arrays = {leaf: array for leaf, (array, _) in results.items() if array is not None}
    return arrays, {name: why for _, wrong in results.values() for name, why in wrong.items()}


class _LeafReader:
    """Reads one leaf, several chunks at a time."""

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, SavedFile],
        leaf: str,
        pool: ThreadPoolExecutor,
        scratch: threading.local,
    ) -> None:
        self._folder, self._files, self._leaf, self._pool = folder, files, leaf, pool
        self._scratch = scratch  # memory for a chunk, of each thread of the pool
        self._wrong: dict[str, str] = {}

    def read(self, wanted: jax.ShapeDtypeStruct) -> tuple[jax.Array | None, dict[str, str]]:
        """Returns the array, or None and what is wrong."""
        name = f"{self._leaf}/{HEADER}"
        header = self._read_file(name, checked=True)
        if header is None:
            return None, self._wrong
        chunk = parse_header(bytes(header), wanted.shape)
        if chunk is None:
            return None, {name: "is not the header of this leaf"}
        sharding = wanted.sharding
        assert sharding is not None
        devices: dict[Box, list[Any]] = {}
        for device, index in sharding.addressable_devices_indices_map(wanted.shape).items():
            devices.setdefault(box_of_index(index, wanted.shape), []).append(device)
        on_devices = []
        for group in _group_boxes(list(devices), wanted.dtype.itemsize):
            shards = {box: _make_aligned(box, wanted.dtype) for box in group}
            needed = {at for box in group for at in chunks_of(box, chunk)}
            list(self._pool.map(lambda at, to=shards: self._read_chunk(at, chunk, to), needed))
            if not self._wrong:
                on_devices += [
                    jax.device_put(shard, device)
                    for box, shard in shards.items()
                    for device in devices[box]
                ]
        if self._wrong:
            return None, self._wrong
        shape = wanted.shape
        return jax.make_array_from_single_device_arrays(shape, sharding, on_devices), {}

    def _read_chunk(
        self, at: tuple[int, ...], chunk: tuple[int, ...], shards: Mapping[Box, np.ndarray]
    ) -> None:
        name, parts = chunk_name(self._leaf, at), list(overlaps(at, chunk, shards))
        (_, first), *others = parts
        size = math.prod(chunk) * first.dtype.itemsize
        if name in self._files and self._files[name].bytes != size:
            why = f"has {self._files[name].bytes} bytes, a chunk of this leaf has {size}"
            self._wrong[name] = why
            return
        # A chunk that is one piece of one shard is read into its place.
        if not others and first.nbytes == size and first.flags.c_contiguous:
            self._read_file(name, bytes_of(first))
            return
        memory: np.ndarray | None = getattr(self._scratch, "memory", None)
        if memory is None or memory.size < size:
            memory = self._scratch.memory = np.empty(size, np.uint8)
        whole = memory[:size].view(first.dtype).reshape(chunk)
        if self._read_file(name, bytes_of(whole)) is not None:
            for source, target in parts:
                target[...] = whole[source]

    def _read_file(
        self, name: str, into: memoryview | None = None, checked: bool = False
    ) -> memoryview | None:
        try:
            return read_file(self._folder, name, self._files, into, checked=checked)
        except UnreadableFile as error:
            self._wrong[name] = str(error)
            return None


def _make_aligned(box: Box, dtype: np.dtype) -> np.ndarray:
    shape = [stop - start for start, stop in box]
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _group_boxes(boxes: Sequence[Box], itemsize: int) -> Iterator[list[Box]]:
    """Yields boxes in order, in groups of at most `_GROUP_BYTES` but at least one box."""
    group: list[Box] = []
    room = _GROUP_BYTES
    for box in boxes:
        size = itemsize * math.prod(stop - start for start, stop in box)
        if group and size > room:
            yield group
            group, room = [], _GROUP_BYTES
        group.append(box)
        room -= size
    yield group
