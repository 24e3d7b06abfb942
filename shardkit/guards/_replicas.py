"""Whether the copies of each leaf that devices hold are the same, by checksum.

Every device sums up its own shards (the fingerprint that checkpoints use), and only those sums,
eight bytes for a leaf and device, travel. Copies that differ are silent corruption: a bit that
flipped in memory, a product that came out otherwise on one device.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from .._errors import Problem
from .._tree import leaves_by_path, short_type
from ..checkpoint import as_text, fingerprints


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A device whose copy of a shard is not what the others hold.

    Attributes:
      leaf: path and type, `params/w f32[8,4]`.
      device: the device.
      place: its coordinate in the mesh, by axis.
      checksum: of its copy, 16 hexadecimal digits.
      expected: the checksum that most copies have; of two copies, that of the first device.
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
        """A row of an error."""
        where = ", ".join(f"{axis}={i}" for axis, i in self.place.items())
        why = f"on {self.device} at ({where}) has checksum {self.checksum}; "
        others = "the other copy has" if self.copies == 2 else f"most of {self.copies} copies have"
        return Problem(f"state/{self.leaf}", f"{why}{others} {self.expected}")


class Replicas:
    """Compares the copies of every leaf of states that are laid out alike."""

    def __init__(self, state: Any) -> None:
        """Looks at how a state is laid out; its values are not read.

        Args:
          state: pytree of arrays, or of `jax.ShapeDtypeStruct` with shardings, on one mesh.
        """
        named = leaves_by_path(state)
        self._leaves = [(path, x) for path, x in named.items() if _copied(x.sharding)]
        if not self._leaves:
            return
        self._mesh: jax.sharding.Mesh = self._leaves[0][1].sharding.mesh
        devices = list(self._mesh.devices.flat)
        self._first = np.array([_first_holders(x, devices) for _, x in self._leaves], np.int64)
        self._sums = self._program()

    @property
    def leaves(self) -> tuple[str, ...]:
        """Paths of the leaves that more than one device holds."""
        return tuple(path for path, _ in self._leaves)

    def sums(self, state: Any) -> jax.Array:
        """Starts summing up, on the devices; does not wait.

        Returns:
          u32[devices, leaves, 2], for `mismatches`; the state may be donated meanwhile.
        """
        chosen = leaves_by_path(state)
        return self._sums([chosen[path] for path in self.leaves])

    def mismatches(self, sums: jax.Array) -> tuple[Mismatch, ...]:
        """Reads what `sums` returned: every device whose copy differs."""
        found = np.asarray(sums)
        number = np.arange(len(self._leaves))[:, None]
        differs = (found[self._first, number] != found.transpose(1, 0, 2)).any((1, 2))
        rows = []
        for leaf in np.flatnonzero(differs):
            rows += self._of_leaf(int(leaf), found[:, leaf])
        return tuple(rows)

    def _of_leaf(self, leaf: int, sums: np.ndarray) -> list[Mismatch]:
        path, x = self._leaves[leaf]
        subject = f"{path} {short_type(x.shape, x.dtype)}"
        held: dict[int, list[int]] = {}
        for device, first in enumerate(self._first[leaf]):
            held.setdefault(int(first), []).append(device)
        rows = []
        for holders in held.values():
            texts = {device: as_text(sums[device]) for device in holders}
            expected = collections.Counter(texts.values()).most_common(1)[0][0]
            for device, text in texts.items():
                if text != expected:
                    at = np.unravel_index(device, self._mesh.devices.shape)
                    place = dict(zip(self._mesh.axis_names, map(int, at), strict=True))
                    where = self._mesh.devices.flat[device]
                    rows.append(Mismatch(subject, where, place, text, expected, len(holders)))
        return rows

    def _program(self) -> Any:
        mesh, axes = self._mesh, self._mesh.axis_names
        specs = [x.sharding.spec for _, x in self._leaves]

        def on_device(shards: list[jax.Array]) -> jax.Array:
            made = fingerprints({str(i): x for i, x in enumerate(shards)})
            return jnp.stack([made[str(i)] for i in range(len(shards))])[None]

        def run(leaves: list[jax.Array]) -> jax.Array:
            words = [_bare(x) for x in leaves]
            body = jax.shard_map(
                on_device, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(axes)
            )
            return body(words)

        return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))


def check_replicas(state: Any) -> tuple[Mismatch, ...]:
    """Compares the copies that devices hold of every leaf of a state.

    Nothing is gathered but checksums. Where many states are compared, keep a `Replicas`.

    Args:
      state: pytree of arrays on one mesh.

    Returns:
      Every device whose copy differs, empty where all is well.
    """
    replicas = Replicas(state)
    return replicas.mismatches(replicas.sums(state)) if replicas.leaves else ()


def _bare(x: jax.Array) -> jax.Array:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _copied(sharding: NamedSharding) -> bool:
    used = {axis for entry in sharding.spec if entry for axis in np.atleast_1d(entry)}
    return any(size > 1 for axis, size in sharding.mesh.shape.items() if axis not in used)


def _first_holders(x: Any, devices: list[Any]) -> list[int]:
    """For each device the number of the first one that holds the same shard."""
    first: dict[str, int] = {}
    index = x.sharding.devices_indices_map(tuple(x.shape))
    return [first.setdefault(str(index[d]), number) for number, d in enumerate(devices)]
