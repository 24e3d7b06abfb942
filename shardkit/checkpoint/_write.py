"""Writes the arrays of a step: each process the shards of which it holds the first copy.

Arrays are copied to the host, so that they may be donated, and threads write the copies: one pass
over each chunk gives its CRC-32, what it adds to the fingerprint of its leaf, and its file. When
all are written they are synced. The first process collects what all have written.

A large chunk that is in the step before, byte for byte, becomes a second name of that file: frozen
weights take their space once, and each step is whole without the others.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._core.errors import CheckpointError, Problem, format_problems
from ._collective_errors import has_several_processes, is_first_process
from ._grid import (
    HEADER,
    box_of_index,
    bytes_of,
    choose_chunk,
    choose_chunk_bytes,
    chunk_name,
    chunks_of,
    describe_holders,
    format_header,
)
from ._host_fingerprint import sum_words
from ._manifest import SavedFile

# More than processors, as a thread that writes or syncs waits for the disk.
_THREADS = 4
_WAIT_SECONDS = 3600
# A file that is less than this is written again, so that damage to it is that of one step.
_LINKED_BYTES = _COMPARED_BYTES = 2**20

# Name and record of a file; and if it is a chunk, its leaf and what it adds to the fingerprint.
_Done = tuple[str, SavedFile, str, np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class Written:
    """What a process has written, or all of them."""

    files: Mapping[str, SavedFile]  # `{path below the step's folder: size and CRC-32}`
    # `{folder of the leaf: fingerprint of these chunks, u32[2]}`; empty where the devices compute
    # the fingerprints
    sums: Mapping[str, np.ndarray]


def start_writing(
    folder: Path,
    leaves: Mapping[str, jax.Array],
    summed: bool,
    copies: list[np.ndarray | None],
    before: Path | None,
) -> Callable[[], Written]:
    """Copies arrays to the host and starts writing them; the arrays may be donated afterwards.

    None of `{folder of the leaf below that of the step: array}` is empty; `summed` adds up their
    fingerprints. `copies` are those of the last save, which is over. Their memory is used again,
    and they become those of this one: copying into new pages takes two and a half times the
    processor time. `before` is the folder of the step before, if there is one. Returns a function
    that waits until everything is written, and raises any error of writing.
    """
    shapes = {leaf: x.shape for leaf, x in leaves.items()}
    chunks = _choose_chunks(leaves)

    def write_header(leaf: str, dtype: np.dtype) -> _Done:
        name, content = f"{leaf}/{HEADER}", format_header(shapes[leaf], dtype, chunks[leaf])
        return name, _write_file(folder / name, memoryview(content)), leaf, None

    def write_chunk(leaf: str, at: tuple[int, ...], values: np.ndarray) -> _Done:
        values = np.ascontiguousarray(values).reshape(values.shape)
        origin = [i * n for i, n in zip(at, chunks[leaf], strict=True)]
        sums = sum_words(values, origin, shapes[leaf]) if summed else None
        name, content = chunk_name(leaf, at), bytes_of(values)
        if before is not None and _link(before / name, folder / name, content):
            return name, _describe(content), leaf, sums
        return name, _write_file(folder / name, content), leaf, sums

    mine = [(leaf, s) for leaf, x in leaves.items() for s in x.addressable_shards]
    mine = [(leaf, shard) for leaf, shard in mine if shard.replica_id == 0]
    for _, shard in mine:
        shard.data.copy_to_host_async()
    pool = ThreadPoolExecutor(_THREADS)
    memory = itertools.chain(copies, itertools.repeat(None))
    try:
        copied = list(pool.map(_copy_to_host, (shard.data for _, shard in mine), memory))
    except BaseException:
        copies.clear()  # another thread may still write into it
        pool.shutdown(cancel_futures=True)
        raise
    # What JAX has copied from a device is its own, and read-only.
    copies[:] = [copy if copy.flags.writeable else None for copy in copied]
    futures = [
        pool.submit(write_header, leaf, x.dtype) for leaf, x in leaves.items() if is_first_process()
    ]
    for (leaf, shard), copy in zip(mine, copied, strict=True):
        chunk, box = chunks[leaf], box_of_index(shard.index, shapes[leaf])
        for at in chunks_of(box, chunk):
            starts = (i * n - start for i, n, (start, _) in zip(at, chunk, box, strict=True))
            part = tuple(slice(s, s + n) for s, n in zip(starts, chunk, strict=True))
            futures.append(pool.submit(write_chunk, leaf, at, copy[(*part, ...)]))

    def finish() -> Written:
        try:
            written = _add_up(future.result() for future in futures)
            list(pool.map(lambda name: _sync(folder / name), written.files))
            return written
        finally:
            pool.shutdown(cancel_futures=True)

    return finish


def _copy_to_host(data: jax.Array, memory: np.ndarray | None) -> np.ndarray:
    values = np.asarray(data)
    (device,) = data.devices()
    # `asarray` does not copy memory of this machine. JAX keeps a donated array that NumPy sees, but
    # does not promise to.
    is_here = device.platform == "cpu" or data.sharding.memory_kind not in (None, "device")
    if not is_here:
        return values
    if memory is None or (memory.shape, memory.dtype) != (values.shape, values.dtype):
        memory = np.empty(values.shape, values.dtype)
    np.copyto(memory, values)
    return memory


def _write_file(path: Path, content: memoryview) -> SavedFile:
    """Writes a new file, which is on its way to the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb", buffering=0) as file:
        done = 0
        while done < len(content):
            done += file.write(content[done:])
        # Starts writing without waiting for it, as a sync would; other systems start by themselves.
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return _describe(content)


def _describe(content: memoryview) -> SavedFile:
    return SavedFile(len(content), f"{zlib.crc32(content):08x}")


def _link(path: Path, new: Path, content: memoryview) -> bool:
    """Makes a large file with this content known by a second name; returns whether it did."""
    if len(content) < _LINKED_BYTES:
        return False
    wanted = np.frombuffer(content, np.uint8)
    # It may be deleted meanwhile, and not all file systems have second names.
    with contextlib.suppress(OSError), path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != len(content):
            return False
        for start in range(0, len(content), _COMPARED_BYTES):
            found = np.frombuffer(file.read(_COMPARED_BYTES), np.uint8)
            if not np.array_equal(found, wanted[start : start + _COMPARED_BYTES]):
                return False
        new.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, new)
        return True
    return False


def _sync(path: Path) -> None:
    # One that has been deleted is named when the step is checked.
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        os.fsync(file.fileno())


def _add_up(done: Iterable[_Done]) -> Written:
    every = list(done)
    sums = _add_sums((leaf, added) for *_, leaf, added in every if added is not None)
    return Written({name: file for name, file, *_ in every}, sums)


def _add_sums(parts: Iterable[tuple[str, Any]]) -> dict[str, np.ndarray]:
    """Adds up fingerprints of parts of leaves; integers wrap."""
    sums: dict[str, np.ndarray] = {}
    for leaf, added in parts:
        sums[leaf] = sums.get(leaf, np.zeros(2, np.uint32)) + np.asarray(added, np.uint32)
    return sums


def collect(folder: Path, written: Written | Exception) -> Written | None:
    """Returns what all processes have written, to the first one; None to the others.

    Every process must call it, with the error if it has failed. Raises CheckpointError then, or if
    its folder is not that of the first.
    """
    if not has_several_processes():
        return written if isinstance(written, Written) else None
    from orbax.checkpoint import multihost

    texts = {process: folder / f".written-{process}" for process in range(jax.process_count())}
    try:
        texts[jax.process_index()].write_text(_to_text(written), "utf-8")
    finally:  # the others must not wait for a process that has failed
        barrier = multihost.get_barrier_sync_fn()
        barrier(key=folder.name, timeout_ms=_WAIT_SECONDS * 1000)
    if not is_first_process():
        return None
    found = {process: _read_text(path) for process, path in texts.items()}
    problems = [
        Problem(f"process {process}", fields.get("error", "has left nothing that is seen here"))
        for process, fields in found.items()
        if "files" not in fields
    ]
    if problems:
        fix = "free space, on a file system that all processes share"
        raise CheckpointError(format_problems("A save has failed.", problems, fix))
    for path in texts.values():
        path.unlink()
    sums = _add_sums(item for fields in found.values() for item in fields["sums"].items())
    files = {n: SavedFile(*f) for fields in found.values() for n, f in fields["files"].items()}
    return Written(files, sums)


def _to_text(written: Written | Exception) -> str:
    if isinstance(written, Exception):
        return json.dumps({"error": str(written) or type(written).__name__})
    files = {name: [file.bytes, file.crc32] for name, file in written.files.items()}
    sums = {leaf: two.tolist() for leaf, two in written.sums.items()}
    return json.dumps({"files": files, "sums": sums})


def _read_text(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def find_missing(
    expected: Mapping[str, jax.ShapeDtypeStruct], present: Collection[str]
) -> dict[str, str]:
    """Returns `{file: why}` of files that a step's leaves must have, and that are not `present`."""
    missing = {}
    chunks = _choose_chunks(expected)
    for leaf, x in expected.items():
        if (header := f"{leaf}/{HEADER}") not in present:
            missing[header] = "was not written by process 0"
        for at in chunks_of(tuple((0, n) for n in x.shape), chunks[leaf]):
            if (name := chunk_name(leaf, at)) not in present:
                origin = [i * n for i, n in zip(at, chunks[leaf], strict=True)]
                holders = describe_holders(x.sharding, x.shape, origin)
                missing[name] = f"was not written by {holders}"
    return missing


def _choose_chunks(
    leaves: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
) -> dict[str, tuple[int, ...]]:
    sizes = {leaf: math.prod(x.shape) * x.dtype.itemsize for leaf, x in leaves.items()}
    wanted = choose_chunk_bytes(sum(sizes.values()))
    return {
        leaf: choose_chunk(x.sharding.shard_shape(x.shape), x.dtype.itemsize, wanted)
        for leaf, x in leaves.items()
    }
