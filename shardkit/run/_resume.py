"""Whether a run is new or resumes, decided from files alone, before any device is touched."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .._core.errors import (
    CheckpointError,
    ConfigError,
    Problem,
    count,
    did_you_mean,
    format_problems,
    raise_all,
)
from .._core.io._table import flatten
from ..checkpoint import Checkpointer, Manifest
from ..processes import ProcessGroup
from ._config import TrainConfig
from ._facts import FACT_NAMES, SOFTWARE, comparable_facts
from ._metrics_file import read_metrics
from ._source import DataSource

# A run that is named explicitly may also be made longer or shorter, a finished one longer.
_FREE_BY_NAME = ("train.steps",)
# These say how to resume.
_FREE = ("train.resume", "train.resume_with")
# The group of a manifest's config that holds the facts of `_facts`.
FACTS = "run"
_SAME_DATA = "the same data as before"


@dataclasses.dataclass(frozen=True)
class ResumeDecision:
    """Whether a run resumes, and from where."""

    folder: Path  # of the run that resumes; of a new run, the folder that it would like
    resumed: bool = False  # whether it resumes
    step: int = 0  # updates already made, if the newest checkpoint is intact; 0 for a new run
    notes: tuple[str, ...] = ()  # messages for the user about the choice
    # those of the newest checkpoint, see `_facts`; none for a new run
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, run: Path, newest: Manifest, notes: Iterable[str]) -> "ResumeDecision":
        """A run that resumes from a checkpoint."""
        facts = newest.config.get(FACTS, {}) if isinstance(newest.config, Mapping) else {}
        return cls(run, True, newest.step, tuple(notes), facts)


def checkpoints_folder(folder: Path) -> Path:
    """Returns the folder of the checkpoints of a run."""
    return folder / "checkpoints"


def decide_resume(
    folder: Path,
    config: TrainConfig,
    source: DataSource,
    *,
    record: Mapping[str, Any],
    decides: Sequence[str] | None = None,
    facts: Mapping[str, Any] = MappingProxyType({}),
    process_group: ProcessGroup,
) -> ResumeDecision:
    """Finds the run to resume, if any. Process 0 decides for all.

    Of the same name, `folder-2`, `folder-3`, … are looked at too, the newest first. `decides` are
    names or groups of the record (`model`, `train.seed`) that determine the numbers of a run and so
    must not change when it resumes; None for all of them. `facts` decide besides the record, as far
    as they are known; the position of the batches must be the one in the checkpoint.

    Raises ConfigError if `train.resume_with` names nothing that can differ; and, in process 0
    alone, CheckpointError if `train.resume` names a run that these settings cannot resume.
    """
    _check_names(config.resume_with, record)
    settings = _Settings(record, decides, facts, source, config.resume_with)
    values: dict[str, Any] | None = None
    if process_group.index == 0:
        decision = _decide(folder, config, settings)
        values = {**vars(decision), "folder": str(decision.folder), "facts": dict(decision.facts)}
    first = process_group.gather("resume", values)[0]
    made = {"folder": Path(first["folder"]), "notes": tuple(first["notes"])}
    return ResumeDecision(**first | made)


def _decide(folder: Path, config: TrainConfig, settings: "_Settings") -> ResumeDecision:
    if config.resume == "never" or (config.resume == "auto" and not config.checkpoint_every):
        return ResumeDecision(folder)
    if config.resume != "auto":
        return _decide_named(Path(config.resume).expanduser(), settings)
    notes = []
    for run in _list_runs(folder):
        newest = _read_newest_manifest(run)
        if newest is None:
            notes += _explain_unreadable(run)
        if newest is None:
            continue
        finished = any(row["kind"] == "finished" for row in read_metrics(run))
        if finished and newest.step >= config.steps:
            if settings.find_differences(newest, _FREE_BY_NAME):
                continue
            note = _describe_finished(run, newest.step, _find_unused(folder))
            return ResumeDecision(folder, notes=(*notes, note))
        if Checkpointer(checkpoints_folder(run)).in_use:
            notes.append(f"{run} is in use by another process. Starting a new run.")
        elif problems := settings.find_differences(newest, _FREE_BY_NAME if finished else ()):
            changes = "; ".join(f"{problem.subject} {problem.why}" for problem in problems)
            notes.append(f"{run} has other settings ({changes}). Starting a new run.")
            notes.append(f"To resume {run} with them: {_accept(problems)}")
        else:
            return ResumeDecision.of(run, newest, [*notes, *settings.describe_software(newest)])
    return ResumeDecision(folder, notes=tuple(notes[:2]))


def _decide_named(folder: Path, settings: "_Settings") -> ResumeDecision:
    folder = folder.parent if folder.name == "checkpoints" else folder
    newest, checkpoints = _read_newest_manifest(folder), Checkpointer(checkpoints_folder(folder))
    if newest is None and checkpoints.steps():
        checkpoints.manifest()  # raises why it cannot be read
    if newest is None:
        names = sorted(path.name for path in folder.glob("*"))[:4]
        why = f"contains {', '.join(names)} but no checkpoint" if names else "is not a run folder"
        runs = [str(run) for run in sorted(Path("runs").glob("*")) if _read_newest_manifest(run)]
        fix = f"--set train.resume={runs[0]}" if runs else "--set train.resume=auto"
        problem = Problem(f"train.resume={folder}", why, fix)
        raise CheckpointError(format_problems("No checkpoint to resume from.", [problem]))
    problems = settings.find_differences(newest, _FREE_BY_NAME)
    headline = f"Cannot resume {folder} with {count(len(problems), 'changed setting')}."
    fix = f"{_accept(problems)} to resume with them, or --set train.resume=never for a new run"
    raise_all(CheckpointError, headline, problems, fix)
    return ResumeDecision.of(folder, newest, settings.describe_software(newest))


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What decides the numbers of this run, to compare with a checkpoint."""

    record: Mapping[str, Any]  # settings as plain values
    decides: Sequence[str] | None  # names or groups of the record that decide; None for all
    facts: Mapping[str, Any]  # what decides besides the record
    source: DataSource  # batches
    accepted: Sequence[str]  # names or groups that may differ

    def find_differences(self, saved: Manifest, free: tuple[str, ...]) -> list[Problem]:
        """Lists what decides the numbers and is not as in a checkpoint, but for what may differ."""
        config = dict(saved.config) if isinstance(saved.config, Mapping) else {}
        facts_before = config.pop(FACTS, {})
        changed = {
            name: why
            for name, why in _compare(config, self.record).items()
            if self.decides is None or _is_in(name, self.decides)
            if name not in _FREE
        }
        problems = [
            Problem(name, why, f"--set {name}={flatten(config).get(name)}")
            for name, why in changed.items()
            if name not in free and not _is_in(name, self.accepted)
        ]
        # Another setting changes the program and the data too, and is reported by its name.
        if problems:
            return problems
        groups = comparable_facts(facts_before, self.facts, programs=not changed)
        before, now = ({g: facts[g] for g in groups} for facts in (facts_before, self.facts))
        problems = [
            Problem(name, why)
            for name, why in _compare(before, now).items()
            if not _is_in(name, self.accepted)
        ]
        position = self.source.state(saved.step)
        if not problems and saved.data != position and "data" not in self.accepted:
            why = f"is not the data that the run read: {_describe_changes(saved.data, position)}"
            problems.append(Problem(str(self.source), why, _SAME_DATA))
        return problems

    def describe_software(self, saved: Manifest) -> Iterator[str]:
        """Yields how packages, environment and compiler differ from a checkpoint's; they may."""
        config = saved.config if isinstance(saved.config, Mapping) else {}
        facts = config.get(FACTS, {})
        for names in SOFTWARE:
            groups = [g for g in names if g in facts and g in self.facts]
            changed = _compare(*({g: known[g] for g in groups} for known in (facts, self.facts)))
            texts = "; ".join(f"{name} {why}" for name, why in changed.items())
            if texts:
                yield f"Other software than in the checkpoint: {texts}. Numbers may differ."


def _compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Returns `{name: "was 1, is 2"}` of values that differ, by their names in nested mappings."""
    a, b = flatten(before), flatten(now)
    return {
        name: f"was {a.get(name)!r}, is {b.get(name)!r}"
        for name in {**a, **b}
        if a.get(name) != b.get(name)
    }


def _is_in(name: str, groups: Sequence[str]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def _accept(problems: Sequence[Problem]) -> str:
    """Returns the option that accepts differences; one of the data has the name of its source."""
    names = [problem.subject for problem in problems]
    if all(problem.fix == _SAME_DATA for problem in problems):
        names = ["data"]
    return f"--set train.resume_with={','.join(names)}"


def _check_names(accepted: Sequence[str], record: Mapping[str, Any]) -> None:
    known = [*flatten(record), *record, *FACT_NAMES, "data"]
    problems = [
        Problem(
            f"train.resume_with={name}",
            f"no setting has this name.{did_you_mean(name, known)}",
            f"--set train.resume_with={known[0]}",
        )
        for name in accepted
        if not any(_is_in(other, [name]) or _is_in(name, [other]) for other in known)
    ]
    raise_all(ConfigError, "These differences cannot be accepted.", problems)


def _describe_finished(run: Path, steps: int, new: Path) -> str:
    more = f"--set train.steps={2 * steps}"
    return f"{run} is finished ({steps} steps). A new run starts in {new}; {more} goes on with it."


def _find_unused(folder: Path) -> Path:
    """The folder that a new run of this name gets."""
    names = (f"{folder.name}-{number}" for number in itertools.count(2))
    later = map(folder.with_name, names)
    return next(path for path in itertools.chain([folder], later) if not path.exists())


def _list_runs(folder: Path) -> Iterator[Path]:
    """Yields the folders of runs of this name, the newest first: `mine-3`, `mine-2`, `mine`."""
    pattern = re.compile(re.escape(folder.name) + r"(?:-(\d+))?")
    runs = {
        int(match[1] or 1): path
        for path in (folder.parent.iterdir() if folder.parent.is_dir() else ())
        if (match := pattern.fullmatch(path.name)) and path.is_dir()
    }
    return (runs[number] for number in sorted(runs, reverse=True))


def _read_newest_manifest(folder: Path) -> Manifest | None:
    """Reads the newest readable manifest of a run; arrays are checked when they are restored."""
    checkpoints = Checkpointer(checkpoints_folder(folder))
    for step in reversed(checkpoints.steps()):
        try:
            return checkpoints.manifest(step)
        except CheckpointError:
            continue
    return None


def _explain_unreadable(folder: Path) -> Iterator[str]:
    """Yields why a run that has checkpoints cannot resume from any of them."""
    checkpoints = Checkpointer(checkpoints_folder(folder))
    if checkpoints.steps():
        try:
            checkpoints.manifest()
        except CheckpointError as error:
            _, row, *_ = str(error).splitlines()
            yield f"Cannot resume {folder} ({row.strip()}). Starting a new run."


def _describe_changes(before: Any, now: Any) -> str:
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return f"{before}, now {now}"
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names)
