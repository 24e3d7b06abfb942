"""The fingerprints of `_fingerprint`, computed by NumPy where the devices are this machine's CPU.

What a program of XLA does there NumPy does too, without a compile, in threads and on blocks that
stay in the cache. The arrays are read where they lie on the devices, not where they came from.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._collective_errors import has_several_processes
from ._fingerprint import INDEX, MIX, SHIFT, WORD, compute_fingerprints, fold_strides, raw_array

# Bytes of leaves whose fingerprints are computed in one program of a device.
_GROUP_BYTES = 2**23
# Words of a block: three buffers of them stay in the cache of one core.
_BLOCK = 2**16


def are_on_host(leaves: Mapping[str, jax.Array]) -> bool:
    """Whether all arrays lie in the memory of their processes' machines."""
    devices = {device for x in leaves.values() for device in x.sharding.device_set}
    return all(device.platform == "cpu" for device in devices)


def read_fingerprints(leaves: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Returns `compute_fingerprints` of `{path: array}`, u32[2] each, read; all but typed keys."""
    if has_several_processes() or not are_on_host(leaves):
        groups = ({path: leaves[path] for path in group} for group in _group_by_size(leaves))
        return {p: x for g in groups for p, x in jax.device_get(compute_fingerprints(g)).items()}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(leaves, pool.map(fingerprint_on_host, leaves.values()), strict=True))


def _group_by_size(arrays: Mapping[str, jax.Array]) -> Iterator[list[str]]:
    """Yields leaves in groups: one program over all would need as much memory as all of them."""
    group: list[str] = []
    for path in arrays:
        group.append(path)
        if sum(arrays[path].nbytes for path in group) >= _GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


def fingerprint_on_host(x: jax.Array) -> np.ndarray:
    """Returns the fingerprint of an array whose shards are all in this process's memory, u32[2]."""
    sums = np.zeros(2, np.uint32)
    for shard in x.addressable_shards:
        if shard.replica_id == 0 and x.size:
            starts = [dim.indices(n)[0] for dim, n in zip(shard.index, x.shape, strict=True)]
            sums += sum_words(np.asarray(shard.data), starts, x.shape)
    return sums


def fingerprint_values(x: Any) -> np.ndarray:
    """Returns the fingerprint of an array or a number that this process has in whole, u32[2]."""
    host = np.asarray(raw_array(x) if isinstance(x, jax.Array) else x)
    return sum_words(host, [0] * host.ndim, host.shape)


def sum_words(values: np.ndarray, starts: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Returns what a shard adds to the two sums of its leaf, u32[2]."""
    if not shape:
        values, starts, shape = values.reshape(1), [0], [1]
    width = _to_words(values.ravel()[:1]).size
    *strides, last = fold_strides([*shape, width])
    sums = np.zeros(2, np.uint32)
    scratch, bases = np.empty((3, 0), np.uint32), {}
    for block in _cut(values.shape, max(1, _BLOCK // width)):
        words = _to_words(values[block]).ravel()
        inner = values[block].shape
        if inner not in bases:
            steps = [*zip(inner, strides, strict=True), (width, last)]
            bases[inner] = _indices(steps).ravel()
        if scratch.shape[1] != words.size:
            scratch = np.empty((3, words.size), np.uint32)
        first = sum((s + at.start) * n for s, at, n in zip(starts, block, strides, strict=True))
        sums += _mix(words, bases[inner], np.uint32(first * INDEX & 0xFFFFFFFF), scratch)
    return sums


def _cut(shape: Sequence[int], size: int) -> Iterator[tuple[slice, ...]]:
    """Yields blocks of at most `size` elements: rows of the first dims, runs of one, all behind.

    >>> list(_cut([2, 3], 2))[:2]
    [(slice(0, 1, None), slice(0, 2, None)), (slice(0, 1, None), slice(2, 3, None))]
    """
    steps, behind = [], math.prod(shape)
    for n in shape:
        behind //= n
        steps.append(min(n, max(1, size // behind)))
    for at in np.ndindex(*(-(-n // step) for n, step in zip(shape, steps, strict=True))):
        corners = zip(at, steps, shape, strict=True)
        yield tuple(slice(i * step, min((i + 1) * step, n)) for i, step, n in corners)


def _indices(steps: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns the index of each word of a block at the origin, times its constant: u32."""
    index = np.zeros([n for n, _ in steps], np.uint32)
    for dim, (n, stride) in enumerate(steps):
        along = np.arange(n, dtype=np.uint32) * np.uint32(stride)
        index += along.reshape([-1 if i == dim else 1 for i in range(len(steps))])
    return index * np.uint32(INDEX)


def _mix(words: np.ndarray, base: np.ndarray, first: np.uint32, scratch: np.ndarray) -> np.ndarray:
    """The two sums of a block, by the operations of `_fingerprint._fingerprint`, in place."""
    index, mixed, shifted = scratch
    np.add(base, first, out=index)
    np.bitwise_xor(words, index, out=mixed)
    mixed *= np.uint32(WORD)
    mixed ^= np.right_shift(mixed, np.uint32(SHIFT), out=shifted)
    mixed *= np.uint32(MIX)
    # Sums of another dtype than the words would take three times as long.
    one = np.add.reduce(mixed, dtype=np.uint32)
    index *= mixed
    return np.array([one, np.add.reduce(index, dtype=np.uint32)])


def _to_words(x: np.ndarray) -> np.ndarray:
    """Returns the bits of an array as `_fingerprint._to_words` does, u32[words]."""
    if x.dtype != bool and jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8:
        x = x.astype(np.int8)
    elif jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 8:
        x = x.astype(np.float32)
    x = np.ascontiguousarray(x).ravel()
    if x.dtype.itemsize < 4:
        return x.view(f"u{x.dtype.itemsize}").astype(np.uint32)
    return x.view(np.uint32)
