"""`Checkpointer`: a folder of steps, written in the background and restored onto any mesh."""

import contextlib
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np

from .._core.donation import check_not_donated
from .._core.errors import CheckpointCorruptedError, CheckpointError, Problem, format_problems
from .._core.io._files import is_locked, local_path, os_errors_as
from .._core.options import check_arguments, copy_plain
from .._core.tree import leaves_by_path
from ._collective_errors import collective_errors, is_first_process
from ._files import LOCK, delete_incomplete, list_steps, lock_folder, quarantine, step_folder
from ._folders import check_folders
from ._manifest import Manifest, read_manifest
from ._pending_save import PendingSave
from ._restore import Restored, RestoreRequest
from ._retention import RetentionPolicy


class Checkpointer:
    """Saves steps of a run in the background, and restores them onto any devices.

    The folder of a step appears when it is complete, so a process killed at any instant leaves
    only complete steps. Several processes share one file system and make every call together;
    the first one writes everything but the arrays.

    Inside a `with` block `save` returns once the arrays are on the host; the block ends when the
    last save is on the disk or has failed. Outside a block `save` waits until it is on the disk.

        policy = sk.RetentionPolicy(max_to_keep=3)
        with sk.Checkpointer("runs/first/checkpoints", retention=policy) as checkpoints:
            for i in range(start, steps):
                state, metrics = step(state, batch(i))
                if (i + 1) % 100 == 0:
                    checkpoints.save(i + 1, state, data={"batch": i + 1})

    Attributes:
      folder: holds one folder for each step.
      retention: which steps to keep.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        retention: RetentionPolicy | None = None,
        axes: Mapping[str, tuple[str | None, ...]] | None = None,
        config: Any = None,
    ) -> None:
        """Declares a folder; nothing is read or written yet.

        Args:
          folder: created by the first save.
          retention: which steps to keep; by default the last two.
          axes: `{path: logical axes}` of leaves whose dims are named, for the manifest.
          config: plain JSON values that describe the run, for the manifest.

        Raises:
          CheckpointError: the folder is a URL, not a path; or axes or config are not plain.
        """
        headline = "The checkpoints are declared wrongly."
        check_arguments(
            CheckpointError,
            headline,
            folder=(folder, str | os.PathLike[str]),
            retention=(retention, RetentionPolicy | None),
            axes=(axes, Mapping[str, Sequence[str | None]] | None),
        )
        self.folder = local_path(folder, CheckpointError, "Checkpoints are kept in files.")
        self.retention = retention or RetentionPolicy()
        self._axes = {path: tuple(names) for path, names in (axes or {}).items()}
        self._config = copy_plain(CheckpointError, headline, config=config)["config"]
        self._block: contextlib.ExitStack | None = None
        self._pending: PendingSave | None = None
        self._copies: list[np.ndarray | None] = []
        self._damaged: set[int] = set()

    def __enter__(self) -> Self:
        """Locks the folder, and deletes incomplete steps that killed processes left.

        Raises:
          CheckpointError: the folder cannot be written, or another process writes to it.
        """
        with contextlib.ExitStack() as block:
            with collective_errors():
                if is_first_process():
                    block.enter_context(lock_folder(self.folder))
                    with self._os_errors("Nothing can be saved."):
                        remains = delete_incomplete(self.folder)
                    for message in remains:
                        warnings.warn(message, RuntimeWarning, stacklevel=2)
            self._block = block.pop_all()
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        """Waits for the pending save; raises its error unless another one ends the block."""
        block, self._block = self._block, None
        self._copies = []
        assert block is not None
        with block:
            try:
                self._wait(together=error is None)
            except CheckpointError as lost:
                # SystemExit may have code 0, which would hide the failed save.
                if error is None or isinstance(error, SystemExit):
                    raise
                error.add_note(str(lost))

    def steps(self) -> tuple[int, ...]:
        """Lists the complete steps, oldest first.

        Raises:
          CheckpointError: the folder cannot be read.
        """
        with self._os_errors("Checkpoints cannot be listed."):
            return list_steps(self.folder)

    @property
    def in_use(self) -> bool:
        """Whether some process, perhaps this one, is inside a `with` block on the folder."""
        with self._os_errors("Whether the folder is in use cannot be found out."):
            return is_locked(self.folder / LOCK)

    def _os_errors(self, headline: str) -> contextlib.AbstractContextManager[None]:
        fix = "a folder that this user may read and write, with only checkpoints in it"
        return os_errors_as(CheckpointError, headline, self.folder, fix)

    def manifest(self, step: int | None = None) -> Manifest:
        """Reads the manifest of a step, by default the newest; needs no device.

        Raises:
          CheckpointError: there is no such step, or its format is newer or older.
          CheckpointCorruptedError: its manifest is damaged.
        """
        return read_manifest(step_folder(self.folder, self._candidates(step)[0]))

    def save(
        self, step: int, state: Any, *, data: Any = None, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Saves a state, which may be donated as soon as this returns.

        Waits for the previous save, if that is still being written.

        Args:
          step: number of updates made; a step is never overwritten.
          state: pytree of arrays, typed PRNG keys among them.
          data: state of the data iterator, plain JSON values.
          metrics: numbers by which `RetentionPolicy(best_metric=...)` ranks the step.

        Raises:
          CheckpointError: this save cannot start, or the previous one failed; data are not plain,
            or a metric is not a finite number.
          StateError: the state was donated to an update.
          TreeError: two leaves have the same path.
        """
        headline = "Nothing can be saved."
        ranked = (metrics, Mapping[str, float] | None)
        check_arguments(CheckpointError, headline, step=(step, int), metrics=ranked)
        if step < 0:
            why = "is not a number of updates"
            raise CheckpointError.of(headline, f"step={step}", why, "step=0")
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        plain = copy_plain(CheckpointError, headline, data=data, metrics=numbers)
        check_not_donated(state, "state", "A donated state cannot be saved.")
        leaves = leaves_by_path(state)
        check_folders(leaves)
        if self._block is None:
            with self:
                return self.save(step, state, data=data, metrics=metrics)
        self.wait()
        with collective_errors():
            if is_first_process():
                self._prepare_folder(step)
        self._damaged.clear()
        self._pending = PendingSave(
            self.folder,
            int(step),
            leaves,
            fields={**plain, "config": self._config},
            axes=self._axes,
            retention=self.retention,
            copies=self._copies,
        )
        return None

    def _prepare_folder(self, step: int) -> None:
        with self._os_errors("A damaged step cannot be set aside."):
            for damaged in sorted(self._damaged):
                quarantine(self.folder, damaged)
        if step in self.steps():
            problem = Problem(f"step {step}", f"is already in {self.folder}, and complete")
            fix = "another folder, or resume from it: restore(...)"
            raise CheckpointError(format_problems("A step is never overwritten.", [problem], fix))

    def wait(self) -> None:
        """Waits until the last save is on the disk.

        Raises:
          CheckpointError: it failed: the disk is full, or the folder is gone or read-only.
        """
        self._wait(together=True)

    def _wait(self, *, together: bool) -> None:
        saving, self._pending = self._pending, None
        if saving is not None:
            saving.join(together)

    def restore(
        self,
        abstract: Any,
        shardings: Any = None,
        *,
        step: int | None = None,
        partial: Mapping[str, str] | None = None,
        fresh: Any = None,
        cast: Sequence[str] = (),
        rename: Mapping[str, str] | None = None,
        on_damage: Literal["stop", "previous"] = "stop",
    ) -> Restored:
        """Reads a step onto any devices, bit for bit; each device reads only its shards.

        Args:
          abstract: pytree of `jax.ShapeDtypeStruct` or arrays: `compiled.abstract_state`.
          shardings: the same pytree of shardings, or one for all: `compiled.shardings`. By
            default those of the abstract leaves.
          step: by default the newest.
          partial: `{glob: source}` if checkpoint and state differ; the first glob that matches
            a leaf decides, and every leaf needs one. Sources are `"saved"`, `"fresh"` (taken
            from `fresh`) and `"drop"` (only in the checkpoint).
          fresh: state, or function that returns it, for the fresh leaves.
          cast: globs of leaves whose dtype may change to that of `abstract`.
          rename: `{glob: new path}` for leaves that were saved under other names, as in
            `{"**/old/**": "**/new/**"}`: each wildcard keeps what it matched.
          on_damage: if the newest step is damaged, `"stop"` raises and names the step before;
            `"previous"` warns and restores that one. With `step` a damaged step always raises.

        Raises:
          CheckpointError: there is no such step, or leaves are missing, extra, reshaped or of
            another dtype; all of them are named, and nothing was put on a device.
          CheckpointCorruptedError: a file or leaf is not what was saved, and no step may or can
          replace it.
        """
        request = RestoreRequest(
            abstract, shardings, partial=partial, fresh=fresh, cast=cast, rename=rename
        )
        damaged: dict[int, str] = {}
        candidates = self._candidates(step)
        for candidate in candidates:
            try:
                return request.restore(step_folder(self.folder, candidate), damaged)
            except CheckpointCorruptedError as error:
                damaged[candidate] = str(error)
                is_last = step is not None or candidate == candidates[-1]
                if is_last or on_damage == "stop":
                    raise CheckpointCorruptedError(
                        "\n".join([*damaged.values(), self._suggest_fix(candidate)])
                    ) from error
                warnings.warn(
                    f"{error}\nRestoring the step before it.", RuntimeWarning, stacklevel=2
                )
                self._damaged.add(candidate)
        raise AssertionError("unreachable")

    def _candidates(self, step: int | None) -> list[int]:
        """Returns the requested step, or without one all steps, newest first."""
        steps = self.steps()
        if step in steps:
            return [step]
        if steps and step is None:
            return list(reversed(steps))
        names = sorted(path.name for path in self.folder.glob("*"))[:4]
        if steps:
            why, fix = f"holds steps {', '.join(map(str, steps))}", f"step={steps[-1]}"
        elif names:
            why = f"holds no complete step, but {', '.join(names)}"
            fix = "the folder of the Checkpointer that saved"
        else:
            why = "is empty" if self.folder.is_dir() else "is not a folder"
            fix = "the folder of the Checkpointer that saved"
        what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise CheckpointError.of(f"There is {what}.", str(self.folder), why, fix)

    def _suggest_fix(self, damaged: int) -> str:
        """Returns the steps that can be restored instead of a damaged one."""
        older = [step for step in self.steps() if step < damaged]
        if not older:
            return "Fix: there is no older step; a copy of this one, or a new run"
        return (
            f'Fix: restore(..., step={older[-1]}), or on_damage="previous" to do so automatically'
        )
