"""What several processes of one run do together: share a folder, and leave."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from .._core.errors import ConfigError
from ..processes import ProcessGroup
from ._resume import ResumeDecision
from ._stop import Stopped


def create_shared_folder(process_group: ProcessGroup, decision: ResumeDecision) -> Path:
    """Returns the folder of the run; process 0 creates that of a new one."""
    path = None
    if process_group.index == 0:
        path = str(decision.folder if decision.resumed else create_folder(decision.folder))
    return Path(process_group.gather("folder", path)[0])


@contextlib.contextmanager
def leave_together(process_group: ProcessGroup) -> Iterator[None]:
    """Ends a block that all processes leave after the same update, because of a signal."""
    try:
        yield
    except Stopped:
        process_group.leave()
        raise


def create_folder(folder: Path) -> Path:
    """Creates a folder that did not exist: `folder`, or `folder-2`, `folder-3`, ….

    `mkdir` is atomic, so two runs that start together never share one. Raises ConfigError if it
    fails.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
    except OSError as error:
        why = f"{error.strerror}."
        fix = "--set train.out=FOLDER"
        raise ConfigError.of("The run folder cannot be created.", str(folder), why, fix) from error
    raise AssertionError("unreachable")
