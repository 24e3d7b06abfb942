"""Bytes per second of every group of mesh axes, on the topology of a target.

On a torus each mesh axis has a ring, as in the timeline of a compiled step. On GPUs a group that
leaves an NVLink domain has the speed of the network. Axes that cross slices use the network between
hosts.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..hardware import Chip, known_chips
from ..mesh import Target
from ..report.communication._links import Links

WIRE = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "swap": 1}
"""Number of times that (n−1)/n of the payload is sent; a swap with one partner sends all of it."""


@dataclasses.dataclass(frozen=True)
class Network:
    """The links of a target."""

    chip: Chip  # the device
    torus: tuple[int, ...] = ()  # chips along each dim of one slice; () for GPUs
    slices: int = 1  # slices joined by the slower network

    @classmethod
    def of(cls, target: Target, chips: Iterable[Chip] = ()) -> "Network":
        """The links of a target whose chip is in the hardware table, or one of a user's own."""
        chip = known_chips(chips)[target.chip]
        return cls(chip, target.shape if chip.torus_dims else (), target.slices)

    @property
    def tile_width(self) -> int:
        """Elements of the last dim of a tile in memory: the width of a TPU's registers."""
        return 128 if self.torus else 1

    def rates(self, meshes: Sequence[Mapping[str, int]], axes: Iterable[str]) -> np.ndarray:
        """Bytes/s that one device sends over a group of axes: f64[meshes]."""
        group = frozenset(axes)
        return np.array([self._rate(sizes, group) for sizes in meshes])

    def crossing_axis(self, sizes: Mapping[str, int]) -> str | None:
        """The mesh axis that crosses slices: the outermost that is large enough."""
        if self.slices == 1:
            return None
        return next((a for a, n in sizes.items() if n > 1 and n % self.slices == 0), "")

    def _rate(self, sizes: Mapping[str, int], group: frozenset[str]) -> float:
        used = [axis for axis in sizes if axis in group and sizes[axis] > 1]
        if not used:
            return self.chip.link
        if self.crossing_axis(sizes) in used:
            return self.chip.network
        return Links(self.chip, tuple(sizes.items())).bandwidth(used)
