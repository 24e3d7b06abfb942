"""`SavedStep`: checks the files of a saved step, and loads its leaves onto any devices."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from .._core.errors import CheckpointCorruptedError, Problem, count, raise_all
from ._collective_errors import collective_errors, has_several_processes
from ._files import content_problems, listing_problems
from ._fingerprint import format_fingerprint
from ._folders import leaf_folder, leaves_of_files
from ._host_fingerprint import are_on_host, fingerprint_on_host, read_fingerprints
from ._manifest import Manifest, SavedFile, SavedLeaf, read_manifest
from ._match import RestorePlan
from ._read import read_leaves


@dataclasses.dataclass(frozen=True)
class SavedStep:
    """A complete step on disk."""

    folder: Path  # where it is
    manifest: Manifest  # what was saved

    @classmethod
    def open(cls, folder: Path) -> "SavedStep":
        """Reads the manifest of a step's folder.

        Raises:
          CheckpointCorruptedError: it is missing or damaged.
          CheckpointError: its format is newer, or older.
        """
        return cls(folder, read_manifest(folder))

    def check_files(self) -> None:
        """Compares size and CRC-32 of every file with the manifest; needs no device.

        Raises:
          CheckpointCorruptedError: names every file that is damaged, missing or unknown, and the
            leaf it belongs to.
        """
        self._check_files(self.manifest.files)

    def check_listing(self) -> None:
        """Compares names, sizes, and the content of files that hold no array.

        Raises:
          CheckpointCorruptedError: as `check_files`.
        """
        files, leaves = self.manifest.files, self.manifest.leaves
        holders = leaves_of_files(files, leaves)
        self._check_files({name: file for name, file in files.items() if holders[name] is None})

    def load(
        self, plan: RestorePlan, wanted: Mapping[str, Any], shardings: Mapping[str, Any]
    ) -> dict[str, jax.Array]:
        """Reads the planned leaves, each device its shards, and checks every bit.

        Abstract arrays and shardings are by path. Raises CheckpointCorruptedError if a file of a
        leaf is not what was written, or a leaf's fingerprint is not the saved one.
        """
        saved = self.manifest.leaves
        asked = {old: (saved[old], shardings[path]) for path, old in plan.saved.items()}
        got, wrong, sums = self._read(asked)
        with collective_errors():  # each process has read files that others have not
            if wrong:  # all that is damaged is told at once
                wrong |= content_problems(self.folder, self._files_of(plan.saved.values()))
            self._raise_if_damaged(self._describe_files(wrong))
        self._raise_if_damaged(self._find_damage(got, sums))
        loaded = {path: got.pop(old) for path, old in plan.saved.items()}
        for path in plan.cast:
            loaded[path] = loaded[path].astype(wanted[path].dtype)
        for path, old in plan.saved.items():
            if generator := saved[old].key:
                loaded[path] = jax.random.wrap_key_data(loaded[path], impl=generator)
        return loaded

    def check_values(self) -> None:
        """Reads every leaf onto one device, leaf by leaf, and compares its fingerprint.

        Raises:
          CheckpointCorruptedError: names every leaf that cannot be read or is not what was saved.
        """
        sharding = SingleDeviceSharding(jax.devices()[0])
        problems = []
        for path, leaf in self.manifest.leaves.items():
            got, wrong, sums = self._read({path: (leaf, sharding)})
            problems += self._describe_files(wrong) + self._find_damage(got, sums)
        self._raise_if_damaged(problems)

    def _check_files(self, read: Mapping[str, SavedFile]) -> None:
        """Compares the listing, and then the content of those files that are in order there."""
        wrong = listing_problems(self.folder, self.manifest.files)
        read = {name: file for name, file in read.items() if name not in wrong}
        self._raise_if_damaged(self._describe_files(wrong | content_problems(self.folder, read)))

    def _describe_files(self, wrong: Mapping[str, str]) -> list[Problem]:
        """Returns a problem for each damaged file, with the leaf it belongs to."""
        leaves = self.manifest.leaves
        return [
            Problem(f"{leaf} {leaves[leaf].type}" if leaf else "(no leaf)", f"{name} {wrong[name]}")
            for name, leaf in leaves_of_files(wrong, leaves).items()
        ]

    def _read(
        self, leaves: Mapping[str, tuple[SavedLeaf, Any]]
    ) -> tuple[dict[str, jax.Array], dict[str, str], dict[str, np.ndarray]]:
        """Returns arrays by path, what is wrong with files of the other leaves, and fingerprints.

        Of arrays on the host, fingerprints are computed while others are read from the disk.
        """
        stored = {path: (leaf.stored, to) for path, (leaf, to) in leaves.items()}
        empty = {
            path: jax.make_array_from_callback(a.shape, to, np.zeros(a.shape, a.dtype).__getitem__)
            for path, (a, to) in stored.items()
            if 0 in a.shape
        }
        below = {leaf_folder(path): path for path in stored if path not in empty}
        abstract = {
            name: jax.ShapeDtypeStruct(stored[path][0].shape, stored[path][0].dtype, sharding=to)
            for name, path in below.items()
            for to in [stored[path][1]]
        }
        begun: dict[str, Future[np.ndarray]] = {}
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:

            def begin(name: str, array: jax.Array) -> None:
                if not has_several_processes() and are_on_host({name: array}):
                    begun[below[name]] = pool.submit(fingerprint_on_host, array)

            got, wrong = read_leaves(self.folder, self.manifest.files, abstract, begin)
        sums = {path: future.result() for path, future in begun.items()}
        return empty | {below[name]: array for name, array in got.items()}, wrong, sums

    def _find_damage(
        self, got: Mapping[str, jax.Array], sums: Mapping[str, np.ndarray]
    ) -> list[Problem]:
        """Compares the fingerprints of leaves; where one differs, its files say which of them."""
        problems = []
        others = read_fingerprints({path: x for path, x in got.items() if path not in sums})
        for path, found in {**others, **sums}.items():
            leaf, now = self.manifest.leaves[path], format_fingerprint(found)
            if now == leaf.fingerprint:
                continue
            why = f"has fingerprint {now}, {leaf.fingerprint} was saved"
            wrong = content_problems(self.folder, self._files_of([path]))
            problems += self._describe_files(wrong) or [Problem(f"{path} {leaf.type}", why)]
        return problems

    def _files_of(self, paths: Iterable[str]) -> dict[str, SavedFile]:
        folders = tuple(f"{leaf_folder(path)}/" for path in paths)
        return {n: f for n, f in self.manifest.files.items() if n.startswith(folders)}

    def _raise_if_damaged(self, problems: Sequence[Problem]) -> None:
        headline = f"{self.folder} is damaged: {count(len(problems), 'finding')}."
        raise_all(CheckpointCorruptedError, headline, problems)
