"""One number per leaf that no sharding changes and every flipped bit does.

Each 32-bit word is mixed with its global index, and the results are summed as integers. Integer
addition wraps and associates, so any split over devices gives the same sum; the mix is a
bijection of the word, so one changed word always changes the first sum.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ._collective_errors import several

# Odd constants of MurmurHash3's finalizer and of the golden ratio.
_WORD, _INDEX, _HIGH = 0xCC9E2D51, 0x9E3779B1, 0x85EBCA6B
_MIX_1, _MIX_2, _SECOND = 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F


def is_key(dtype: Any) -> bool:
    """Whether a dtype is that of a typed PRNG key."""
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def bare(x: jax.Array) -> jax.Array:
    """Returns the words of a typed PRNG key, u32[..., n], and any other array as it is."""
    return jax.random.key_data(x) if is_key(x.dtype) else x


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as u32[..., words per element]."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.concatenate([_words(x.real), _words(x.imag)], -1)
    bits = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else 0
    if x.dtype == jnp.bool_ or 0 < bits < 8:
        x = x.astype(jnp.int8)
    elif jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 8:
        x = x.astype(jnp.float32)
    if x.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)[..., None]


def _indices(shape: tuple[int, ...]) -> jax.Array:
    """The global row-major index of each word, folded into 32 bits: u32[shape]."""
    index = jnp.zeros(shape, jnp.uint32)
    for dim in range(len(shape)):
        stride = math.prod(shape[dim + 1 :])
        folded = (stride + (stride >> 32) * _HIGH) & 0xFFFFFFFF
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * np.uint32(folded)
    return index


def _fingerprint(x: jax.Array) -> jax.Array:
    words = _words(bare(x))
    index = _indices(words.shape) * np.uint32(_INDEX)
    mixed = (words * np.uint32(_WORD)) ^ index
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(_MIX_1)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(_MIX_2)
    mixed ^= mixed >> 16
    second = mixed * np.uint32(_SECOND) + index
    second ^= second >> 15
    return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)])


def fingerprints(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Computes the fingerprint of every leaf on the devices that hold it.

    Args:
      leaves: `{path: array}` of any dtype and sharding, all on one set of devices.

    Returns:
      `{path: u32[2]}`; the same for the same values, whatever mesh and spec they have.
    """
    # Within a traced function (a shard_map over copies) the caller decides where results go.
    here = [x for x in leaves.values() if not isinstance(x, jax.core.Tracer)]
    shardings = [x.sharding for x in here] if several() else []
    meshes = [one.mesh for one in shardings if isinstance(one, NamedSharding)]
    return _program(NamedSharding(meshes[0], PartitionSpec()) if meshes else None)(leaves)


@functools.lru_cache(maxsize=8)
def _program(result: NamedSharding | None) -> Callable[..., dict[str, jax.Array]]:
    """Each of several processes is to read the results: they are whole on every device then."""

    def run(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {path: _fingerprint(x) for path, x in leaves.items()}

    return jax.jit(run, out_shardings=result)


def as_text(fingerprint: Any) -> str:
    """Returns 16 hexadecimal digits of a u32[2].

    >>> as_text(np.array([1, 255], np.uint32))
    '00000001000000ff'
    """
    return "".join(f"{int(half):08x}" for half in np.asarray(fingerprint))
