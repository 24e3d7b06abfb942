"""A weight that is adapted, and its two factors: which dims they have and how they start.

One letter says what each dim of a weight is: `i` an input, `o` an output, `s` stacked (layers,
experts). A has the stacked and input dims and then the rank, B the stacked dims, the rank and the
output dims:

    query [layers, embed, heads, head_dim]    "sioo"
    a     [layers, embed, rank]               b    [layers, rank, heads, head_dim]
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from .._core.tree import Leaf, join_path
from .._core.types import Follows

ADAPTERS = "lora"


@dataclasses.dataclass(frozen=True)
class AdaptedLeaf:
    """A weight W that computes as W + scale · A B."""

    leaf: Leaf  # its path in the parameters, shape, dtype and logical axes
    rank: int  # of A B
    dims: str  # one letter per dim: `s`, `i` or `o`; "" while they are still to be found
    scale: float  # of A B

    def having(self, letters: str) -> list[int]:
        """The dims that are one of these letters, in order."""
        return [dim for dim, letter in enumerate(self.dims) if letter in letters]

    def size(self, letters: str) -> int:
        """Number of elements along the dims that are one of these letters."""
        return math.prod(self.leaf.shape[dim] for dim in self.having(letters))

    @property
    def factors(self) -> dict[str, tuple[int | None, ...]]:
        """For each factor the dims of the weight that its own are; None is the rank."""
        stacked = self.having("s")
        return {"a": (*stacked, *self.having("i"), None), "b": (*stacked, None, *self.having("o"))}

    def shape(self, factor: str) -> tuple[int, ...]:
        """The shape of `"a"` or `"b"`."""
        dims = self.factors[factor]
        return tuple(self.rank if dim is None else self.leaf.shape[dim] for dim in dims)

    def axes(self, factor: str) -> tuple[str | None, ...] | None:
        """The logical axes of `"a"` or `"b"`; None if the weight has none."""
        names, dims = self.leaf.axes, self.factors[factor]
        return names and tuple(None if dim is None else names[dim] for dim in dims)

    def follows(self, tree: str) -> list[Follows]:
        """The factors below `tree`, each split like the dims of the weight that it has."""
        of, own = join_path(tree, self.leaf.path), join_path(ADAPTERS, self.leaf.path)
        return [Follows(join_path(own, name), of, dims) for name, dims in self.factors.items()]

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        """f32: A uniform within ±1/√inputs, as PEFT draws it, and B zero."""
        bound = self.size("i") ** -0.5
        a = jax.random.uniform(key, self.shape("a"), jnp.float32, -bound, bound)
        return {"a": a, "b": jnp.zeros(self.shape("b"))}

    def spread(self, factor: str, value: jax.Array) -> jax.Array:
        """A factor with all dims of the weight, of size 1 where it lacks one, and then the rank."""
        dims = self.factors[factor]
        present = sorted(dim for dim in dims if dim is not None)
        ordered = value.transpose(*(dims.index(dim) for dim in present), dims.index(None))
        # One device may have a shard of the factor.
        sizes = dict(zip(present, ordered.shape, strict=False))
        return ordered.reshape(*(sizes.get(d, 1) for d in range(len(self.dims))), self.rank)

    def merge(self, weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """W + scale · A B in the dtype of W; the sum is computed in f32 or wider."""
        letters = [chr(ord("a") + dim) for dim in range(len(self.dims))]
        terms = {
            name: "".join("z" if dim is None else letters[dim] for dim in dims)
            for name, dims in self.factors.items()
        }
        wide = jnp.promote_types(weight.dtype, jnp.float32)
        equation = f"{terms['a']},{terms['b']}->{''.join(letters)}"
        delta = jnp.einsum(equation, a.astype(wide), b.astype(wide))
        return (weight.astype(wide) + self.scale * delta).astype(weight.dtype)
