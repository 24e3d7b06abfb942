"""Mesh shapes that fit a number of devices, and which of them to suggest."""

import math
from collections.abc import Mapping, Sequence


def mesh_shapes(n_devices: int, axes: Sequence[str]) -> list[dict[str, int]]:
    """Lists every mesh of these axes that uses exactly `n_devices`, first axis largest first.

    >>> mesh_shapes(4, ["data", "tensor"])
    [{'data': 4, 'tensor': 1}, {'data': 2, 'tensor': 2}, {'data': 1, 'tensor': 4}]
    """
    if not axes:
        return [{}] if n_devices == 1 else []
    first, *rest = axes
    sizes = [n for n in range(n_devices, 0, -1) if n_devices % n == 0]
    return [{first: n, **shape} for n in sizes for shape in mesh_shapes(n_devices // n, rest)]


def format_fitting_shapes(n_devices: int, near: Mapping[str, int], most: int = 8) -> str:
    """Returns `8x1, 4x2, 2x4, 1x8`: the few shapes that are nearest to sizes that do not fit.

    >>> format_fitting_shapes(8, {"data": 4, "model": 4})
    '8x1, 4x2, 2x4, 1x8'
    """
    shapes = mesh_shapes(n_devices, list(near))

    def distance(shape: Mapping[str, int]) -> float:
        return sum(abs(math.log(size / max(1, near[axis]))) for axis, size in shape.items())

    nearest = sorted(shapes, key=distance)[:most]
    text = ", ".join("x".join(map(str, s.values())) for s in shapes if s in nearest)
    omitted = len(shapes) - len(nearest)
    return f"{text} and {omitted} more" if omitted else text
