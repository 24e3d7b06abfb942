"""Colors of mesh axes, the same in every picture: tables of a report, sweeps, plots."""

import zlib
from collections.abc import Iterable

# Readable on white and on black; the first ones are told apart by everyone.
_COLORS = (
    "#3b76af", "#d9822b", "#3f9b6c", "#c44e52", "#8567ad",
    "#8c6d4f", "#d27fb5", "#7f8a93", "#a9a23b", "#39a9b8",
)  # fmt: skip
_NO_AXIS = "#9aa3ab"
# Of the seeds, one that gives each conventional name a color of its own.
_SEED = 1005445


def axis_colors(axes: Iterable[str]) -> dict[str, str]:
    """Returns mesh axis → color, `#rrggbb`.

    A color follows from the name alone, so that an axis keeps it in every picture. Where two names
    in one picture share a color, the later one takes the next that is free.

    >>> axis_colors(["data", "tensor"])["data"] == axis_colors(["data"])["data"]
    True
    """
    colors: dict[str, str] = {}
    for axis in axes:
        first = zlib.crc32(f"{axis}{_SEED}".encode()) % len(_COLORS)
        ring = _COLORS[first:] + _COLORS[:first]
        free = [color for color in ring if color not in colors.values()]
        colors[axis] = (free or ring)[0] if axis else _NO_AXIS
    return colors
