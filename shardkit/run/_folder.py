"""A run's folder and its metrics file: nothing is overwritten, no line is half-written."""

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .._errors import ConfigError, Problem, format_problems

METRICS = "metrics.jsonl"


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
      before: rows that the run had written, of a run that goes on.
      void: rows that it had written behind them, of updates that will be made again.
    """

    def __init__(self, folder: Path, after: int | None = None) -> None:
        """Opens the file of a new run, or that of a run which goes on.

        Args:
          folder: of the run.
          after: the step at which the run goes on; what it had written of later ones, which will
            be made again, is cut off.
        """
        self.path = folder / METRICS
        new = os.O_EXCL if after is None else 0
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | new | os.O_APPEND, 0o644)
        self.before: list[dict[str, Any]] = []
        self.void: list[dict[str, Any]] = []
        if after is not None:
            lines = self.path.read_bytes().splitlines(keepends=True)
            kept = _kept_lines(lines, after)
            os.ftruncate(self._file, sum(map(len, lines[:kept])))
            self.before, self.void = parse_rows(lines[:kept]).rows, parse_rows(lines[kept:]).rows

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


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a metrics file, and the numbers of the lines that are none, counted from 1."""

    rows: list[dict[str, Any]]
    broken: list[int]


def parse_rows(lines: Sequence[bytes]) -> Rows:
    """Reads lines; what a machine that went down left half-written is no row.

    >>> parse_rows([b'{"kind": "start"}', b'{"kind": "st'])
    Rows(rows=[{'kind': 'start'}], broken=[2])
    """
    found = Rows([], [])
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and "kind" in row:
            found.rows.append(row)
        else:
            found.broken.append(number)
    return found


def read_rows(folder: Path) -> Rows:
    """Reads the metrics of a run; none where there is no such file."""
    path = folder / METRICS
    return parse_rows(path.read_bytes().splitlines() if path.is_file() else [])


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads the whole rows of a run's metrics file; none where there is no such file."""
    return read_rows(folder).rows


def _kept_lines(lines: Sequence[bytes], after: int) -> int:
    """Number of lines that a run which goes on after a step does not write again."""
    for number, line in enumerate(lines):
        rows = parse_rows([line]).rows
        if not rows or _again(rows[0], after):
            return number
    return len(lines)


def _again(row: dict[str, Any], after: int) -> bool:
    ends = row["kind"] == "finished" or row.get("part") == "all"
    return ends or row.get("step", 0) > after
