"""Gradients that travel as 8-bit integers over one slow mesh axis, with error feedback.

What rounding leaves out is kept on the device that rounded, and added to what it sends in the
next step, so that over steps nothing is lost: Seide et al. 2014 (1-bit SGD), Karimireddy et al.
2019 (arXiv:1901.09847). The sum is made in two phases, as in 1-bit Adam (Tang et al. 2021,
arXiv:2102.02888): every device sums one part of what all send, rounds the sum, and sends that to
all. Rounding is to the nearest of 255 levels, with one scale per block of elements.
"""

import dataclasses

import jax
import jax.numpy as jnp

from .._core.errors import Problem, StepError, raise_all

_LEVELS = 127.0


@dataclasses.dataclass(frozen=True)
class GradientCompression:
    """Declares that gradients are summed over one mesh axis in 8 bits; for `mode="shard_map"`.

    A device sends 2(n−1)/n · N · (1 + 4/block) bytes for N elements instead of 2(n−1)/n · 4N. What
    rounding leaves out takes one f32 copy of the gradients on each device, as
    `state.model_state["compression"]`. The updates are no longer those of one device: use it across
    slow links (`dcn`), and look at the loss curve.

    Attributes:
      axis: mesh axis that splits rows.
      dtype: `"int8"`.
      block: elements that share one f32 scale.
    """

    axis: str
    dtype: str = "int8"
    block: int = 256

    def __post_init__(self) -> None:
        bad = []
        if not isinstance(self.axis, str) or not self.axis:
            bad.append(Problem("axis", f"{self.axis!r} is no name of a mesh axis", 'axis="data"'))
        if self.dtype != "int8":
            bad.append(Problem("dtype", f"{self.dtype!r} is not 'int8'", 'dtype="int8"'))
        if type(self.block) is not int or self.block < 1:
            bad.append(Problem("block", f"{self.block!r} is no positive number", "block=256"))
        raise_all(StepError, "Compression is declared wrongly.", bad)


def compressed_sum(
    x: jax.Array, error: jax.Array, how: GradientCompression
) -> tuple[jax.Array, jax.Array]:
    """Sums over a mesh axis, inside `shard_map`.

    Args:
      x: f32[N], one device's part of the sum.
      error: f32[N], what this device has left out so far.
      how: axis and block.

    Returns:
      The sum, f32[N], equal on all devices of the axis; and what this device leaves out now.
    """
    n, size = jax.lax.axis_size(how.axis), x.shape[0]
    if n == 1:  # nothing travels, so nothing is rounded
        return jax.lax.psum(x + error, how.axis), jnp.zeros_like(error)
    unit = n * how.block
    padded = jnp.pad(x + error, (0, -size % unit)).reshape(n, -1, how.block)
    levels, scales = _rounded(padded)
    left = padded - levels * scales
    sent = [jax.lax.all_to_all(y, how.axis, 0, 0) for y in (levels, scales)]
    part = (sent[0] * sent[1]).sum(0)
    levels, scales = _rounded(part)
    # What this device leaves out of its part of the sum, it adds to that part next time.
    mine = jnp.arange(n)[:, None, None] == jax.lax.axis_index(how.axis)
    left = left + jnp.where(mine, part - levels * scales, 0)
    whole = [jax.lax.all_gather(y, how.axis, to="invarying") for y in (levels, scales)]
    return (whole[0] * whole[1]).reshape(-1)[:size], left.reshape(-1)[:size]


def _rounded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """i8[..., block] levels and f32[..., 1] scales whose product is nearest to `x`."""
    scales = jnp.abs(x).max(-1, keepdims=True) / _LEVELS
    levels = jnp.round(x / jnp.where(scales == 0, 1, scales))
    return levels.astype(jnp.int8), scales
