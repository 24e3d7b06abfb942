"""One saved step: its manifest, whether its files are whole, and its leaves on any devices."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from .._errors import DamageError, Problem, count, raise_all
from ._arrays import leaf_of_file, read
from ._files import ARRAYS, file_problems
from ._fingerprint import as_text, bare, fingerprints
from ._manifest import Manifest, SavedLeaf, read_manifest
from ._match import Plan


@dataclasses.dataclass(frozen=True)
class SavedStep:
    """A complete step on disk.

    Attributes:
      folder: where it is.
      manifest: what was saved.
    """

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> "SavedStep":
        """Reads the manifest of a step's folder.

        Raises:
          DamageError: it is missing or damaged.
          CheckpointError: it is of a newer format.
        """
        return cls(folder, read_manifest(folder))

    def check_files(self) -> None:
        """Compares size and CRC-32 of every file with the manifest; needs no device.

        Raises:
          DamageError: with every file that is damaged, gone or strange, and the leaf it holds.
        """
        wrong = file_problems(self.folder, self.manifest.files)
        problems = []
        for name, why in wrong.items():
            leaf = leaf_of_file(name, self.manifest.leaves)
            typed = f"{leaf} {self.manifest.leaves[leaf].type}" if leaf else "(no leaf)"
            problems.append(Problem(typed, f"{name} {why}"))
        self._raise_damage(problems)

    def load(
        self,
        plan: Plan,
        wanted: Mapping[str, Any],
        shardings: Mapping[str, Any],
    ) -> dict[str, jax.Array]:
        """Reads the planned leaves, each device its own part, and checks every bit.

        Args:
          plan: which leaves to read, and which of them to cast.
          wanted: `{path: abstract array}`.
          shardings: `{path: sharding}` of the same leaves.

        Raises:
          DamageError: a leaf cannot be read, or its fingerprint is not the saved one.
        """
        saved = self.manifest.leaves
        got = self._read({path: (saved[path], shardings[path]) for path in plan.saved})
        self._raise_damage(self._value_problems(got))
        for path in plan.cast:
            got[path] = got[path].astype(wanted[path].dtype)
        for path in plan.saved:
            if generator := saved[path].key:
                got[path] = jax.random.wrap_key_data(got[path], impl=generator)
        return got

    def check_values(self) -> None:
        """Reads every leaf onto one device, leaf by leaf, and compares its fingerprint.

        Raises:
          DamageError: with every leaf that cannot be read or is not what was saved.
        """
        where = SingleDeviceSharding(jax.devices()[0])
        problems = []
        for path, leaf in self.manifest.leaves.items():
            problems += self._value_problems(self._read({path: (leaf, where)}))
        self._raise_damage(problems)

    def _read(self, leaves: Mapping[str, tuple[SavedLeaf, Any]]) -> dict[str, jax.Array]:
        stored = {path: (_stored(leaf), to) for path, (leaf, to) in leaves.items()}
        empty = {
            path: jax.device_put(jnp.zeros(a.shape, a.dtype), to)
            for path, (a, to) in stored.items()
            if 0 in a.shape
        }
        abstract = {
            path: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=to)
            for path, (a, to) in stored.items()
            if path not in empty
        }
        return empty | (read(self.folder / ARRAYS, abstract) if abstract else {})

    def _value_problems(self, got: Mapping[str, jax.Array]) -> list[Problem]:
        found = jax.device_get(fingerprints(got))
        return [
            Problem(f"{path} {leaf.type}", f"has fingerprint {now}, {leaf.fingerprint} was saved")
            for path in got
            if (now := as_text(found[path])) != (leaf := self.manifest.leaves[path]).fingerprint
        ]

    def _raise_damage(self, problems: Sequence[Problem]) -> None:
        headline = f"{self.folder} is damaged: {count(len(problems), 'finding')}."
        raise_all(DamageError, headline, problems)


def _stored(leaf: SavedLeaf) -> jax.ShapeDtypeStruct:
    """What is on disk for a leaf: the words of a typed key, and other arrays as they are."""
    if not leaf.key:
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype))
    return jax.eval_shape(
        lambda: bare(jnp.zeros(leaf.shape, jax.random.key(0, impl=leaf.key).dtype))
    )
