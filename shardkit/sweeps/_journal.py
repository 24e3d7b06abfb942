"""The file of a sweep: one JSON line per row, appended as rows are made.

The first line identifies the format and the sweep. A later row of the same case, with times,
replaces the earlier one. A killed process leaves at most one unfinished line, which the next one
drops. The file is locked while a sweep writes to it; the lock ends with its process.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

from .._core.errors import Problem, SweepError, format_problems, raise_all
from .._core.io._files import FileInUseError, append_atomic, check_regular, file_lock, os_errors_as
from .._core.io._table import flatten
from ._row import SweepRow

FILE = "rows.jsonl"
_FORMAT = "shardkit_sweep"
_NOT_A_SWEEP = "is not the file of a sweep"
_VERSION = 3
"""Of the names of fields in a row. Files of other versions are refused, never converted."""


class Journal:
    """The rows of one sweep, in memory (key of a case → its newest row) and on disk."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Opens a folder for a new sweep, or to resume that of the same identity, as plain values.

        Raises SweepError if the folder holds other files or the rows of another sweep, another
        process writes to it, or it cannot be written. The folder is not changed then.
        """
        self.folder, self._path = folder, folder / FILE
        header = json.dumps({_FORMAT: _VERSION, "identity": identity}, sort_keys=True)
        with contextlib.ExitStack() as opened:
            try:
                with sweep_file_errors(self._path):
                    _check_folder(folder)
                    folder.mkdir(parents=True, exist_ok=True)
                    if self._path.exists():
                        check_regular(self._path)
                    self._file = opened.enter_context(file_lock(self._path))
            except FileInUseError:
                why = "another sweep writes to it"
                fix = "wait until it has ended; or --out NEW_FOLDER, or out="
                headline = "The sweep's folder is in use."
                raise SweepError.of(headline, str(self._path), why, fix) from None
            self.rows = self._read_existing(header)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        """Returns the journal; the end of the block unlocks its file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Unlocks the file."""
        self._opened.close()

    def add(self, row: SweepRow) -> None:
        """Writes a row."""
        self._append(row.to_line())
        self.rows[row.case.key] = row

    def _read_existing(self, header: str) -> dict[str, SweepRow]:
        """Rows of the file, after its header is checked; writes the header of a new file."""
        try:
            text = self._path.read_text("utf-8")
        except UnicodeDecodeError:
            _refuse(self._path, "is not UTF-8 text")
        complete = text[: text.rfind("\n") + 1]
        if not complete and not header.startswith(text):
            _refuse(self._path, _NOT_A_SWEEP)
        rows = _read_rows(self._path, complete.splitlines(), json.loads(header)["identity"])
        if complete != text:
            with sweep_file_errors(self._path):
                os.truncate(self._path, len(complete.encode()))
        if not complete:
            self._append(header)
        return rows

    def _append(self, line: str) -> None:
        with sweep_file_errors(self._path):
            append_atomic(self._file, f"{line}\n", sync=True)


def sweep_file_errors(path: Path) -> contextlib.AbstractContextManager[None]:
    """Turns an `OSError` inside the block into a `SweepError` that names the file."""
    headline = "The sweep cannot write its files; earlier rows are kept."
    fix = "free space or permission to write in the folder; the same call then resumes the sweep"
    return os_errors_as(SweepError, headline, path, fix)


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        _refuse(folder, "is a file")
    names = sorted(path.name for path in folder.iterdir())
    if names and FILE not in names:
        _refuse(folder, f"holds {', '.join(names[:4])}, and no {FILE}")


def _refuse(path: Path, why: str) -> NoReturn:
    fix = "--out NEW_FOLDER, or out=; nothing was changed"
    raise SweepError.of("The folder does not hold this sweep.", str(path), why, fix)


def _read_rows(path: Path, lines: list[str], identity: Mapping[str, Any]) -> dict[str, SweepRow]:
    if not lines:
        return {}
    _check_header(path, lines[0], identity)
    rows = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            row = SweepRow.from_line(line)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            problem = Problem(f"{path}:{number}", f"is not a row: {type(error).__name__}: {error}")
            fix = "delete the line, and its case runs again; nothing was changed"
            raise SweepError(
                format_problems("The sweep's file is damaged.", [problem], fix)
            ) from None
        rows[row.case.key] = row
    return rows


def _check_header(path: Path, line: str, identity: Mapping[str, Any]) -> None:
    try:
        header = json.loads(line)
        version, identity_before = header[_FORMAT], dict(header["identity"])
    except (ValueError, TypeError, KeyError, RecursionError):
        _refuse(path, _NOT_A_SWEEP)
    if version != _VERSION:
        _refuse(path, f"has format version {version}, and this shardkit reads {_VERSION}")
    before, now = flatten(identity_before), flatten(json.loads(json.dumps(identity)))
    shown = {k: (_format_setting(k, before), _format_setting(k, now)) for k in {*before, *now}}
    problems = [
        Problem(name, f"was {old} there, is {new} now")
        for name, (old, new) in sorted(shown.items())
        if old != new
    ]
    fix = "--out NEW_FOLDER, or the settings of before; nothing was changed"
    raise_all(SweepError, f"{path} holds rows of another sweep.", problems, fix)


def _format_setting(name: str, settings: Mapping[str, Any]) -> str:
    return json.dumps(settings[name]) if name in settings else "—"
