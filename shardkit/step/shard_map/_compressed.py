"""How a buffer of gradients is summed: as it is, or compressed over one axis."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ...nn._manual_axis_rules import Axes
from ...parallel import GradientCompression, compressed_sum
from .._layout import RESIDUALS
from .._objective import inverse_weight


class GradientSum:
    """Sums buffers over mesh axes, and keeps what compression leaves out of them.

    Attributes:
      model_state: model state with the residuals as the buffers summed so far left them.
    """

    def __init__(
        self, how: GradientCompression | None, model_state: Any, weight: jax.Array
    ) -> None:
        """Takes the residuals out of the model state.

        Args:
          how: None sums as it is.
          model_state: model state of one device.
          weight: what gradients will be divided by, so that residuals of steps are alike.
        """
        self.model_state, self._how, self._weight = model_state, how, weight

    def __call__(self, buffer: jax.Array, axes: Axes, numbers: Sequence[int]) -> jax.Array:
        """Sums a buffer [1, N] of some leaves."""
        if self._how is None:
            return jax.lax.psum(buffer, axes)
        fast = tuple(axis for axis in axes if axis != self._how.axis)
        buffer = jax.lax.psum(buffer, fast) if fast else buffer
        flat, structure = jax.tree.flatten(self.model_state[RESIDUALS])
        error = jnp.concatenate([flat[n].reshape(-1) for n in numbers])
        mean = buffer[0].astype(jnp.float32) * inverse_weight(self._weight)
        total, error = compressed_sum(mean, error, self._how)
        start = 0
        for n in numbers:
            end = start + math.prod(flat[n].shape)
            flat[n] = error[start:end].reshape(flat[n].shape)
            start = end
        self.model_state = {**self.model_state, RESIDUALS: structure.unflatten(flat)}
        return (total * self._weight).astype(buffer.dtype)[None]
