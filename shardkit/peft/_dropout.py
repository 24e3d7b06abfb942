"""Which elements of an adapter's input are dropped: the same ones on every mesh.

The key of a product is folded from the path of its weight and from how many products with it came
before, in the same loop body, branch or function. Not from its place in the trace: inside a
`shard_map` JAX adds operations, and every later product would drop other elements.

    loss    x W₁ … scan(y W₂) … z W₁      W₁, 0    scan, 0 → turn → W₂, 0    W₁, 1
"""

import dataclasses
import zlib
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax

from .._core.types import Key

# Folded into a key that a function of a layer stack gets, so that the model's own draws stay.
_OF_FUNCTION = 0x10AC


@dataclasses.dataclass(frozen=True)
class MaskKey:
    """Draws the masks of the products in one loop body, branch or function."""

    key: Key  # key[], or key[*rows] of rows that are computed wherever a strategy sends them
    # how often each name was folded in, filled while products are computed
    counts: Counter[str] = dataclasses.field(default_factory=Counter)

    def next(self, name: str) -> "MaskKey":
        """Returns the key of what comes next under a name."""
        place = self.counts[name]
        self.counts[name] += 1
        return self.fold(zlib.crc32(name.encode())).fold(place)

    def fold(self, number: int | jax.Array) -> "MaskKey":
        """Returns the key with a number folded in."""
        fold = jax.random.fold_in
        for _ in self.key.shape:
            fold = jax.vmap(fold, (0, None))
        return MaskKey(fold(self.key, number))

    @classmethod
    def of_function(cls, given: Key | None) -> "MaskKey":
        """Returns the key of a call of a function that gets a key itself, as all with weights."""
        assert given is not None
        return cls(given).fold(_OF_FUNCTION)

    def fits(self, x: jax.Array) -> bool:
        """Whether x has the rows that there are keys for."""
        return x.shape[: self.key.ndim] == self.key.shape

    def drop(
        self, x: jax.Array, rate: float, cut: Mapping[int, tuple[int, Any]] = MappingProxyType({})
    ) -> jax.Array:
        """Returns x, floats [*rows, ...], without some of its elements, the others scaled up.

        An element is dropped with probability `rate`. `cut` is `{dim: (size, start)}` of dims of
        which x is this device's part.
        """

        def draw(key: Key) -> jax.Array:
            rows = self.key.ndim
            whole = [cut[dim][0] if dim in cut else size for dim, size in enumerate(x.shape)]
            kept = jax.random.bernoulli(key, 1 - rate, whole[rows:])
            for dim, (_, start) in cut.items():
                kept = jax.lax.dynamic_slice_in_dim(kept, start, x.shape[dim], dim - rows)
            return kept

        for _ in self.key.shape:
            draw = jax.vmap(draw)
        return jax.numpy.where(draw(self.key), x / (1 - rate), 0).astype(x.dtype)
