"""Randomness that does not know how many parts the rows of a batch were split into.

The loss of some rows draws noise of their shape, `[rows of the part, …]`. To be the same on every
mesh, that draw must be the part's slice of what one device would draw for all rows,
`[rows, …]`. `per_shard_keys` and `part_keys` give each part a key whose generator does exactly
this:
bits are threefry of the *global* row-major index of each element, as `jax.random` itself has them
for its default keys, and which dim of a draw grows with the rows is not guessed: the loss is
traced for one part and for all rows, and the draws are compared.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend import random as extend_random

from .errors import Problem, StepError, raise_all
from .tracing import equations
from .tree import short_type

Shape = tuple[int, ...]
Draw = tuple[str, Shape]


@dataclasses.dataclass(frozen=True)
class RandomDraws:
    """Which draws of a loss grow with the rows it is given.

    Attributes:
      lanes: number of equal blocks that the rows of a micro-batch are split into.
      grown: `{(kind, part shape): dim}` for draws of `"bits"` or `"split"` that grow.
      micro_batches: number k of strided parts of the rows, of which one is rows i, i+k, ….
      slices: number of equal parts that the length of a row is split into.
      sliced: as `grown`, for draws that grow with the length.
    """

    lanes: int
    grown: tuple[tuple[Draw, int], ...] = ()
    micro_batches: int = 1
    slices: int = 1
    sliced: tuple[tuple[Draw, int], ...] = ()


def match_draws(
    loss: Callable[..., Any], lanes: int, lane_args: tuple[Any, ...], all_args: tuple[Any, ...]
) -> RandomDraws:
    """Compares the random draws of a loss on one lane's rows with those on all rows.

    Args:
      loss: any traceable function.
      lanes: number of lanes.
      lane_args: abstract arguments with the rows of one lane.
      all_args: the same with the rows of all lanes.

    Raises:
      StepError: a draw depends on the number of rows in a way that cannot be sliced by lane.
    """
    if lanes == 1:
        return RandomDraws(1)
    lane, whole = (draws_of(jax.make_jaxpr(loss)(*args).jaxpr) for args in (lane_args, all_args))
    return RandomDraws(lanes, grown(lane, whole, lanes))


def grown(part: list[Draw], whole: list[Draw], parts: int) -> tuple[tuple[Draw, int], ...]:
    """Draws of a part that are larger for the whole, with the one dim that grows.

    Args:
      part: draws of a loss on a part of what it is given, in order.
      whole: its draws on all parts together.
      parts: their number.

    Raises:
      StepError: a draw grows in a way that cannot be sliced by part.
    """
    problems: list[Problem] = []
    if [kind for kind, _ in part] != [kind for kind, _ in whole]:
        problems.append(
            Problem("loss_fn", "draws another number of times for other numbers of rows")
        )
    dims: dict[Draw, int | None] = {}
    for (kind, small), (_, large) in zip(part, whole, strict=False):
        dim = _grown_dim(small, large, parts)
        subject = f"{kind} {short_type(small, jnp.uint32.dtype)}"
        if kind == "fold_in" and small != large:
            problems.append(Problem(subject, "folds in numbers counted over the rows of the batch"))
        elif dim is None and small != large:
            problems.append(Problem(subject, f"is {large} for {parts} times the rows"))
        elif dims.setdefault((kind, small), dim) != dim:
            problems.append(
                Problem(subject, "is drawn once for the rows and once for something else")
            )
    fix = 'sk.Accumulate(k, reduce="every"), whose draws are those of the whole micro-batch'
    raise_all(StepError, "Randomness of the loss cannot be split by lane.", problems, fix)
    return tuple((key, dim) for key, dim in dims.items() if dim is not None)


def per_shard_keys(key: jax.Array, draws: RandomDraws) -> jax.Array:
    """Returns typed PRNG keys, one per lane: key[lanes]."""
    words = threefry_words(key)
    lane = jnp.arange(draws.lanes, dtype=jnp.uint32)
    return jax.vmap(lambda number: part_keys(words, draws, number, jnp.uint32(0)))(lane)


def part_keys(
    words: jax.Array, draws: RandomDraws, lane: Any, micro: Any, cut: Any = 0
) -> jax.Array:
    """Returns typed PRNG keys for one part of the rows: key[...].

    Args:
      words: u32[..., 2], the data of threefry keys. What the part draws is its slice of what
        these keys draw for all rows.
      draws: which draws grow with the rows.
      lane: number of the part's lane.
      micro: number of the part's micro-batch.
      cut: number of the part's slice of the length.
    """
    place = jnp.stack([jnp.asarray(n).astype(jnp.uint32) for n in (lane, micro, cut)])
    data = jnp.concatenate([words, jnp.broadcast_to(place, (*words.shape[:-1], 3))], axis=-1)
    return jax.random.wrap_key_data(data, impl=_generator(draws))


def threefry_words(key: jax.Array) -> jax.Array:
    """u32[2], the data of a threefry key: of `key` itself where it is one, so its draws stay."""
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return jax.random.key_data(key)
    return jax.random.bits(key, (2,), jnp.uint32)


def _grown_dim(small: Shape, large: Shape, lanes: int) -> int | None:
    if len(small) != len(large):
        return None
    changed = [d for d, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    return (
        changed[0] if len(changed) == 1 and small[changed[0]] * lanes == large[changed[0]] else None
    )


def draws_of(jaxpr: core.Jaxpr) -> list[Draw]:
    """Every draw of a jaxpr in order, as (kind, shape)."""
    return list(_random_eqns(jaxpr))


def _random_eqns(jaxpr: core.Jaxpr) -> Iterator[Draw]:
    for eqn in equations(jaxpr):
        name = eqn.primitive.name
        if name == "random_bits":
            yield "bits", tuple(eqn.params["shape"])
        elif name == "random_split":
            yield "split", tuple(eqn.params["shape"])
        elif name == "random_fold_in":
            yield "fold_in", tuple(eqn.invars[1].aval.shape)


@functools.lru_cache(maxsize=64)
def _generator(draws: RandomDraws) -> Any:
    """A PRNG implementation with key words (k0, k1, lane, micro-batch, slice)."""
    rows, length = dict(draws.grown), dict(draws.sliced)

    def threefry(key: jax.Array, high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
        high, low = jnp.broadcast_arrays(high.astype(jnp.uint32), low.astype(jnp.uint32))
        k0, k1 = (jnp.broadcast_to(word, high.shape) for word in (key[0], key[1]))
        first, second = extend_random.threefry2x32_p.bind(k0, k1, high, low)
        return first, second

    def indices(kind: str, key: jax.Array, shape: Shape) -> tuple[jax.Array, jax.Array]:
        grows = rows.get((kind, shape)), length.get((kind, shape))
        return global_index(draws, grows[0], shape, key[2], key[3], grows[1], key[4])

    def random_bits(key: jax.Array, width: int, shape: Shape) -> jax.Array:
        first, second = threefry(key, *indices("bits", key, shape))
        if width == 64:
            return (first.astype(jnp.uint64) << 32) | second.astype(jnp.uint64)
        return (first ^ second).astype({8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[width])

    def in_place(key: jax.Array, words: tuple[jax.Array, jax.Array]) -> jax.Array:
        place = (jnp.broadcast_to(word, words[0].shape) for word in (key[2], key[3], key[4]))
        return jnp.stack([*words, *place], axis=-1)

    def split(key: jax.Array, shape: Shape) -> jax.Array:
        return in_place(key, threefry(key, *indices("split", key, shape)))

    def fold_in(key: jax.Array, data: Any) -> jax.Array:
        return in_place(key, threefry(key, jnp.uint32(0), jnp.asarray(data)))

    def seed(number: jax.Array) -> jax.Array:
        low = jnp.asarray(number).astype(jnp.uint32)
        none = jnp.zeros_like(low)
        return jnp.stack([none, low, none, none, none])

    return extend_random.define_prng_impl(
        key_shape=(5,),
        seed=seed,
        split=split,
        random_bits=random_bits,
        fold_in=fold_in,
        name=f"shardkit_rows_{draws.lanes}_{draws.micro_batches}_{draws.slices}",
        tag="rows",
    )


def global_index(
    draws: RandomDraws,
    grown: int | None,
    shape: Shape,
    lane: jax.Array,
    micro: jax.Array,
    sliced: int | None = None,
    cut: Any = 0,
) -> tuple[jax.Array, jax.Array]:
    """Row-major index of a part's elements in the array of all rows, as (high, low) words.

    Args:
      draws: which draws grow.
      grown: dim of the shape that grows with the rows.
      shape: of the part.
      lane: number of the part's lane.
      micro: number of its micro-batch.
      sliced: dim of the shape that grows with the length.
      cut: number of its slice of the length.
    """
    low = jnp.zeros(shape, jnp.uint32)
    high, elements = low, 1
    for d, n in enumerate(shape):
        at = jax.lax.broadcasted_iota(jnp.uint32, shape, d)
        if d == sliced:
            at = at + cut * jnp.uint32(n)
            n *= draws.slices
        if d == grown:
            at = (at + lane * jnp.uint32(n)) * jnp.uint32(draws.micro_batches) + micro
            n *= draws.lanes * draws.micro_batches
        elements *= n
        # Below 2³² elements there is no carry, and most arrays are.
        carry = _high_product(low, n) if elements > 2**32 else jnp.uint32(0)
        scaled = low * jnp.uint32(n)
        low = scaled + at
        high = high * jnp.uint32(n) + carry + (low < scaled)
    return high, low


def _high_product(x: jax.Array, n: int) -> jax.Array:
    """The high word of a 32-bit word times a number, in halves of 16 bits."""
    x0, x1, n0, n1 = x & 0xFFFF, x >> 16, jnp.uint32(n & 0xFFFF), jnp.uint32(n >> 16)
    middle = x1 * n0 + (x0 * n0 >> 16)
    return x1 * n1 + (middle >> 16) + (x0 * n1 + (middle & 0xFFFF) >> 16)
