"""`Checkpointer`: a folder of steps, written behind the training and read onto any mesh."""

import contextlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from .._core.donation import check_not_donated
from .._core.errors import CheckpointCorruptedError, CheckpointError, Problem, format_problems
from .._core.io._files import is_locked
from .._core.tree import leaves_by_path
from ._arrays import check_folders
from ._collective_errors import as_one, is_first
from ._files import LOCK, list_steps, locked, set_aside, step_folder, sweep
from ._manifest import Manifest, read_manifest
from ._pending_save import Saving
from ._restore import Request, Restored
from ._retention import RetentionPolicy


class Checkpointer:
    """Saves steps of a run in the background, and restores them onto any devices.

    A step is a folder that appears when it is complete, so a process killed at any instant
    leaves whole steps only. Of several processes all take part in every call, on one file system
    that they share; the first one writes what is not an array. Inside a `with` block `save`
    returns once the arrays are on the host, and the block does not end, however it ends, before
    the last save is on the disk or
    has raised. Outside of one, `save` itself waits.

        policy = sk.RetentionPolicy(max_to_keep=3)
        with sk.Checkpointer("runs/first/checkpoints", retention=policy) as checkpoints:
            for i in range(start, steps):
                state, metrics = step(state, batch(i))
                if (i + 1) % 100 == 0:
                    checkpoints.save(i + 1, state, data={"batch": i + 1})

    Attributes:
      folder: holds one folder for each step.
      retention: which steps stay.
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
          folder: made by the first save.
          retention: which steps stay; by default the last two.
          axes: `{path: logical axes}` of leaves whose dims are named, for the manifest.
          config: plain JSON values that describe the run, for the manifest.
        """
        self.folder, self.retention = Path(folder), retention or RetentionPolicy()
        self._axes, self._config = dict(axes or {}), config
        self._block: contextlib.ExitStack | None = None
        self._saving: Saving | None = None
        self._damaged: set[int] = set()

    def __enter__(self) -> Self:
        """Locks the folder for this process, and clears what killed ones left half-written.

        Raises:
          CheckpointError: the folder cannot be written, or another process writes there.
        """
        with contextlib.ExitStack() as block:
            with as_one():
                if is_first():
                    block.enter_context(locked(self.folder))
                    sweep(self.folder)
            self._block = block.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for the save that is under way.

        Raises:
          CheckpointError: it was lost, and nothing else says that the run has failed.
        """
        block, self._block = self._block, None
        assert block is not None
        with block:
            try:
                self._wait(together=error is None)
            except CheckpointError as lost:
                # SystemExit may carry code 0, under which a lost save would go unnoticed.
                if error is None or isinstance(error, SystemExit):
                    raise
                error.add_note(str(lost))

    def steps(self) -> tuple[int, ...]:
        """Lists the complete steps, oldest first."""
        return list_steps(self.folder)

    @property
    def in_use(self) -> bool:
        """Whether some process, perhaps this one, is inside a `with` block on the folder."""
        return is_locked(self.folder / LOCK)

    def manifest(self, step: int | None = None) -> Manifest:
        """Reads what a step, by default the newest, says of itself; needs no device.

        Raises:
          CheckpointError: there is no such step, or it is of a newer format.
          CheckpointCorruptedError: its manifest is damaged.
        """
        return read_manifest(step_folder(self.folder, self._candidates(step)[0]))

    def save(
        self,
        step: int,
        state: Any,
        *,
        data: Any = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves a state; it may be donated as soon as this returns.

        Waits for the save before, if that is still being written.

        Args:
          step: updates made; each is saved once.
          state: pytree of arrays, typed PRNG keys among them.
          data: state of the data iterator, plain JSON values.
          metrics: numbers by which `RetentionPolicy(best_metric=...)` ranks the step.

        Raises:
          CheckpointError: this save cannot start, or the one before was lost.
          StateError: an update has consumed the state.
          TreeError: two leaves have the same path.
        """
        check_not_donated(state, "state", "A state that is gone cannot be saved.")
        leaves = leaves_by_path(state)
        check_folders(leaves)
        if self._block is None:
            with self:
                return self.save(step, state, data=data, metrics=metrics)
        self.wait()
        with as_one():
            if is_first():
                self._make_room(step)
        self._damaged.clear()
        about = {"data": data, "config": self._config, "metrics": dict(metrics or {})}
        self._saving = Saving(self.folder, step, leaves, about, self._axes, self.retention)
        return None

    def _make_room(self, step: int) -> None:
        for damaged in sorted(self._damaged):
            set_aside(self.folder, damaged)
        if step in self.steps():
            problem = Problem(f"step {step}", f"is in {self.folder} already, and whole")
            fix = "another folder, or go on from it: restore(...)"
            raise CheckpointError(format_problems("Nothing is overwritten.", [problem], fix))

    def wait(self) -> None:
        """Waits until the last save is on the disk.

        Raises:
          CheckpointError: it was lost: the disk is full, or the folder is gone or read-only.
        """
        self._wait(together=True)

    def _wait(self, *, together: bool) -> None:
        saving, self._saving = self._saving, None
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
        on_damage: Literal["stop", "previous"] = "stop",
    ) -> Restored:
        """Reads a step onto any devices, bit for bit, each device only what it is to hold.

        Args:
          abstract: pytree of `jax.ShapeDtypeStruct` or arrays: `compiled.abstract_state`.
          shardings: the same pytree of shardings, or one for all: `compiled.shardings`. By
            default those that the abstract leaves carry.
          step: which step; the newest by default.
          partial: `{glob: source}` where checkpoint and state differ; the first glob that matches
            a leaf decides, and every leaf must be decided. Sources are `"saved"`, `"fresh"`
            (taken from `fresh`) and `"drop"` (in the checkpoint, not wanted).
          fresh: state, or function that makes it, for the leaves that are fresh.
          cast: globs of leaves whose dtype may change to the wanted one.
          on_damage: what to do when the newest step is damaged: `"stop"` raises and names the
            step before; `"previous"` warns and takes it. A step asked for by number stops.

        Raises:
          CheckpointError: there is no such step, or leaves are missing, extra, reshaped or of
            another dtype, all of them named; nothing was put on a device.
          CheckpointCorruptedError: a file or leaf is not what was saved, and no step may or can
          replace it.
        """
        request = Request(abstract, shardings, partial, fresh, cast)
        damaged: dict[int, str] = {}
        candidates = self._candidates(step)
        for one in candidates:
            try:
                return request.restore(step_folder(self.folder, one), damaged)
            except CheckpointCorruptedError as error:
                damaged[one] = str(error)
                last = step is not None or one == candidates[-1]
                if last or on_damage == "stop":
                    raise CheckpointCorruptedError(
                        "\n".join([*damaged.values(), self._offer(one)])
                    ) from error
                warnings.warn(
                    f"{error}\nTaking the step before it.", category=RuntimeWarning, stacklevel=2
                )
                self._damaged.add(one)
        raise AssertionError("unreachable")

    def _candidates(self, step: int | None) -> list[int]:
        """The step asked for, or all of them, newest first."""
        found = self.steps()
        if step in found:
            return [step]
        if found and step is None:
            return list(reversed(found))
        there = sorted(path.name for path in self.folder.glob("*"))[:4]
        if found:
            why, fix = f"holds steps {', '.join(map(str, found))}", f"step={found[-1]}"
        elif there:
            why = f"holds no complete step, but {', '.join(there)}"
            fix = "the folder that was given to Checkpointer when it saved"
        else:
            why = "is empty" if self.folder.is_dir() else "is no folder"
            fix = "the folder that was given to Checkpointer when it saved"
        what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        problem = Problem(str(self.folder), why, fix)
        raise CheckpointError(format_problems(f"There is {what}.", [problem]))

    def _offer(self, damaged: int) -> str:
        """What may be done instead of using a damaged step."""
        older = [step for step in self.steps() if step < damaged]
        if not older:
            return "Fix: no older step is there; a copy of this one, or a new run"
        return f'Fix: restore(..., step={older[-1]}), or on_damage="previous" to do so by itself'
