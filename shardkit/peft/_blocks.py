"""Weights in few bits: blocks along the last dim that share one scale.

A block is divided by its largest magnitude, its scale, and each quotient is rounded to the nearest
of the kind's levels. Two nf4 codes are one byte, the first one in its upper half:

    weight  f32[4, 8]      int8  codes int8[4, 8]     nf4  codes uint8[4, 4]
    block 4                      scales f32[4, 2]          scales f32[4, 2]
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.tree import Leaf, join_path
from .._core.types import Follows

SCALES = "scales"

# Quantiles of a normal distribution within [-1, 1], 0 among them: Dettmers et al. 2023, appendix E.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class QuantizedLeaf:
    """A weight whose elements are codes."""

    # its path in the parameters, shape, dtype and logical axes before it was quantized; what is
    # computed with it has this dtype
    leaf: Leaf
    kind: str  # `"int8"` or `"nf4"`
    block: int  # number of elements along the last dim that share a scale

    def follows(self) -> Follows:
        """The scales, split over devices like their codes."""
        of, dims = self.leaf.path, tuple(range(len(self.leaf.shape)))
        return Follows(join_path(SCALES, of), of, dims, self.fix)

    def fix(self, shards: int) -> str:
        """What to declare where one of so many shards of the last dim is no whole number of blocks.

        >>> QuantizedLeaf(Leaf("up", (8, 128), np.dtype("f")), "nf4", 64).fix(4)
        'sk.quantize(..., {"up": ("nf4", 32)}), or a rule that leaves the last dim of up whole'
        """
        path, block = self.leaf.path, math.gcd(self.leaf.shape[-1] // shards, self.block)
        rule = f"a rule that leaves the last dim of {path} whole"
        if block % 2 and self.kind == "nf4":
            return rule
        return f'sk.quantize(..., {{"{path}": ("{self.kind}", {block})}}), or {rule}'

    def quantize(self, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Codes and scales of a weight of the declared shape."""
        blocks = self._in_blocks(weight.astype(jnp.float32))
        scales = jnp.abs(blocks).max(-1)
        parts = blocks / jnp.where(scales > 0, scales, 1)[..., None]
        if self.kind == "int8":
            return jnp.round(parts * 127).astype(jnp.int8).reshape(weight.shape), scales
        # The nearest level: the number of middles between two levels that lie below.
        middles = np.asarray([(a + b) / 2 for a, b in itertools.pairwise(_NF4)], "f")
        codes = jnp.searchsorted(middles, parts).astype(jnp.uint8).reshape(*weight.shape[:-1], -1)
        return codes[..., 0::2] << 4 | codes[..., 1::2], scales

    def dequantize(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
        """The weight that codes and scales stand for, or a part of it: a layer, a shard.

        A step whose compute dtype is another than f32 casts the scales to it; so is the weight.
        """
        if self.kind == "int8":
            parts = codes.astype(jnp.float32) / 127
        else:
            both = jnp.stack([codes >> 4, codes & 15], -1).reshape(*codes.shape[:-1], -1)
            parts = jnp.asarray(_NF4, jnp.float32)[both]
        weight = self._in_blocks(parts) * scales[..., None]
        dtype = self.leaf.dtype if scales.dtype == jnp.float32 else scales.dtype
        return weight.reshape(parts.shape).astype(dtype)

    def _in_blocks(self, x: Any) -> Any:
        return x.reshape(*x.shape[:-1], -1, self.block)
