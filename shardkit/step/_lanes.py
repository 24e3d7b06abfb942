"""Randomness that does not know how many lanes a batch was split into.

A lane's loss draws noise of the lane's shape, `[rows of the lane, …]`. To be the same on every
mesh, that draw must be the lane's slice of what one device would draw for all rows,
`[rows, …]`. `lane_keys` gives each lane a key whose generator does exactly this: bits are
threefry of the *global* index of each element, and which dim of a draw grows with the rows is
not guessed: the loss is traced for one lane and for all rows, and the draws are compared.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend import random as extend_random

from .._errors import Problem, StepError, raise_all
from .._tree import short_type

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Draws:
    """Which draws of a loss grow with the rows it is given.

    Attributes:
      lanes: number of equal parts that the rows are split into.
      grown: `{(kind, lane shape): dim}` for draws of `"bits"` or `"split"` that grow.
    """

    lanes: int
    grown: tuple[tuple[tuple[str, Shape], int], ...] = ()


def find_draws(
    loss: Callable[..., Any], lanes: int, lane_args: tuple[Any, ...], all_args: tuple[Any, ...]
) -> Draws:
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
        return Draws(1)
    lane = list(_random_eqns(jax.make_jaxpr(loss)(*lane_args).jaxpr))
    whole = list(_random_eqns(jax.make_jaxpr(loss)(*all_args).jaxpr))
    problems: list[Problem] = []
    if [kind for kind, _ in lane] != [kind for kind, _ in whole]:
        problems.append(
            Problem("loss_fn", "draws another number of times for other numbers of rows")
        )
    dims: dict[tuple[str, Shape], int | None] = {}
    for (kind, small), (_, large) in zip(lane, whole, strict=False):
        dim = _grown_dim(small, large, lanes)
        subject = f"{kind} {short_type(small, jnp.uint32.dtype)}"
        if kind == "fold_in" and small != large:
            problems.append(Problem(subject, "folds in numbers counted over the rows of the batch"))
        elif dim is None and small != large:
            problems.append(Problem(subject, f"is {large} for {lanes} times the rows"))
        elif dims.setdefault((kind, small), dim) != dim:
            problems.append(
                Problem(subject, "is drawn once for the rows and once for something else")
            )
    fix = 'sk.Accumulate(k, reduce="each"), whose draws are those of the whole micro-batch'
    raise_all(StepError, "Randomness of the loss cannot be split by lane.", problems, fix)
    return Draws(lanes, tuple((key, dim) for key, dim in dims.items() if dim is not None))


def lane_keys(key: jax.Array, draws: Draws) -> jax.Array:
    """Returns typed PRNG keys, one per lane: key[lanes]."""
    words = jax.random.bits(key, (2,), jnp.uint32)
    lane = jnp.arange(draws.lanes, dtype=jnp.uint32)
    data = jnp.concatenate([jnp.broadcast_to(words, (draws.lanes, 2)), lane[:, None]], axis=1)
    return jax.random.wrap_key_data(data, impl=_generator(draws))


def _grown_dim(small: Shape, large: Shape, lanes: int) -> int | None:
    if len(small) != len(large):
        return None
    changed = [d for d, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    return (
        changed[0] if len(changed) == 1 and small[changed[0]] * lanes == large[changed[0]] else None
    )


def _random_eqns(jaxpr: core.Jaxpr) -> Iterator[tuple[str, Shape]]:
    """Every draw of a jaxpr in order, as (kind, shape)."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "random_bits":
            yield "bits", tuple(eqn.params["shape"])
        elif name == "random_split":
            yield "split", tuple(eqn.params["shape"])
        elif name == "random_fold_in":
            yield "fold_in", tuple(eqn.invars[1].aval.shape)
        for inner in core.jaxprs_in_params(eqn.params):
            yield from _random_eqns(inner)


@functools.cache
def _generator(draws: Draws) -> Any:
    """A PRNG implementation with key words (k0, k1, lane)."""
    dims = dict(draws.grown)

    def threefry(key: jax.Array, high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
        high, low = jnp.broadcast_arrays(high.astype(jnp.uint32), low.astype(jnp.uint32))
        k0, k1 = (jnp.broadcast_to(word, high.shape) for word in (key[0], key[1]))
        first, second = extend_random.threefry2x32_p.bind(k0, k1, high, low)
        return first, second

    def indices(kind: str, key: jax.Array, shape: Shape) -> tuple[jax.Array, jax.Array]:
        """Global position of each element: (index in dim 0, row-major index in the rest)."""
        grown = dims.get((kind, shape))
        sizes = [n * draws.lanes if d == grown else n for d, n in enumerate(shape)]
        low = jnp.zeros(shape, jnp.uint32)
        high = low
        for d, n in enumerate(shape):
            at = jax.lax.broadcasted_iota(jnp.uint32, shape, d)
            at = at + key[2] * jnp.uint32(n) if d == grown else at
            high, low = (at, low) if d == 0 else (high, low * jnp.uint32(sizes[d]) + at)
        return high, low

    def random_bits(key: jax.Array, width: int, shape: Shape) -> jax.Array:
        first, second = threefry(key, *indices("bits", key, shape))
        if width == 64:
            return (first.astype(jnp.uint64) << 32) | second.astype(jnp.uint64)
        return (first ^ second).astype({8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[width])

    def with_lane(key: jax.Array, words: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.stack([*words, jnp.broadcast_to(key[2], words[0].shape)], axis=-1)

    def split(key: jax.Array, shape: Shape) -> jax.Array:
        return with_lane(key, threefry(key, *indices("split", key, shape)))

    def fold_in(key: jax.Array, data: Any) -> jax.Array:
        # A high word that no index of `split` reaches keeps the two families apart.
        return with_lane(key, threefry(key, jnp.uint32(0xFFFFFFFF), jnp.asarray(data)))

    def seed(number: jax.Array) -> jax.Array:
        low = jnp.asarray(number).astype(jnp.uint32)
        return jnp.stack([jnp.zeros_like(low), low, jnp.zeros_like(low)])

    return extend_random.define_prng_impl(
        key_shape=(3,),
        seed=seed,
        split=split,
        random_bits=random_bits,
        fold_in=fold_in,
        name=f"shardkit_lanes_{draws.lanes}",
        tag="lane",
    )
