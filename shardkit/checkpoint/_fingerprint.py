"""Fingerprints: a number per leaf that does not depend on the sharding but on every bit.

Each 32-bit word is mixed with its global index, and the results are summed as integers. Integer
addition wraps and is associative, so every sharding gives the same sum. The mix is a bijection of
the word, so one changed word always changes the first sum.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ._collective_errors import has_several_processes

# Odd constants: of MurmurHash3, and 2³² divided by the golden ratio.
WORD, INDEX, HIGH = 0xCC9E2D51, 0x9E3779B1, 0x85EBCA6B
SHIFT, MIX = 15, 0x1B873593


def is_key(dtype: Any) -> bool:
    """Whether a dtype is that of typed PRNG keys."""
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def raw_array(x: jax.Array) -> jax.Array:
    """Returns the words of typed PRNG keys, u32[..., n]; any other array unchanged."""
    return jax.random.key_data(x) if is_key(x.dtype) else x


def _to_words(x: jax.Array) -> jax.Array:
    """Returns the bits of an array as u32[..., words per element]."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.concatenate([_to_words(x.real), _to_words(x.imag)], -1)
    bits = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else 0
    if x.dtype == jnp.bool_ or 0 < bits < 8:
        x = x.astype(jnp.int8)
    elif jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 8:
        x = x.astype(jnp.float32)
    if x.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)[..., None]


def fold_strides(shape: Sequence[int]) -> list[int]:
    """Returns what one step along each dim adds to the row-major index, folded into 32 bits."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return [(stride + (stride >> 32) * HIGH) & 0xFFFFFFFF for stride in strides]


def _word_indices(shape: tuple[int, ...]) -> jax.Array:
    """Returns the global row-major index of each word, folded into 32 bits: u32[shape]."""
    index = jnp.zeros(shape, jnp.uint32)
    for dim, stride in enumerate(fold_strides(shape)):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * np.uint32(stride)
    return index


def fingerprint(x: jax.Array) -> jax.Array:
    """The fingerprint of one array or shard in a traced program, u32[2]."""
    words = _to_words(raw_array(x))
    index = _word_indices(words.shape) * np.uint32(INDEX)
    mixed = (words ^ index) * np.uint32(WORD)
    mixed = (mixed ^ (mixed >> SHIFT)) * np.uint32(MIX)
    # The first sum sees every changed word; the second one sees where it is.
    both = [mixed, mixed * index]
    return jnp.stack([jnp.sum(half, dtype=jnp.uint32) for half in both])


def compute_fingerprints(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Computes the fingerprint of every leaf on the devices that hold it.

    Args:
      leaves: `{path: array}` of any dtype and sharding, all on one set of devices.

    Returns:
      `{path: u32[2]}`; equal for equal values on any mesh and spec.
    """
    shardings = [x.sharding for x in leaves.values()] if has_several_processes() else []
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    return _compile_fingerprints(NamedSharding(meshes[0], PartitionSpec()) if meshes else None)(
        leaves
    )


@functools.lru_cache(maxsize=8)
def _compile_fingerprints(result: NamedSharding | None) -> Callable[..., dict[str, jax.Array]]:
    """Compiles the fingerprints; `result` replicates them, so that every process can read them."""

    def run(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {path: fingerprint(x) for path, x in leaves.items()}

    return jax.jit(run, out_shardings=result)


def format_fingerprint(fingerprint: Any) -> str:
    """Returns 16 hexadecimal digits of a u32[2].

    >>> format_fingerprint(np.array([1, 255], np.uint32))
    '00000001000000ff'
    """
    return "".join(f"{int(half):08x}" for half in np.asarray(fingerprint))
