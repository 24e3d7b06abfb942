"""Sums a buffer of gradients, compressed over one mesh axis if the strategy says so."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ..._core.types import PyTree, Scalar
from ...nn._manual_axis_rules import Axes
from ...parallel import GradientCompression, compressed_sum
from .._layout import RESIDUALS
from .._objective import inverse_weight


class GradientSum:
    """Sums buffers over mesh axes, and keeps the residuals that compression leaves.

    Attributes:
      model_state: model state of one device, its residuals updated by every sum.
    """

    def __init__(
        self, compression: GradientCompression | None, model_state: PyTree, weight: Scalar
    ) -> None:
        """Takes the residuals of the last step.

        Args:
          compression: None sums without compression.
          model_state: model state of one device.
          weight: the divisor of the gradients, so that residuals are those of a mean and steps of
            different weight can share them.
        """
        self.model_state, self._compression, self._weight = model_state, compression, weight

    def __call__(self, buffer: jax.Array, axes: Axes, indices: Sequence[int]) -> jax.Array:
        """Sums a buffer [1, n] of the leaves with these indices."""
        if self._compression is None:
            return jax.lax.psum(buffer, axes)
        fast_axes = tuple(axis for axis in axes if axis != self._compression.axis)
        buffer = jax.lax.psum(buffer, fast_axes) if fast_axes else buffer
        residuals, structure = jax.tree.flatten(self.model_state[RESIDUALS])
        error = jnp.concatenate([residuals[n].reshape(-1) for n in indices])
        mean = buffer[0].astype(jnp.float32) * inverse_weight(self._weight)
        total, error = compressed_sum(mean, error, self._compression)
        start = 0
        for n in indices:
            end = start + math.prod(residuals[n].shape)
            residuals[n] = error[start:end].reshape(residuals[n].shape)
            start = end
        self.model_state = {**self.model_state, RESIDUALS: structure.unflatten(residuals)}
        return (total * self._weight).astype(buffer.dtype)[None]
