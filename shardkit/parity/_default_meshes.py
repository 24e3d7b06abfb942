"""Which meshes are verified where none are named: all devices, and 6 and 3 of them.

Sizes that are powers of two hide faults: 3 divides what 2 does not, and the other way round.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from .._core.errors import ShardkitError, VerificationError
from ..mesh import MeshSpec, mesh_shapes

_ODD = (6, 3)


def odd_shapes(n_devices: int, axes: Sequence[str]) -> list[list[dict[str, int]]]:
    """Shapes of meshes of 6 and of 3 devices, the most even first; of fewer than `n_devices`.

    >>> odd_shapes(8, ["data", "tensor"])[0][:2]
    [{'data': 3, 'tensor': 2}, {'data': 2, 'tensor': 3}]
    """
    sizes = [size for size in _ODD if size < n_devices]
    return [sorted(mesh_shapes(size, axes), key=_longest) for size in sizes]


def default_meshes(
    axes: Sequence[str], compile_for: Callable[[Mesh], Any], odd_only: bool = False
) -> Iterator[Mesh]:
    """Yields for each number of devices the most even mesh that the step compiles for.

    Args:
      axes: of the meshes.
      compile_for: compiles the step; called again for the same mesh by whoever runs it.
      odd_only: only the meshes of 6 and of 3 devices; none of them need compile.

    Raises:
      VerificationError: the step compiles for no mesh, with the error of the most even one.
    """
    n, refused, found = len(jax.devices()), {}, False
    all_devices = [] if odd_only else [sorted(mesh_shapes(n, axes), key=_longest)]
    for shapes in (*all_devices, *odd_shapes(n, axes)):
        for shape in shapes:
            mesh = MeshSpec(dcn=None, **shape).build(
                devices=jax.devices()[: math.prod(shape.values())]
            )
            try:
                compile_for(mesh)
            except ShardkitError as error:  # it need not divide the leaves and the rows
                refused[", ".join(f"{axis}={size}" for axis, size in shape.items())] = error
            else:
                found = True
                yield mesh
                break
    if refused and not found and not odd_only:
        where, error = next(iter(refused.items()))
        headline = f"There is nothing to verify: none of {len(refused)} meshes compiles."
        raise VerificationError(f"{headline} On mesh ({where}):\n{error}") from error


def _longest(shape: dict[str, int]) -> int:
    return max(shape.values())
