"""Whether a run is new or goes on, decided from files alone, before any device is touched."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._core.io import flatten
from .._errors import CheckpointError, Problem, count, format_problems, raise_all
from ..checkpoint import Checkpointer, Manifest
from ._config import TrainConfig
from ._folder import read_metrics
from ._source import Source

# Asked for by name, a run may also be made longer or shorter.
_FREE_BY_NAME = ("train.steps",)


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a run is made of, as it is compared with an unfinished one.

    Attributes:
      record: settings as plain values.
      decides: names or groups of the record (`model`, `train.seed`) that decide the numbers of
        a run, and so may not change on its way; None for all of them.
      data: whose position must be where the checkpoint says.
    """

    record: Mapping[str, Any]
    decides: Sequence[str] | None
    data: Source

    def differences(self, saved: Manifest, free: Sequence[str] = ()) -> list[Problem]:
        """Settings that decide the numbers and are not those of a checkpoint."""
        before, now = flatten(saved.config or {}), flatten(self.record)
        names = [name for name in {**before, **now} if self._decides(name) and name not in free]
        problems = [
            Problem(
                name,
                f"was {before.get(name)!r}, is {now.get(name)!r}",
                f"--set {name}={before.get(name)}",
            )
            for name in names
            if before.get(name) != now.get(name)
        ]
        position = self.data.position(saved.step)
        # Another way to cut the text is told above, by its setting.
        if not problems and saved.data != position:
            why = f"is not what the run read: {_changes(saved.data, position)}"
            problems.append(Problem(str(self.data), why, "the data as it was"))
        return problems

    def _decides(self, name: str) -> bool:
        return self.decides is None or any(
            name == one or name.startswith(f"{one}.") for one in self.decides
        )


@dataclasses.dataclass(frozen=True)
class Beginning:
    """How a run begins.

    Attributes:
      wanted: folder that a new run would like, or the folder of the run that goes on.
      resumed: whether it goes on.
      step: updates that it has behind it, if its newest checkpoint is whole.
      notes: what the user should know about the choice.
    """

    wanted: Path
    resumed: bool = False
    step: int = 0
    notes: tuple[str, ...] = ()


def checkpoints_of(folder: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return folder / "checkpoints"


def choose_beginning(wanted: Path, loop: TrainConfig, terms: Terms) -> Beginning:
    """Finds the run that is to go on, if any: one of the folders that `wanted` is the first of.

    Raises:
      CheckpointError: `train.resume` names a run that cannot go on with these settings.
    """
    if loop.resume == "never" or (loop.resume == "auto" and not loop.checkpoint_every):
        return Beginning(wanted)
    if loop.resume != "auto":
        return _named(Path(loop.resume), terms)
    notes = []
    for folder in _runs(wanted):
        newest = _newest(folder)
        if newest is None:
            notes += _unreadable(folder)
        if newest is None or _finished(folder):
            continue
        if Checkpointer(checkpoints_of(folder)).in_use:
            notes.append(f"{folder} is being trained by another process; a new run begins.")
        elif changed := terms.differences(newest):
            said = "; ".join(f"{one.subject} {one.why}" for one in changed)
            notes.append(f"{folder} is unfinished with other settings ({said}); a new run begins.")
        else:
            return Beginning(folder, True, newest.step, tuple(notes))
    return Beginning(wanted, notes=tuple(notes[:1]))


def _named(folder: Path, terms: Terms) -> Beginning:
    folder = folder.parent if folder.name == "checkpoints" else folder
    newest, checkpoints = _newest(folder), Checkpointer(checkpoints_of(folder))
    if newest is None and checkpoints.steps():
        checkpoints.manifest()  # raises why it cannot be read
    if newest is None:
        there = sorted(path.name for path in folder.glob("*"))[:4]
        why = f"holds {', '.join(there)} and no checkpoint" if there else "is no folder of a run"
        near = [str(run) for run in sorted(Path("runs").glob("*")) if _newest(run)]
        fix = f"--set train.resume={near[0]}" if near else "--set train.resume=auto"
        problem = Problem(f"train.resume={folder}", why, fix)
        raise CheckpointError(format_problems("There is nothing to go on with.", [problem]))
    problems = terms.differences(newest, _FREE_BY_NAME)
    headline = f"{count(len(problems), 'setting')} of {folder} cannot change on the way."
    raise_all(CheckpointError, headline, problems, "--set train.resume=never for a new run")
    return Beginning(folder, True, newest.step)


def _runs(wanted: Path) -> Iterator[Path]:
    """Folders that runs of this name have made, the newest first."""
    pattern = re.compile(re.escape(wanted.name) + r"(?:-(\d+))?")
    found = {
        int(match[1] or 1): path
        for path in (wanted.parent.iterdir() if wanted.parent.is_dir() else ())
        if (match := pattern.fullmatch(path.name)) and path.is_dir()
    }
    return (found[number] for number in sorted(found, reverse=True))


def _newest(folder: Path) -> Manifest | None:
    """The newest manifest of a run that can be read; damage is judged when it is restored."""
    checkpoints = Checkpointer(checkpoints_of(folder))
    for step in reversed(checkpoints.steps()):
        try:
            return checkpoints.manifest(step)
        except CheckpointError:
            continue
    return None


def _unreadable(folder: Path) -> Iterator[str]:
    """Says why a run that has checkpoints cannot go on with any of them."""
    checkpoints = Checkpointer(checkpoints_of(folder))
    if checkpoints.steps():
        try:
            checkpoints.manifest()
        except CheckpointError as error:
            _, row, *_ = str(error).splitlines()
            yield f"{folder} cannot be gone on with ({row.strip()}); a new run begins."


def _finished(folder: Path) -> bool:
    return any(row["kind"] == "finished" for row in read_metrics(folder))


def _changes(before: Any, now: Any) -> str:
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return f"{before}, now {now}"
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names)
