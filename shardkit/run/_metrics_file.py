"""`metrics.jsonl`: one JSON object per line, no line half-written."""

import contextlib
import dataclasses
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeGuard

from .._core.errors import ConfigError, Problem, format_problems
from .._core.io._files import append_atomic, check_regular, os_errors_as
from .._core.options import matches_annotation

METRICS = "metrics.jsonl"


class MetricsFile:
    """JSON lines, each appended by one `write`, so that readers see complete lines only."""

    def __init__(
        self,
        folder: Path,
        after: int | None = None,
        report_error: Callable[[str], None] | None = None,
        enabled: bool = True,
    ) -> None:
        """Creates the file of a new run, or opens that of one that resumes `after` a step.

        Rows of later steps are cut off, since these updates will be made again. `report_error` gets
        a message for the first row that cannot be written; this and later failures are then ignored
        (`train.on_save_error=continue`). By default a failure raises ConfigError. Processes other
        than the first are not `enabled` and write nothing.
        """
        self.path, self._report_error, self._reported = folder / METRICS, report_error, False
        # Rows of earlier processes of a resumed run, those whose updates will be made again, and
        # the numbers, counted from 1, of lines that are not rows.
        self.kept_rows: list[dict[str, Any]] = []
        self.dropped_rows: list[dict[str, Any]] = []
        self.broken_lines: list[int] = []
        self._file: int | None = None
        if enabled:
            new = os.O_EXCL if after is None else 0
            try:
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | new | os.O_APPEND, 0o644)
                check_regular(self.path)
                if after is not None:
                    self._truncate(self._file, after)
            except OSError as error:
                raise self._write_error(error) from error

    def _truncate(self, file: int, after: int) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = _count_kept_lines(lines, after)
        os.ftruncate(file, sum(map(len, lines[:kept])))
        self.kept_rows = parse_rows(lines[:kept]).rows
        self.dropped_rows = parse_rows(lines[kept:]).rows
        self.broken_lines = parse_rows(lines).broken

    def sync(self) -> None:
        """Forces what was written onto the disk; raises ConfigError where the disk refuses."""
        if self._file is not None:
            with self._handle_errors():
                os.fsync(self._file)

    def write(self, kind: str, **values: Any) -> None:
        """Appends `{"kind": kind, **values, "time": seconds since 1970}` as one line.

        Raises:
          ConfigError: the row cannot be written; no part of it was.
          ValueError: a value is NaN or infinite, which JSON cannot represent.
        """
        if self._file is not None:
            row = {"kind": kind, **values, "time": round(time.time(), 3)}
            line = json.dumps(row, allow_nan=False) + "\n"
            with self._handle_errors():
                if not self._is_at_path(self._file):
                    self._file = self._recover(self._file)
                append_atomic(self._file, line)

    def _is_at_path(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _recover(self, deleted: int) -> int:
        """Writes a file again that was deleted or moved during the run, from its descriptor."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        check_regular(self.path)
        append_atomic(file, os.pread(deleted, os.fstat(deleted).st_size, 0).decode())
        os.close(deleted)
        message = f"{self.path} was deleted or moved during the run; it is written again whole."
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        return file

    @contextlib.contextmanager
    def _handle_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._report_error is None:
                raise self._write_error(error) from error
            if not self._reported:
                text = f"{self._write_error(error)}\nTraining continues"
                self._report_error(f"{text} (train.on_save_error=continue).")
            self._reported = True

    def _write_error(self, error: OSError) -> ConfigError:
        problem = Problem(str(self.path), f"{error.strerror}; its content is unchanged.")
        fix = "free space and permissions; then rerun the same command to resume"
        return ConfigError(format_problems("The metrics cannot be written.", [problem], fix))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)


@dataclasses.dataclass(frozen=True)
class ParsedRows:
    """Rows of a metrics file, and the numbers, counted from 1, of lines that are not rows."""

    rows: list[dict[str, Any]]
    broken: list[int]


def parse_rows(lines: Sequence[bytes]) -> ParsedRows:
    """Parses lines; a line that a crash left half-written is not a row.

    >>> parse_rows([b'{"kind": "start"}', b'{"kind": "st'])
    ParsedRows(rows=[{'kind': 'start'}], broken=[2])
    """
    parsed = ParsedRows([], [])
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if _is_row(row):
            parsed.rows.append(row)
        else:
            parsed.broken.append(number)
    return parsed


# A number beyond this is no step and no time; NaN is less than none.
_LARGEST = 1e15
# Columns that readers of a metrics file calculate with.
_TYPES: Mapping[str, Any] = {
    "step": int,
    "time": float,
    "began": float,
    "seconds": float | Mapping[str, float],
    "data_seconds": float,
    "device": Mapping,
}


def _is_row(row: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a JSON value is a row: foreign kinds and columns are, known ones need their type."""
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        return False
    known = {name: row[name] for name in _TYPES if name in row}
    return all(matches_annotation(_TYPES[name], x) and _is_finite(x) for name, x in known.items())


def _is_finite(value: Any) -> bool:
    """Whether sums of such numbers are numbers; those in a mapping are its seconds."""
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, int | float) or abs(value) < _LARGEST


def read_rows(folder: Path) -> ParsedRows:
    """Reads the metrics file in the folder of a run; without one there are no rows."""
    path = folder / METRICS
    fix = "chmod -R u+rX, or the folder of another run"
    with os_errors_as(ConfigError, "The metrics cannot be read.", path, fix):
        return parse_rows(path.read_bytes().splitlines() if path.is_file() else [])


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads the rows of the metrics file in the folder of a run, without broken lines."""
    return read_rows(folder).rows


def _count_kept_lines(lines: Sequence[bytes], after: int) -> int:
    r"""Counts the lines to keep when a run resumes after a step.

    They end behind the last row before the first one that will be written again. For `after=2`:

        {"kind": "step", "step": 1}    kept
        \0\0\0                            kept: broken, but a row follows
        {"kind": "step", "step": 2}    kept
        {"kind": "step", "step": 3}    cut off, with everything behind it
    """
    kept = 0
    for number, line in enumerate(lines, 1):
        rows = parse_rows([line]).rows if line.endswith(b"\n") else []
        if rows and _is_repeated(rows[0], after):
            break
        kept = number if rows else kept
    return kept


def _is_repeated(row: dict[str, Any], after: int) -> bool:
    """Whether a run that resumes after a step writes this row again."""
    ends = row["kind"] == "finished" or row.get("part") == "all"
    return ends or row.get("step", 0) > after
