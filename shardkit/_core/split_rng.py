"""Random draws that do not depend on how the rows of a batch are split.

A loss draws noise in the shape of its rows, such as `bernoulli(key, 0.9, [rows, embed])`. For the
numbers to be the same on every mesh, the draw of one part of the rows has to be that part's slice
of the draw that one device makes for all rows. `per_shard_keys` and `part_keys` return keys whose
generator does this: like `jax.random` for its default keys, it computes bits as threefry of the
row-major index of each element, but of the index in the array of *all* rows. Which dim of a draw
counts rows `draws.py` finds.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import random as extend_random

from .errors import Problem
from .tracing import SETTINGS
from .types import Key

Shape = tuple[int, ...]
Drawn = tuple[str, Shape]
"""`"bits"` or `"split"`, and the shape that the generator is asked for."""

_TAG = "rows"
_ONE_ROW = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class GrownDim:
    """The dim of a draw that grows with the rows, or with the length."""

    shape: Shape  # of one part's draw; a gamma draw of `[2, 3]` asks the generator for 6 keys
    dim: int  # of it


@dataclasses.dataclass(frozen=True)
class RandomDraws:
    """How the rows of a batch are split, and which dims of a loss's draws are split with them."""

    # number of contiguous blocks that the rows of a micro-batch are split into
    gradient_shards: int
    # for each draw that grows with the rows what the generator is asked for, and which dim grows
    row_dims: tuple[tuple[Drawn, GrownDim], ...] = ()
    micro_batches: int = 1  # number k of micro-batches; micro-batch i holds rows i, i+k, i+2k, …
    length_shards: int = 1  # number of contiguous blocks that the length of each row is split into
    # as `row_dims`, for draws that grow with the length
    length_dims: tuple[tuple[Drawn, GrownDim], ...] = ()


def per_shard_keys(key: Key, draws: RandomDraws) -> Key:
    """Returns one typed PRNG key per gradient shard: key[shards]."""
    words = threefry_words(key)
    shards = jnp.arange(draws.gradient_shards, dtype=jnp.uint32)
    return jax.vmap(lambda shard: part_keys(words, draws, shard, jnp.uint32(0)))(shards)


def part_keys(
    words: jax.Array, draws: RandomDraws, shard: Any, micro_batch: Any, length_shard: Any = 0
) -> Key:
    """Returns typed PRNG keys for one part of the rows: key[...].

    The words u32[..., 2] are the data of threefry keys; the part draws its slice of what these draw
    for all rows. Its place is the index of its gradient shard, of its micro-batch and of its block
    of the length, i32[] each.
    """
    part = jnp.stack(
        [jnp.asarray(n).astype(jnp.uint32) for n in (shard, micro_batch, length_shard)]
    )
    data = jnp.concatenate([words, jnp.broadcast_to(part, (*words.shape[:-1], 3))], axis=-1)
    return jax.random.wrap_key_data(data, impl=_generator(draws))


def threefry_words(key: Key) -> jax.Array:
    """Returns u32[2], the data of `key` if it is a threefry key, else of one drawn from it."""
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return jax.random.key_data(key)
    return jax.random.bits(key, (2,), jnp.uint32)


def is_part_key(dtype: Any) -> bool:
    """Whether a dtype is that of the keys which a loss gets where rows are split."""
    return str(dtype) == f"key<{_TAG}>"


def key_problems(dtype: Any, line: str = "") -> list[Problem]:
    """Draws of other generators than partitionable threefry cannot be split by rows.

    `dtype` is that of the keys; `line` the user's, that draws from them, "" if unknown.
    """
    tag = str(dtype).removeprefix("key<").removesuffix(">")
    name = {"fry": "threefry2x32", "urbg": "unsafe_rbg"}.get(tag, tag)
    partitionable = SETTINGS.jax_threefry_partitionable
    if name == "threefry2x32" and partitionable:
        return []
    why = "only draws of partitionable threefry keys can be split by rows"
    why += f" ({line})" if line else ""
    fix = 'jax.random.key(seed, impl="threefry2x32"), jax_threefry_partitionable=True'
    return [Problem(f"key of {name}", why, fix)]


@functools.lru_cache(maxsize=64)
def _generator(draws: RandomDraws) -> Any:
    """A PRNG implementation whose keys are threefry keys that know which part they draw for.

    A key is five words: (k0, k1) of the threefry key, then the indices of the gradient shard, the
    micro-batch and the block of the length. For draws of `[rows, 8]` over 2 gradient shards of 3
    rows, the key (k0, k1, 1, 0, 0) draws `[3, 8]` as rows 3, 4, 5 of what (k0, k1) draws as
    `[6, 8]`: element [0, 0] is threefry(k0, k1, 24), since its index among all rows is 3 · 8.
    `split` and `fold_in` change (k0, k1) as `jax.random` does and keep the other three words, so
    a key split off inside the loss draws for the same part. A key of one row, from a split into a
    key for each, has `_ONE_ROW` for its shard: nothing that it draws is a part of something.
    """

    def random_bits(key: jax.Array, width: int, shape: Shape) -> jax.Array:
        first, second = _threefry(key, *_indices(draws, ("bits", shape), key))
        if width == 64:
            return (first.astype(jnp.uint64) << 32) | second.astype(jnp.uint64)
        return (first ^ second).astype({8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[width])

    def split(key: jax.Array, shape: Shape) -> jax.Array:
        drawn = "split", shape
        words = _threefry(key, *_indices(draws, drawn, key))
        grows = drawn in dict((*draws.row_dims, *draws.length_dims))
        return _join_words(words, key.at[2].set(np.uint32(_ONE_ROW)) if grows else key)

    def fold_in(key: jax.Array, data: Any) -> jax.Array:
        return _join_words(_threefry(key, jnp.uint32(0), jnp.asarray(data)), key)

    def seed(number: jax.Array) -> jax.Array:
        low = jnp.asarray(number).astype(jnp.uint32)
        zero = jnp.zeros_like(low)
        return jnp.stack([zero, low, zero, zero, zero])

    return extend_random.define_prng_impl(
        key_shape=(5,),
        seed=seed,
        split=split,
        random_bits=random_bits,
        fold_in=fold_in,
        name=f"shardkit_rows_{draws.gradient_shards}_{draws.micro_batches}_{draws.length_shards}",
        tag=_TAG,
    )


def _threefry(key: jax.Array, high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two words of threefry for each index."""
    high, low = high.astype(jnp.uint32), low.astype(jnp.uint32)
    # A sum gives all operands the dims of each, also those of a `vmap` over one of them alone.
    zero = (high ^ high) + (low ^ low) + (key[0] ^ key[0])
    first, second = extend_random.threefry2x32_p.bind(
        *(word + zero for word in (key[0], key[1], high, low))
    )
    return first, second


def _join_words(words: tuple[jax.Array, jax.Array], key: jax.Array) -> jax.Array:
    """Keys of two threefry words each, for the part of `key`."""
    part = (jnp.broadcast_to(key[n], words[0].shape) for n in (2, 3, 4))
    return jnp.stack([*words, *part], axis=-1)


def _indices(draws: RandomDraws, drawn: Drawn, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The index of each element that a key draws, as two words."""
    row_dims, length_dims = dict(draws.row_dims), dict(draws.length_dims)
    rows, length, (_, shape) = row_dims.get(drawn), length_dims.get(drawn), drawn
    grown = rows or length
    own = global_index(RandomDraws(1), shape, row_dim=None, shard=key[2], micro_batch=key[3])
    if grown is None:
        return own
    high, low = global_index(
        draws,
        grown.shape,
        row_dim=rows and rows.dim,
        shard=key[2],
        micro_batch=key[3],
        length_dim=length and length.dim,
        length_shard=key[4],
    )
    of_part = high.reshape(shape), low.reshape(shape)
    if not any(kind == "split" for kind, _ in (*row_dims, *length_dims)):
        return of_part
    of_row = key[2] == np.uint32(_ONE_ROW)
    return jnp.where(of_row, own[0], of_part[0]), jnp.where(of_row, own[1], of_part[1])


def global_index(
    draws: RandomDraws,
    shape: Shape,
    *,
    row_dim: int | None,
    shard: jax.Array,
    micro_batch: jax.Array,
    length_dim: int | None = None,
    length_shard: Any = 0,
) -> tuple[jax.Array, jax.Array]:
    """Returns each element's row-major index in the array of all rows, as (high, low) u32 words.

    `shape` is that of the part's draw, of which `row_dim` counts rows and `length_dim` positions,
    each None if no dim does. The part is one gradient shard of one micro-batch, and one block of
    the length.
    """
    # A part [2, 3] of [8, 3]: row_dim 0, 2 gradient shards, 2 micro-batches. Shard 1 of
    # micro-batch 0 holds rows 4 and 6 of the 8. The loop is Horner's rule, dim by dim:
    #   dim 0: at = (iota + shard · 2) · 2 + micro_batch = (0, 1) → (2, 3) → (4, 6)
    #          index = 0 · 8 + at = (4, 6)
    #   dim 1: index = index · 3 + (0, 1, 2) = (12, 13, 14) and (18, 19, 20)
    low = jnp.zeros(shape, jnp.uint32)
    high, elements = low, 1
    for d, n in enumerate(shape):
        at = jax.lax.broadcasted_iota(jnp.uint32, shape, d)
        if d == length_dim:
            at = at + length_shard * jnp.uint32(n)
            n *= draws.length_shards
        if d == row_dim:
            at = (at + shard * jnp.uint32(n)) * jnp.uint32(draws.micro_batches) + micro_batch
            n *= draws.gradient_shards * draws.micro_batches
        elements *= n
        # (high, low) · n + at in two words, as on paper: low · n overflows into `carry` (never in
        # arrays of up to 2³² elements), and its sum with `at` overflows if it is less than low · n.
        carry = _multiply_high(low, n) if elements > 2**32 else jnp.uint32(0)
        scaled = low * jnp.uint32(n)
        low = scaled + at
        high = high * jnp.uint32(n) + carry + (low < scaled)
    return high, low


def _multiply_high(x: jax.Array, n: int) -> jax.Array:
    """The high 32 bits of x · n, in halves of 16 bits as in long multiplication."""
    x0, x1, n0, n1 = x & 0xFFFF, x >> 16, jnp.uint32(n & 0xFFFF), jnp.uint32(n >> 16)
    middle = x1 * n0 + (x0 * n0 >> 16)
    return x1 * n1 + (middle >> 16) + (x0 * n1 + (middle & 0xFFFF) >> 16)
