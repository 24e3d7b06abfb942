"""One save under way: arrays are written, summed up and named by a thread of its own."""

import contextlib
import importlib.metadata
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from .._core.errors import CheckpointError, Problem, format_problems
from ._arrays import start_writing
from ._collective_errors import as_one, is_first
from ._files import ARRAYS, being_saved, checksums, commit, saving_folder
from ._fingerprint import as_text, bare, fingerprints, is_key
from ._manifest import Manifest, SavedLeaf
from ._match import dtype_name
from ._retention import RetentionPolicy, delete_old_steps

_PACKAGES = ("shardkit", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Saving:
    """A save that has begun. The arrays are on the host already."""

    def __init__(
        self,
        root: Path,
        step: int,
        leaves: Mapping[str, jax.Array],
        about: Mapping[str, Any],
        axes: Mapping[str, tuple[str | None, ...]],
        retention: RetentionPolicy,
    ) -> None:
        """Copies the arrays and starts the thread.

        Args:
          root: folder of the steps.
          step: number of this one.
          leaves: `{path: array}`.
          about: the manifest's `data`, `config` and `metrics`.
          axes: `{path: logical axes}`.
          retention: applied once the step is complete.

        Raises:
          CheckpointError: nothing can be written there.
        """
        self._root, self._step, self._retention = root, step, retention
        self._leaves = {path: _describe(x, axes.get(path)) for path, x in leaves.items()}
        self._about = {**about, "mesh": _mesh(leaves)}
        self._error: Exception | None = None
        self._folder = being_saved(root, step)
        # Dispatched before the caller can donate the arrays; read when the files are written.
        self._marks = fingerprints(leaves)
        with as_one():
            self._make_folder()
        try:
            stored = {path: bare(x) for path, x in leaves.items() if 0 not in x.shape}
            self._written = start_writing(self._folder / ARRAYS, stored)
        except Exception as error:
            raise self._lost(error) from error
        self._thread = threading.Thread(target=self._finish, name=f"shardkit-save-{step}")
        self._thread.start()

    def join(self, together: bool = True) -> None:
        """Waits until the step is complete.

        Args:
          together: every process does so; it is not complete before the first one has named it.

        Raises:
          CheckpointError: it was lost; what was saved before is untouched.
        """
        self._thread.join()
        with as_one() if together else contextlib.nullcontext():
            if self._error is not None:
                raise self._lost(self._error) from self._error

    def _make_folder(self) -> None:
        try:
            if is_first():
                saving_folder(self._root, self._step)
        except OSError as error:
            raise self._lost(error) from error

    def _finish(self) -> None:
        try:
            self._written()
            if not is_first():
                return
            files = checksums(self._folder)
            marks = jax.device_get(self._marks)
            leaves = {
                path: SavedLeaf(**fields, fingerprint=as_text(marks[path]))
                for path, fields in self._leaves.items()
            }
            manifest = Manifest(
                step=self._step,
                time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                versions=_versions(),
                leaves=leaves,
                files=files,
                **self._about,
            )
            commit(self._folder, self._root, self._step, manifest.to_text())
            delete_old_steps(self._root, self._retention)
        except Exception as error:
            self._error = error

    def _lost(self, error: Exception) -> CheckpointError:
        if is_first():
            shutil.rmtree(self._folder, ignore_errors=True)
        # The storage library appends its whole specification to what the system said.
        why = str(error).partition(" [tensorstore_spec")[0] or type(error).__name__
        problem = Problem(f"step {self._step}", f"could not be written to {self._root}: {why}")
        fix = "room on the disk, or another folder; the steps before it are as they were"
        return CheckpointError(format_problems("A save was lost.", [problem], fix))


def _describe(x: jax.Array, axes: tuple[str | None, ...] | None) -> dict[str, Any]:
    generator = str(jax.random.key_impl(x)) if is_key(x.dtype) else None
    return {"shape": x.shape, "dtype": dtype_name(x.dtype), "axes": axes, "key": generator}


def _mesh(leaves: Mapping[str, jax.Array]) -> dict[str, int]:
    meshes = (x.sharding.mesh for x in leaves.values() if isinstance(x.sharding, NamedSharding))
    return dict(next((mesh.shape for mesh in meshes), {}))


def _versions() -> dict[str, str]:
    known = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {name: known[name] for name in _PACKAGES if name in known}
