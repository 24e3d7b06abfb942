"""A run's folder and its metrics file: nothing is overwritten, no line is half-written."""

import itertools
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .._errors import ConfigError, Problem, format_problems


def new_folder(wanted: Path) -> Path:
    """Makes a folder that did not exist: `wanted`, or `wanted-2`, `wanted-3`, ….

    `mkdir` is atomic, so two runs that start together never share one.

    Raises:
      ConfigError: the folder cannot be made there.
    """
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        problem = Problem(str(wanted), f"{error.strerror}.", "--set train.out=FOLDER")
        raise ConfigError(format_problems("The run has nowhere to write.", [problem])) from error
    raise AssertionError("unreachable")


class MetricsFile:
    """JSON lines, one `write` each: whoever reads the file sees whole lines only.

    Attributes:
      path: `metrics.jsonl` in the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)

    def write(self, kind: str, **values: Any) -> None:
        """Appends `{"kind": kind, ...}` as one line.

        Raises:
          ValueError: a value is not finite; JSON has no word for it.
        """
        line = json.dumps({"kind": kind, **values}, allow_nan=False) + "\n"
        os.write(self._file, line.encode())

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the file."""
        os.close(self._file)
