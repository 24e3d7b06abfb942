"""Whether all devices hold the same copy of each leaf, by checksum.

Every device computes checksums of its own shards (the fingerprint that checkpoints use), and only
these are sent: eight bytes per leaf and device. Copies that differ are silent corruption: a
flipped bit in memory, or a wrong product on one device.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ..._core.alike import map_alike
from ..._core.errors import Problem
from ..._core.tree import leaves_by_path, short_type
from ...checkpoint import fingerprint, format_fingerprint


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A device whose copy of a shard differs from that of the others.

    Attributes:
      leaf: path and type, `params/w f32[8,4]`.
      device: the device.
      place: its coordinates in the mesh, by axis.
      checksum: of its copy, 16 hexadecimal digits.
      expected: the checksum of most copies; of two copies, that of the first device.
      copies: how many devices hold this shard.
    """

    leaf: str
    device: Any
    place: Mapping[str, int]
    checksum: str
    expected: str
    copies: int

    @property
    def problem(self) -> Problem:
        """The mismatch as a row of an error."""
        where = ", ".join(f"{axis}={i}" for axis, i in self.place.items())
        why = f"on {self.device} at ({where}) has checksum {self.checksum}; "
        others = "the other copy has" if self.copies == 2 else f"most of {self.copies} copies have"
        return Problem(f"state/{self.leaf}", f"{why}{others} {self.expected}")


class ReplicaComparison:
    """Compares the copies of every leaf, for many states of one layout."""

    def __init__(self, state: Any) -> None:
        """Reads the layout, not the values, of arrays or `jax.ShapeDtypeStruct` on one mesh."""
        named = leaves_by_path(state)
        self._leaves = [(path, x) for path, x in named.items() if _is_replicated(x.sharding)]
        if not self._leaves:
            return
        self._mesh: jax.sharding.Mesh = self._leaves[0][1].sharding.mesh
        devices = list(self._mesh.devices.flat)
        self._first = np.array([_first_holders(x, devices) for _, x in self._leaves], np.int64)
        self._checksums = self._build()

    @property
    def leaves(self) -> tuple[str, ...]:
        """Paths of the leaves of which several devices hold the same shard."""
        return tuple(path for path, _ in self._leaves)

    def checksums(self, state: Any) -> jax.Array:
        """Dispatches the checksums of a state, without waiting for them.

        Returns:
          u32[devices, leaves, 2], for `mismatches`; the state may be donated meanwhile.
        """
        leaves = leaves_by_path(state)
        return self._checksums([leaves[path] for path in self.leaves])

    def mismatches(self, checksums: jax.Array) -> tuple[Mismatch, ...]:
        """Waits for the result of `checksums`; returns every device whose copy differs."""
        sums = np.asarray(checksums)
        # sums[_first, leaf] is [leaves, devices, 2]: for each device the checksum of the first
        # one that holds the same shard. On (data=2, tensor=2), a leaf split over tensor has
        # _first = [0, 1, 0, 1]: devices 2 and 3 are compared with devices 0 and 1.
        leaf = np.arange(len(self._leaves))[:, None]
        differs = (sums[self._first, leaf] != sums.transpose(1, 0, 2)).any((1, 2))
        rows = []
        for index in np.flatnonzero(differs):
            rows += self._compare_leaf(int(index), sums[:, index])
        return tuple(rows)

    def _compare_leaf(self, leaf: int, sums: np.ndarray) -> list[Mismatch]:
        """Returns the devices whose copy of a leaf is the odd one; `sums` is u32[devices, 2]."""
        path, x = self._leaves[leaf]
        subject = f"{path} {short_type(x.shape, x.dtype)}"
        groups: dict[int, list[int]] = {}  # devices that hold the same shard
        for device, first in enumerate(self._first[leaf]):
            groups.setdefault(int(first), []).append(device)
        rows = []
        for group in groups.values():
            texts = {device: format_fingerprint(sums[device]) for device in group}
            expected = collections.Counter(texts.values()).most_common(1)[0][0]
            for device, text in texts.items():
                if text != expected:
                    index = np.unravel_index(device, self._mesh.devices.shape)
                    place = dict(zip(self._mesh.axis_names, map(int, index), strict=True))
                    rows.append(
                        Mismatch(
                            leaf=subject,
                            device=self._mesh.devices.flat[device],
                            place=place,
                            checksum=text,
                            expected=expected,
                            copies=len(group),
                        )
                    )
        return rows

    def _build(self) -> Any:
        """Returns a compiled function from the leaves to u32[devices, leaves, 2]."""
        mesh, axes = self._mesh, self._mesh.axis_names
        specs = [x.sharding.spec for _, x in self._leaves]

        def on_device(shards: list[jax.Array]) -> jax.Array:
            return map_alike(fingerprint, [shards], [None] * len(shards))[None]

        def run(leaves: list[jax.Array]) -> jax.Array:
            words = [_key_data(x) for x in leaves]
            body = jax.shard_map(
                on_device, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(axes)
            )
            return body(words)

        return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))


def check_replicas(state: Any) -> tuple[Mismatch, ...]:
    """Compares the copies of every leaf of a state on different devices.

    Only checksums are gathered. To compare many states, keep a `ReplicaComparison`.

    Args:
      state: pytree of arrays on one mesh.

    Returns:
      Every device whose copy differs; empty if all agree.
    """
    comparison = ReplicaComparison(state)
    return comparison.mismatches(comparison.checksums(state)) if comparison.leaves else ()


def _key_data(x: jax.Array) -> jax.Array:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _is_replicated(sharding: NamedSharding) -> bool:
    used = {axis for entry in sharding.spec if entry for axis in np.atleast_1d(entry)}
    return any(size > 1 for axis, size in sharding.mesh.shape.items() if axis not in used)


def _first_holders(x: Any, devices: list[Any]) -> list[int]:
    """Returns, for each device, the number of the first device that holds the same shard."""
    first: dict[str, int] = {}
    index = x.sharding.devices_indices_map(tuple(x.shape))
    return [first.setdefault(str(index[d]), number) for number, d in enumerate(devices)]
