"""Reduces the gradients of a step with explicit collectives, in few large buffers.

Leaves that are reduced over the same mesh axes share one buffer, so the number of collectives does
not grow with the number of leaves. A buffer to scatter is `[shards, elements of a shard]`; each
device keeps its row, which holds its shard of every leaf. a[4,2] and b[2] over 2 devices, dim 0:

    row 0   a00 a01 a10 a11 b0
    row 1   a20 a21 a30 a31 b1
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from ..._core.types import PyTree
from ...nn._manual_axis_rules import Axes, Dims
from ...parallel import GradientCompression, compressed_sum
from .._layout import RESIDUALS

# (buffer [1, n], mesh axes, indices of the leaves in the buffer) → the sum over the axes.
SumBuffer = Callable[[jax.Array, Axes, Sequence[int]], jax.Array]


@dataclasses.dataclass(frozen=True)
class ParamPlan:
    """How one parameter is stored and gathered, and how its gradient is reduced."""

    stored: Dims  # mesh axes per dim that split the parameter
    gathered: Dims  # those of them that the step gathers before it calls the loss
    # mesh axes per dim over which the gradient is reduce-scattered: the gathered ones, and those
    # that split the update further than the parameter
    scattered: Dims
    summed: Axes  # the other mesh axes over which the gradient is summed

    @property
    def varying(self) -> Axes:
        """Mesh axes along which gradients differ before they are reduced."""
        return tuple(
            dict.fromkeys((*flatten_dims(self.stored), *flatten_dims(self.scattered), *self.summed))
        )


def flatten_dims(dims: Dims) -> Axes:
    """Mesh axes of all dims, in their order."""
    return tuple(axis for axes in dims for axis in axes)


def reduce_gradients(
    grads: Sequence[jax.Array], parameters: Sequence[ParamPlan], sum_buffer: SumBuffer
) -> list[jax.Array]:
    """Sums the gradients of all devices' rows, in their own dtypes, into each device's shards.

    They are leaves on this device, shaped as the loss sees the parameters.
    """
    groups: dict[tuple[Axes, Axes, frozenset[str], str], list[int]] = {}
    for index, plan in enumerate(parameters):
        # JAX types a buffer as varying over the axes of all its leaves together, so only leaves
        # that vary over the same axes share one.
        varying, dtype = frozenset(plan.varying), grads[index].dtype.name
        group = flatten_dims(plan.scattered), plan.summed, varying, dtype
        groups.setdefault(group, []).append(index)
    reduced: dict[int, jax.Array] = {}
    for (scattered, summed, *_), indices in groups.items():
        leaves = [grads[n] for n in indices]
        dims = [parameters[n].scattered for n in indices]
        if not scattered and not summed:
            reduced |= dict(zip(indices, leaves, strict=True))
            continue
        buffer = jnp.concatenate(list(map(_pack_shards, leaves, dims)), axis=1)
        if scattered:
            buffer = jax.lax.psum_scatter(buffer, scattered, scatter_dimension=0, tiled=True)
        if summed:
            buffer = sum_buffer(buffer, summed, indices)
        reduced |= _unpack_shards(buffer[0], indices, leaves, dims)
    return [reduced[n] for n in range(len(grads))]


class GradientSum:
    """Sums buffers over mesh axes, and keeps the residuals that compression leaves."""

    def __init__(self, compression: GradientCompression | None, model_state: PyTree) -> None:
        """Takes the residuals of the last step, from the model state of one device.

        They are those of gradients of a mean, so steps of different weight share them. None sums
        without compression.
        """
        self.model_state, self._compression = model_state, compression

    def __call__(self, buffer: jax.Array, axes: Axes, indices: Sequence[int]) -> jax.Array:
        """Sums a buffer [1, n] of the leaves with these indices."""
        if self._compression is None:
            return jax.lax.psum(buffer, axes)
        fast_axes = tuple(axis for axis in axes if axis != self._compression.axis)
        buffer = jax.lax.psum(buffer, fast_axes) if fast_axes else buffer
        residuals, structure = jax.tree.flatten(self.model_state[RESIDUALS])
        error = jnp.concatenate([residuals[n].reshape(-1) for n in indices])
        mean = buffer[0].astype(jnp.float32)
        total, error = compressed_sum(mean, error, self._compression)
        start = 0
        for n in indices:
            end = start + math.prod(residuals[n].shape)
            residuals[n] = error[start:end].reshape(residuals[n].shape)
            start = end
        self.model_state = {**self.model_state, RESIDUALS: structure.unflatten(residuals)}
        return total.astype(buffer.dtype)[None]


def _unpack_shards(
    row: jax.Array, indices: Sequence[int], leaves: Sequence[jax.Array], dims: Sequence[Dims]
) -> dict[int, jax.Array]:
    """Splits a row of a buffer into the shards of its leaves."""
    out, start = {}, 0
    for index, x, leaf_dims in zip(indices, leaves, dims, strict=True):
        shape = tuple(n // _axis_size(axes) for n, axes in zip(x.shape, leaf_dims, strict=True))
        end = start + math.prod(shape)
        out[index] = row[start:end].reshape(shape)
        start = end
    return out


def _pack_shards(x: jax.Array, dims: Dims) -> jax.Array:
    """`[shards, elements of a shard]`, shards in the order of the mesh axes of their dims."""
    sizes = [_axis_size(axes) for axes in dims]
    # [4, 6] over sizes (2, 3): [2, 2, 3, 2] → [2, 3, 2, 2] → [6, 4].
    split = [(size, n // size) for n, size in zip(x.shape, sizes, strict=True)]
    tiles = x.reshape([n for pair in split for n in pair])
    order = [*range(0, 2 * x.ndim, 2), *range(1, 2 * x.ndim, 2)]
    return tiles.transpose(order).reshape(math.prod(sizes), -1)


def _axis_size(axes: Axes) -> int:
    return jax.lax.axis_size(axes) if axes else 1
