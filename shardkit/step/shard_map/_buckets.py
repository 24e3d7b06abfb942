"""The one place where a step with explicit collectives reduces gradients.

Leaves that are split and reduced alike, over the same mesh axes, travel in one buffer: one
collective per kind of leaf, whatever the number of leaves. The buffer of leaves that are scattered
is `[shards, elements of a shard]`, so that each device's row is its own part of every leaf.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from ...nn._manual_axis_rules import Axes, Dims

# A buffer, mesh axes, and the numbers of the leaves in the buffer → the sum over the axes.
SumBuffer = Callable[[jax.Array, Axes, Sequence[int]], jax.Array]


@dataclasses.dataclass(frozen=True)
class ParamPlan:
    """How one parameter is stored, and what becomes of its gradient on each device.

    Attributes:
      stored: mesh axes per dim that the parameter is split over.
      whole: those of them that are gathered before the loss.
      scattered: mesh axes per dim that gradients are summed and scattered over: those gathered
        before, and those that split the update further than the parameter.
      summed: mesh axes that gradients are summed over besides.
    """

    stored: Dims
    whole: Dims
    scattered: Dims
    summed: Axes

    @property
    def differing(self) -> Axes:
        """Mesh axes along which gradients differ before they are reduced."""
        return tuple(
            dict.fromkeys((*flatten_dims(self.stored), *flatten_dims(self.scattered), *self.summed))
        )


def flatten_dims(dims: Dims) -> Axes:
    """Mesh axes of all dims, in their order."""
    return tuple(axis for axes in dims for axis in axes)


def reduce_gradients(
    grads: Sequence[jax.Array], parameters: Sequence[ParamPlan], dtype: str, summed: SumBuffer
) -> list[jax.Array]:
    """Sums the gradients that every device made of its own rows.

    Args:
      grads: as the loss saw the parameters, on each device.
      parameters: of the same leaves.
      dtype: in which they are summed.
      summed: sums a buffer; see `SumBuffer`.

    Returns:
      Gradients of each device's shards, in `dtype`.
    """
    groups: dict[tuple[Axes, Axes, frozenset[str]], list[int]] = {}
    for number, one in enumerate(parameters):
        # In one buffer with a leaf that differs over more axes, a leaf would seem to do so too.
        alike = flatten_dims(one.scattered), one.summed, frozenset(one.differing)
        groups.setdefault(alike, []).append(number)
    reduced: dict[int, jax.Array] = {}
    for (scattered, over, _), numbers in groups.items():
        leaves = [grads[n].astype(dtype) for n in numbers]
        parts = [parameters[n].scattered for n in numbers]
        if not scattered and not over:
            reduced |= dict(zip(numbers, leaves, strict=True))
            continue
        buffer = jnp.concatenate(
            [_pack_shards(x, dims) for x, dims in zip(leaves, parts, strict=True)], 1
        )
        if scattered:
            buffer = jax.lax.psum_scatter(buffer, scattered, scatter_dimension=0, tiled=True)
        if over:
            buffer = summed(buffer, over, numbers)
        reduced |= _unpack_shards(buffer[0], numbers, leaves, parts)
    return [reduced[n] for n in range(len(grads))]


def _unpack_shards(
    row: jax.Array, numbers: Sequence[int], leaves: Sequence[jax.Array], parts: Sequence[Dims]
) -> dict[int, jax.Array]:
    """Cuts a row of a buffer into the shards that it was made of."""
    out, start = {}, 0
    for number, x, dims in zip(numbers, leaves, parts, strict=True):
        shape = tuple(n // _axis_size(axes) for n, axes in zip(x.shape, dims, strict=True))
        end = start + math.prod(shape)
        out[number] = row[start:end].reshape(shape)
        start = end
    return out


def _pack_shards(x: jax.Array, dims: Dims) -> jax.Array:
    """[shards, elements of a shard]: the parts of an array in the order of its mesh axes."""
    ways = [_axis_size(axes) for axes in dims]
    apart = x.reshape([n for size, w in zip(x.shape, ways, strict=True) for n in (w, size // w)])
    order = [*range(0, 2 * x.ndim, 2), *range(1, 2 * x.ndim, 2)]
    return apart.transpose(order).reshape(math.prod(ways), -1)


def _axis_size(axes: Axes) -> int:
    return jax.lax.axis_size(axes) if axes else 1
