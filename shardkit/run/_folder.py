"""A run's folder and its metrics file: nothing is overwritten, no line is half-written."""

import itertools
import json
import os
import time
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

    def __init__(self, folder: Path, after: int | None = None) -> None:
        """Opens the file of a new run, or that of a run which goes on.

        Args:
          folder: of the run.
          after: the step at which the run goes on; what it had written of later ones, which will
            be made again, is cut off.
        """
        self.path = folder / "metrics.jsonl"
        new = os.O_EXCL if after is None else 0
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | new | os.O_APPEND, 0o644)
        if after is not None:
            os.ftruncate(self._file, _kept_bytes(self.path.read_bytes(), after))

    def sync(self) -> None:
        """Puts what was written on the disk, before a checkpoint that relies on it."""
        os.fsync(self._file)

    def write(self, kind: str, **values: Any) -> None:
        """Appends `{"kind": kind, ..., "time": seconds since 1970}` as one line.

        Raises:
          ValueError: a value is not finite; JSON has no word for it.
        """
        row = {"kind": kind, **values, "time": round(time.time(), 3)}
        line = json.dumps(row, allow_nan=False) + "\n"
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


def _kept_bytes(content: bytes, after: int) -> int:
    """Length of the lines that a run which goes on after a step does not write again."""
    kept = 0
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break  # half a line, of a machine that went down
        if row.get("step", 0) > after or row["kind"] == "finished" or row.get("part") == "all":
            break
        kept += len(line)
    return kept


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads the whole lines of a run's metrics file; none where there is no such file."""
    path = folder / "metrics.jsonl"
    content = path.read_bytes() if path.is_file() else b""
    whole = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
    return [json.loads(line) for line in whole]
