"""`PendingSave`: a thread that finishes writing a step, and makes it visible."""

import contextlib
import shutil
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from .._core.errors import CheckpointError, Problem, count, format_problems, raise_all
from .._core.interrupts import SAVING
from .._core.versions import package_versions
from ._collective_errors import collective_errors, is_first_process, share_text
from ._files import commit, create_temporary_folder, list_steps, listing_problems, step_folder
from ._fingerprint import compute_fingerprints, format_fingerprint, is_key, raw_array
from ._folders import leaf_folder
from ._host_fingerprint import are_on_host
from ._manifest import Manifest, SavedFile, SavedLeaf
from ._match import dtype_name
from ._retention import RetentionPolicy, delete_old_steps
from ._write import Written, collect, find_missing, start_writing

# Missing files that an error names.
_SHOWN = 8


class PendingSave:
    """A save whose arrays are on the host, and that a thread writes to disk."""

    def __init__(
        self,
        root: Path,
        step: int,
        leaves: Mapping[str, jax.Array],
        fields: Mapping[str, Any],
        axes: Mapping[str, tuple[str | None, ...]],
        retention: RetentionPolicy,
        copies: list[np.ndarray | None],
    ) -> None:
        """Copies the arrays and starts the thread; raises CheckpointError if it cannot write.

        `fields` are the manifest's `data`, `config` and `metrics`; `axes` the logical ones by path.
        Old steps are deleted once this one is complete. For `copies` see `start_writing`.
        """
        self._root, self._step, self._retention = root, step, retention
        self._leaves = {path: _describe(x, axes.get(path)) for path, x in leaves.items()}
        self._fields = {**fields, "mesh": _mesh_shape(leaves)}
        self._error: Exception | None = None
        self._remains: list[str] = []
        self._folder: Path | None = None
        self._folder = self._make_folder()
        # Devices have computed them before the caller can donate the arrays; read at the end.
        on_host = are_on_host(leaves)
        self._fingerprints = {} if on_host else compute_fingerprints(leaves)
        stored = {leaf_folder(p): raw_array(x) for p, x in leaves.items() if 0 not in x.shape}
        self._expected = {
            folder: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for folder, x in stored.items()
        }
        try:
            before = [step_folder(root, n) for n in list_steps(root)[-1:]]
            self._wait_written = start_writing(
                self._folder, stored, on_host, copies, before=next(iter(before), None)
            )
        except Exception as error:
            raise self._make_error(error) from error
        self._thread = threading.Thread(target=self._finish, name=f"{SAVING}-{step}")
        self._thread.start()

    def join(self, together: bool = True) -> None:
        """Waits until the step is complete; `together`, every process raises the error of any.

        An old step that cannot be deleted is a warning only: the new one is complete. After a
        CheckpointError earlier steps are untouched.
        """
        self._thread.join()
        remains, self._remains = self._remains, []
        for message in remains:
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        with collective_errors() if together else contextlib.nullcontext():
            if self._error is not None:
                raise self._make_error(self._error) from self._error

    def _make_folder(self) -> Path:
        """Process 0 creates the folder; every process must see it under the same name."""
        name = ""
        with collective_errors():
            try:
                if is_first_process():
                    name = create_temporary_folder(self._root, self._step).name
            except OSError as error:
                raise self._make_error(error) from error
        folder = self._root / share_text(name)
        with collective_errors():
            if not folder.is_dir():
                why = "does not exist here, and process 0 has just created it"
                fix = "a folder on a file system that all processes share"
                problems = [Problem(str(folder), why, fix)]
                raise CheckpointError(format_problems("A save has failed.", problems))
        return folder

    def _finish(self) -> None:
        assert self._folder is not None
        written: Written | Exception
        try:
            written = self._wait_written()
        except Exception as error:
            self._error = written = error
        try:
            together = collect(self._folder, written)
            if together is not None and self._error is None:
                self._complete(self._folder, together)
        except Exception as error:
            self._error = self._error or error

    def _complete(self, folder: Path, written: Written) -> None:
        """Writes the manifest and makes the step visible."""
        self._check_complete(folder, written.files)
        values = jax.device_get(self._fingerprints) or {
            path: written.sums.get(leaf_folder(path), np.zeros(2, np.uint32))
            for path in self._leaves
        }
        leaves = {
            path: SavedLeaf(**fields, fingerprint=format_fingerprint(values[path]))
            for path, fields in self._leaves.items()
        }
        manifest = Manifest(
            step=self._step,
            time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            versions=package_versions(),
            leaves=leaves,
            files=written.files,
            **self._fields,
        )
        commit(folder, self._root, self._step, manifest.to_text())
        self._remains = delete_old_steps(self._root, self._retention)

    def _check_complete(self, folder: Path, files: Mapping[str, SavedFile]) -> None:
        """Compares what was written, and what lies on the disk, with what this save must write."""
        folder.stat()  # raises if the whole folder is gone
        missing = find_missing(self._expected, files.keys() - listing_problems(folder, files))
        problems = [Problem(name, why) for name, why in list(missing.items())[:_SHOWN]]
        headline = f"A save has failed. Step {self._step} in {self._root} lacks "
        headline += f"{count(len(missing), 'file')} that it must have."
        fix = "a file system that all processes share, and on which nothing else deletes files"
        raise_all(CheckpointError, headline, problems, fix)

    def _make_error(self, error: Exception) -> CheckpointError:
        if is_first_process() and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if isinstance(error, CheckpointError):
            return error
        why = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        problem = Problem(f"step {self._step}", f"could not be written to {self._root}: {why}")
        fix = "free space on the disk, or another folder; earlier steps are untouched"
        return CheckpointError(format_problems("A save has failed.", [problem], fix))


def _describe(x: jax.Array, axes: tuple[str | None, ...] | None) -> dict[str, Any]:
    generator = str(jax.random.key_impl(x)) if is_key(x.dtype) else None
    return {"shape": x.shape, "dtype": dtype_name(x.dtype), "axes": axes, "key": generator}


def _mesh_shape(leaves: Mapping[str, jax.Array]) -> dict[str, int]:
    meshes = (x.sharding.mesh for x in leaves.values() if isinstance(x.sharding, NamedSharding))
    return dict(next((mesh.shape for mesh in meshes), {}))
