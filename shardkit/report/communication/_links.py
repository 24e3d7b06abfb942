"""Seconds that a collective takes on the links of a chip, by the textbook ring algorithms.

All-reduce 2(n−1)α + 2(n−1)/n·V/B, all-gather and reduce-scatter (n−1)α + (n−1)/n·V/B, a permute
α + V/B. An all-to-all crosses n/4 links of a ring on average: (n−1)α + n/4·V/B on a torus
(jax-ml.github.io/scaling-book/sharding), (n−1)/n·V/B through a switch. The program
does not tell which dims of a torus a mesh axis is on: see `ASSUMPTIONS`.
"""

import dataclasses
import math
from collections.abc import Sequence

from ...hardware import Chip
from ._ledger import LedgerRow, wire_bytes

ASSUMPTIONS = {
    "tpu": "each mesh axis is on one torus axis and uses its ring both ways, one way for a permute",
    "gpu": "GPUs are numbered host by host; traffic that leaves an NVLink domain has network speed",
    "cpu": "devices are threads of one machine, and each has its full memory bandwidth",
}


@dataclasses.dataclass(frozen=True)
class Links:
    """The network that a mesh has."""

    chip: Chip  # the device
    mesh: tuple[tuple[str, int], ...]  # names and sizes of the mesh axes, in the mesh's order
    dcn: tuple[str, ...] = ()  # mesh axes that cross slices, over the network between hosts

    def seconds(self, row: LedgerRow) -> float:
        """Time of one execution of a collective."""
        if row.group < 2:
            return 0.0
        sent = wire_bytes(row.kind, row.payload_bytes, row.group)
        slow = row.dcn or self.uses_network(row.axes)
        if row.kind.endswith("all-to-all") and self.chip.torus_dims and not slow:
            sent = row.group / 4 * row.payload_bytes
        hops = {"all-reduce": 2 * (row.group - 1), "collective-permute": 1}
        latency = self.chip.latency * hops.get(row.kind, row.group - 1)
        if slow:
            return latency + sent / self.chip.network
        return latency + sent / self.bandwidth(row.axes, row.kind == "collective-permute")

    def bandwidth(self, axes: Sequence[str], one_way: bool = False) -> float:
        """Bytes/s that one device sends over mesh axes, all at once; one way as for a permute."""
        if self.uses_network(axes):
            return self.chip.network
        return self.chip.link if one_way else self.chip.rate(len(axes))

    def uses_network(self, axes: Sequence[str]) -> bool:
        """Whether mesh axes go over the network between hosts.

        On TPU, traffic between slices has rows of its own: see `Row.dcn`.
        """
        if self.chip.torus_dims:
            return False
        if set(axes) & set(self.dcn):
            return True
        return self.chip.domain is not None and self._device_extent(axes) > self.chip.domain

    def _device_extent(self, axes: Sequence[str]) -> int:
        """Consecutive devices that contain a group: size × stride of its first axis."""
        names = [name for name, _ in self.mesh]
        first = min((names.index(axis) for axis in axes), default=len(names))
        return math.prod(size for _, size in self.mesh[first:])
