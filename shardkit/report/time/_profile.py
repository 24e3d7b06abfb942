"""Measured time of each collective, read from a profile that `jax.profiler` took of the step.

A profile has an event for each execution of an HLO instruction on each device, which names the
instruction, its module and often its run:

    all-reduce.3   300.9 µs   {"hlo_op": "all-reduce.3", "hlo_module": "jit_run", "run_id": 7, …}

Other programs (evaluation, init) have instructions of the same names. So only runs count that have
as many of the step's collectives as any run has.
"""

import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

from ..._core.errors import ReportError
from ..._core.io._files import local_path
from ..communication._ledger import Ledger

_SUFFIX = ".xplane.pb"
_FIX = "jax.profiler.start_trace(folder) and stop_trace() around steps, or train.profile of a run"
# (module, program, run) of an event.
_Run = tuple[str, object, object]


@dataclasses.dataclass(frozen=True)
class MeasuredTimes:
    """Seconds that collectives took, in a profile.

    A device also waits in a collective for the others. On simulated devices, which share the
    processors of one machine, times say nothing of a real network.
    """

    path: str  # the profile
    # for each row of the ledger seconds per step and device: the mean of its executions × how often
    # it runs; None where the profile does not have it. The rows of one instruction have its whole
    # time each.
    collectives: tuple[float | None, ...]
    executions: tuple[int, ...]  # for each row the number of executions measured, over all devices
    label: str = "measured"  # `"measured"`


def read_profile(path: str | os.PathLike[str], ledger: Ledger) -> MeasuredTimes:
    """Reads the times of a step's collectives: of an `.xplane.pb` file, or a folder's newest one.

    Raises ReportError if there is no profile, or none with a run of this step.
    """
    file = find_profile(path)
    names = {row.name for row in ledger}
    runs: dict[_Run, dict[str, list[float]]] = {}
    for run, name, seconds in _read_events(file):
        if name in names:
            runs.setdefault(run, {}).setdefault(name, []).append(seconds)
    most = max(map(len, runs.values()), default=0)
    if names and not most:
        why = f"has no event of the {len(names)} collectives of this step"
        raise _refuse(file, why, "profile the step of this report: its mesh, config and versions")
    times: dict[str, list[float]] = {}
    for events in runs.values():
        if len(events) == most:
            for name, seconds in events.items():
                times.setdefault(name, []).extend(seconds)
    measured = [times.get(row.name, []) for row in ledger]
    return MeasuredTimes(
        path=str(path),
        collectives=tuple(
            sum(seconds) / len(seconds) * row.runs if seconds else None
            for seconds, row in zip(measured, ledger, strict=True)
        ),
        executions=tuple(map(len, measured)),
    )


def find_profile(path: str | os.PathLike[str]) -> Path:
    """The newest profile of a folder that the profiler wrote to, or the file itself.

    Raises:
      ReportError: there is none.
    """
    path = local_path(path, ReportError, "The profile cannot be read.")
    files: Sequence[Path] = [path] if path.is_file() else [*path.rglob(f"*{_SUFFIX}")]
    if not files:
        raise _refuse(path, f"has no *{_SUFFIX}" if path.is_dir() else "does not exist", _FIX)
    return max(files, key=lambda file: file.stat().st_mtime)


def _refuse(path: Path, why: str, fix: str) -> ReportError:
    return ReportError.of("The profile cannot be read.", str(path), why, fix)


def _read_events(file: Path) -> list[tuple[_Run, str, float]]:
    """The run, instruction and seconds of each HLO event; raises ReportError for no profile."""
    try:
        planes = list(ProfileData.from_file(str(file)).planes)
    except (RuntimeError, ValueError) as error:
        raise _refuse(file, f"is not a profile: {error}", _FIX) from None
    # Newer jaxlibs warn when they create the type of `stats`; as an error that ends the process.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        events = (event for plane in planes for line in plane.lines for event in line.events)
        return [*_hlo_events(events)]


def _hlo_events(events: Iterable[Any]) -> Iterator[tuple[_Run, str, float]]:
    for event in events:
        stats = {str(name): value for name, value in event.stats if name is not None}
        if "hlo_op" in stats:
            run = str(stats.get("hlo_module", "")), stats.get("program_id"), stats.get("run_id")
            yield run, str(stats["hlo_op"]), event.duration_ns / 1e9
