"""Random draws that do not depend on how the rows of a batch are split.

A loss draws noise in the shape of its rows, such as `bernoulli(key, 0.9, [rows, embed])`. For the
numbers to be the same on every mesh, the draw of one part of the rows has to be that part's slice
of the draw that one device makes for all rows. `per_shard_keys` and `part_keys` return keys whose
generator does this: like `jax.random` for its default keys, it computes bits as threefry of the
row-major index of each element, but of the index in the array of *all* rows. Which dim of a draw
counts rows is not guessed: the loss is traced with the rows of one part and with all of them, and
the shapes of its draws are compared.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend import random as extend_random

from .errors import Problem, StepError, raise_all
from .tracing import equations
from .tree import short_type
from .types import Key

Shape = tuple[int, ...]
Draw = tuple[str, Shape]


@dataclasses.dataclass(frozen=True)
class RandomDraws:
    """How the rows of a batch are split, and which dims of a loss's draws are split with them.

    Attributes:
      gradient_shards: number of contiguous blocks that the rows of a micro-batch are split into.
      row_dims: `((kind, shape of one part's draw), dim)` for each draw of `"bits"` or `"split"`
        that grows with the rows.
      micro_batches: number k of micro-batches; micro-batch i holds rows i, i+k, i+2k, ….
      length_shards: number of contiguous blocks that the length of each row is split into.
      length_dims: as `row_dims`, for draws that grow with the length.
    """

    gradient_shards: int
    row_dims: tuple[tuple[Draw, int], ...] = ()
    micro_batches: int = 1
    length_shards: int = 1
    length_dims: tuple[tuple[Draw, int], ...] = ()


def match_draws(
    loss: Callable[..., Any], shards: int, shard_args: tuple[Any, ...], all_args: tuple[Any, ...]
) -> RandomDraws:
    """Traces a loss with the rows of one gradient shard and with all rows, and matches its draws.

    Args:
      loss: any traceable function.
      shards: number of gradient shards.
      shard_args: abstract arguments with the rows of one shard.
      all_args: abstract arguments with the rows of all shards.

    Raises:
      StepError: a draw depends on the number of rows in a way that cannot be split.
    """
    if shards == 1:
        return RandomDraws(1)
    part, whole = (list_draws(jax.make_jaxpr(loss)(*args).jaxpr) for args in (shard_args, all_args))
    return RandomDraws(shards, match_dims(part, whole, shards))


def match_dims(part: list[Draw], whole: list[Draw], parts: int) -> tuple[tuple[Draw, int], ...]:
    """Finds the dim along which each draw of a part is larger for the whole.

    Args:
      part: draws of a loss on one part of its rows (or of its length), in order.
      whole: its draws on all parts together.
      parts: number of parts.

    Returns:
      `((kind, shape for one part), dim)` for each draw that grows: a dropout mask bits[4, 8] that
      is bits[12, 8] for 3 times the rows has `(("bits", (4, 8)), 0)`.

    Raises:
      StepError: a draw grows in another way.
    """
    problems: list[Problem] = []
    if [kind for kind, _ in part] != [kind for kind, _ in whole]:
        why = "the number of its random draws depends on the number of rows"
        problems.append(Problem("loss_fn", why))
    dims: dict[Draw, int | None] = {}
    for (kind, small), (_, large) in zip(part, whole, strict=False):
        dim = _find_grown_dim(small, large, parts)
        subject = f"{kind} {short_type(small, jnp.uint32.dtype)}"
        if kind == "fold_in" and small != large:
            problems.append(Problem(subject, "folds in numbers counted over the rows of the batch"))
        elif kind == "gamma" and small != large:
            why = "is no draw that can be made in parts; nor are beta, dirichlet, chisquare and t"
            problems.append(Problem(subject, why))
        elif dim is None and small != large:
            problems.append(Problem(subject, f"is {large} for {parts} times the rows"))
        elif dims.setdefault((kind, small), dim) != dim:
            why = "is drawn once for the rows and once for something else of the same shape"
            problems.append(Problem(subject, why))
    fix = 'sk.Accumulate(k, reduce="every"), whose draws are those of the whole micro-batch'
    headline = "The random draws of the loss cannot be split over gradient shards."
    raise_all(StepError, headline, problems, fix)
    return tuple((key, dim) for key, dim in dims.items() if dim is not None)


def per_shard_keys(key: Key, draws: RandomDraws) -> Key:
    """Returns one typed PRNG key per gradient shard: key[shards]."""
    words = threefry_words(key)
    shards = jnp.arange(draws.gradient_shards, dtype=jnp.uint32)
    return jax.vmap(lambda shard: part_keys(words, draws, shard, jnp.uint32(0)))(shards)


def part_keys(
    words: jax.Array, draws: RandomDraws, shard: Any, micro_batch: Any, length_shard: Any = 0
) -> Key:
    """Returns typed PRNG keys for one part of the rows: key[...].

    Args:
      words: u32[..., 2], the data of threefry keys. The part draws its slice of what these keys
        draw for all rows.
      draws: which dims of the draws are split.
      shard: index of the gradient shard, i32[].
      micro_batch: index of the micro-batch, i32[].
      length_shard: index of the block of the length, i32[].
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


def _find_grown_dim(small: Shape, large: Shape, parts: int) -> int | None:
    """The only dim in which two shapes differ, if it is `parts` times as large in the second."""
    if len(small) != len(large):
        return None
    changed = [d for d, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    fits = len(changed) == 1 and small[changed[0]] * parts == large[changed[0]]
    return changed[0] if fits else None


def list_draws(jaxpr: core.Jaxpr) -> list[Draw]:
    """Lists every draw of a jaxpr in order, as (kind, shape)."""
    draws: list[Draw] = []
    for eqn in equations(jaxpr):
        name = eqn.primitive.name
        if name == "random_bits":
            draws.append(("bits", tuple(eqn.params["shape"])))
        elif name == "random_split":
            draws.append(("split", tuple(eqn.params["shape"])))
        elif name == "random_fold_in":
            folded: Any = eqn.invars[1].aval
            draws.append(("fold_in", tuple(folded.shape)))
        elif name == "random_gamma":
            drawn: Any = eqn.outvars[0].aval
            draws.append(("gamma", tuple(drawn.shape)))
    return draws


@functools.lru_cache(maxsize=64)
def _generator(draws: RandomDraws) -> Any:
    """A PRNG implementation whose keys are threefry keys that know which part they draw for.

    A key is five words: (k0, k1) of the threefry key, then the indices of the gradient shard, the
    micro-batch and the block of the length. For draws of `[rows, 8]` over 2 gradient shards of 3
    rows, the key (k0, k1, 1, 0, 0) draws `[3, 8]` as rows 3, 4, 5 of what (k0, k1) draws as
    `[6, 8]`: element [0, 0] is threefry(k0, k1, 24), since its index among all rows is 3 · 8.
    `split` and `fold_in` change (k0, k1) as `jax.random` does and keep the other three words, so
    a key split off inside the loss draws for the same part.
    """
    row_dims, length_dims = dict(draws.row_dims), dict(draws.length_dims)

    def threefry(key: jax.Array, high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
        high, low = jnp.broadcast_arrays(high.astype(jnp.uint32), low.astype(jnp.uint32))
        k0, k1 = (jnp.broadcast_to(word, high.shape) for word in (key[0], key[1]))
        first, second = extend_random.threefry2x32_p.bind(k0, k1, high, low)
        return first, second

    def indices(kind: str, key: jax.Array, shape: Shape) -> tuple[jax.Array, jax.Array]:
        return global_index(
            draws,
            shape,
            row_dim=row_dims.get((kind, shape)),
            shard=key[2],
            micro_batch=key[3],
            length_dim=length_dims.get((kind, shape)),
            length_shard=key[4],
        )

    def random_bits(key: jax.Array, width: int, shape: Shape) -> jax.Array:
        first, second = threefry(key, *indices("bits", key, shape))
        if width == 64:
            return (first.astype(jnp.uint64) << 32) | second.astype(jnp.uint64)
        return (first ^ second).astype({8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[width])

    def for_same_part(key: jax.Array, words: tuple[jax.Array, jax.Array]) -> jax.Array:
        part = (jnp.broadcast_to(word, words[0].shape) for word in (key[2], key[3], key[4]))
        return jnp.stack([*words, *part], axis=-1)

    def split(key: jax.Array, shape: Shape) -> jax.Array:
        return for_same_part(key, threefry(key, *indices("split", key, shape)))

    def fold_in(key: jax.Array, data: Any) -> jax.Array:
        return for_same_part(key, threefry(key, jnp.uint32(0), jnp.asarray(data)))

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
        tag="rows",
    )


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

    Args:
      draws: how the rows and the length are split.
      shape: shape of one part's draw.
      row_dim: dim of the shape that counts rows; None if none does.
      shard: index of the part's gradient shard.
      micro_batch: index of its micro-batch.
      length_dim: dim of the shape that counts positions of the length; None if none does.
      length_shard: index of its block of the length.
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
