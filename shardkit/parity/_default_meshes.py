"""Which meshes are verified where none are named: all devices, and 6 and 3 of them.

Sizes that are powers of two hide faults: 3 divides what 2 does not, and the other way round.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from .._core.errors import ShardkitError
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
      odd_only: only the meshes of 6 and of 3 devices.
    """
    n = len(jax.devices())
    all_devices = [] if odd_only else [sorted(mesh_shapes(n, axes), key=_longest)]
    for shapes in (*all_devices, *odd_shapes(n, axes)):
        built = (_build(MeshSpec(dcn=None, **shape)) for shape in shapes)
        fitting = next((mesh for mesh in built if _compiles(mesh, compile_for)), None)
        if fitting is not None:
            yield fitting


def _longest(shape: dict[str, int]) -> int:
    return max(shape.values())


def _build(spec: MeshSpec) -> Mesh:
    return spec.build(devices=jax.devices()[: spec.size])


def _compiles(mesh: Mesh, compile_for: Callable[[Mesh], Any]) -> bool:
    """Whether a mesh that nobody asked for divides the leaves and the rows."""
    try:
        compile_for(mesh)
    except ShardkitError:
        return False
    return True
