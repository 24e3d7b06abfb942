"""A run's folder and its metrics file: nothing is overwritten, no line is half-written."""

import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .._core.io import append_atomic
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
      broken: numbers of the lines, counted from 1, that were no rows.
    """

    def __init__(
        self,
        folder: Path,
        after: int | None = None,
        told: Callable[[str], None] | None = None,
    ) -> None:
        """Opens the file of a new run, or that of a run which goes on.

        Args:
          folder: of the run.
          after: the step at which the run goes on; what it had written of later ones, which will
            be made again, is cut off.
          told: is given a word on the first row that cannot be written, and the run goes on
            without it and any later one (`train.on_save_error=go_on`); by default it is an error.

        Raises:
          ConfigError: the file cannot be opened, or read.
        """
        self.path, self._told, self._deaf = folder / METRICS, told, False
        self.before: list[dict[str, Any]] = []
        self.void: list[dict[str, Any]] = []
        self.broken: list[int] = []
        new = os.O_EXCL if after is None else 0
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | new | os.O_APPEND, 0o644)
            if after is not None:
                self._go_on(after)
        except OSError as error:
            raise self._lost(error) from error

    def _go_on(self, after: int) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = _kept_lines(lines, after)
        os.ftruncate(self._file, sum(map(len, lines[:kept])))
        self.before, self.void = parse_rows(lines[:kept]).rows, parse_rows(lines[kept:]).rows
        self.broken = parse_rows(lines).broken

    def sync(self) -> None:
        """Puts what was written on the disk, before a checkpoint that relies on it.

        Raises:
          ConfigError: it cannot be put there.
        """
        with self._writing():
            os.fsync(self._file)

    def write(self, kind: str, **values: Any) -> None:
        """Appends `{"kind": kind, ..., "time": seconds since 1970}` as one line.

        Raises:
          ConfigError: the row cannot be written, and nothing of it was.
          ValueError: a value is not finite; JSON has no word for it.
        """
        row = {"kind": kind, **values, "time": round(time.time(), 3)}
        line = json.dumps(row, allow_nan=False) + "\n"
        with self._writing():
            append_atomic(self._file, line)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._told is None:
                raise self._lost(error) from error
            if not self._deaf:
                self._told(f"{self._lost(error)}\nThe run goes on (train.on_save_error=go_on).")
            self._deaf = True

    def _lost(self, error: OSError) -> ConfigError:
        problem = Problem(str(self.path), f"{error.strerror}; what is in it stays.")
        fix = "room and rights for the folder; the same command then goes on from the last save"
        return ConfigError(format_problems("The run cannot write its metrics.", [problem], fix))

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
    """Number of lines up to the last row that a run which goes on after a step does not repeat."""
    kept = 0
    for number, line in enumerate(lines, 1):
        rows = parse_rows([line]).rows if line.endswith(b"\n") else []
        if rows and _again(rows[0], after):
            break
        kept = number if rows else kept
    return kept


def _again(row: dict[str, Any], after: int) -> bool:
    ends = row["kind"] == "finished" or row.get("part") == "all"
    return ends or row.get("step", 0) > after
