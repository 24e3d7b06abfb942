"""The file of a sweep: one JSON line per row, written as it goes, never half.

The first line says which sweep it is. A row that is written again, with times, replaces the one
before. A process that is killed leaves at most one unfinished line, which the next one drops. The
file is locked while a sweep writes to it, and a lock ends with its process, however that ends.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

from .._core.errors import Problem, SweepError, format_problems, raise_all
from .._core.io._files import FileInUseError, append_atomic, file_lock, os_errors_as
from .._core.io._flatten import flatten
from ._row import SweepRow

FILE = "rows.jsonl"
_FORMAT = "shardkit_sweep"
_VERSION = 1


class Journal:
    """The rows of one sweep, in memory and on disk.

    Attributes:
      folder: where the sweep's files are.
      rows: key of a case → its newest row.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Opens a folder for a sweep, new or going on.

        Args:
          folder: made where there is none.
          identity: plain values that tell this sweep from others.

        Raises:
          SweepError: the folder holds something else, or rows of another sweep, another process
            is writing to it, and then nothing of it is changed; or it cannot be written.
        """
        self.folder, self._path = folder, folder / FILE
        header = json.dumps({_FORMAT: _VERSION, "identity": identity}, sort_keys=True)
        with contextlib.ExitStack() as opened:
            try:
                with sweep_file_errors(self._path):
                    _check_folder(folder)
                    folder.mkdir(parents=True, exist_ok=True)
                    self._file = opened.enter_context(file_lock(self._path))
            except FileInUseError:
                why = "another sweep is writing to it"
                fix = "wait until that one has ended; or --out NEW_FOLDER, or out="
                problem = Problem(str(self._path), why, fix)
                headline = "The sweep's folder is in use."
                raise SweepError(format_problems(headline, [problem])) from None
            self.rows = self._taken_over(header)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        """The journal itself, which the end of the block lets go of."""
        return self

    def __exit__(self, *_: object) -> None:
        """Unlocks the file."""
        self._opened.close()

    def add(self, row: SweepRow) -> None:
        """Writes a row."""
        self._append(row.to_line())
        self.rows[row.case.key] = row

    def _taken_over(self, header: str) -> dict[str, SweepRow]:
        """The rows that are there, behind a header that is this sweep's."""
        try:
            text = self._path.read_text("utf-8")
        except UnicodeDecodeError:
            _refuse(self._path, "is no text")
        whole = text[: text.rfind("\n") + 1]
        if not whole and not header.startswith(text):
            _refuse(self._path, "is no file of a sweep")
        rows = _read_rows(self._path, whole.splitlines(), json.loads(header)["identity"])
        if whole != text:
            with sweep_file_errors(self._path):
                os.truncate(self._path, len(whole.encode()))
        if not whole:
            self._append(header)
        return rows

    def _append(self, line: str) -> None:
        with sweep_file_errors(self._path):
            append_atomic(self._file, f"{line}\n", sync=True)


def sweep_file_errors(path: Path) -> contextlib.AbstractContextManager[None]:
    """Raises what the system refuses inside the block as a `SweepError` that names the file."""
    headline = "The sweep cannot write its files; every row before is kept."
    fix = "free space and permission to write in the folder, then the same call: it resumes there"
    return os_errors_as(SweepError, headline, path, fix)


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        _refuse(folder, "is a file")
    there = sorted(path.name for path in folder.iterdir())
    if there and FILE not in there:
        _refuse(folder, f"holds {', '.join(there[:4])}, and no {FILE}")


def _refuse(path: Path, why: str) -> NoReturn:
    fix = "--out NEW_FOLDER, or out=; nothing was changed"
    raise SweepError(
        format_problems("This is no folder of a sweep.", [Problem(str(path), why)], fix)
    )


def _read_rows(path: Path, lines: list[str], identity: Mapping[str, Any]) -> dict[str, SweepRow]:
    if not lines:
        return {}
    _check_header(path, lines[0], identity)
    rows = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            row = SweepRow.from_line(line)
        except (ValueError, TypeError, KeyError) as error:
            problem = Problem(f"{path}:{number}", f"is no row: {type(error).__name__}: {error}")
            fix = "take the line out, and its case is tried again; nothing was changed"
            raise SweepError(
                format_problems("The sweep's file is damaged.", [problem], fix)
            ) from None
        rows[row.case.key] = row
    return rows


def _check_header(path: Path, line: str, identity: Mapping[str, Any]) -> None:
    try:
        header = json.loads(line)
        version, there = header[_FORMAT], header["identity"]
    except (ValueError, TypeError, KeyError):
        _refuse(path, "is no file of a sweep")
    if version != _VERSION:
        _refuse(path, f"has version {version} of the format, this is {_VERSION}")
    before, now = flatten(there), flatten(json.loads(json.dumps(identity)))
    problems = [
        Problem(
            name, f"was {_format_setting(name, before)} there, is {_format_setting(name, now)} now"
        )
        for name in sorted({*before, *now})
        if _format_setting(name, before) != _format_setting(name, now)
    ]
    fix = "--out NEW_FOLDER, or the settings of before; nothing was changed"
    raise_all(SweepError, f"{path} holds rows of another sweep.", problems, fix)


def _format_setting(name: str, settings: Mapping[str, Any]) -> str:
    return json.dumps(settings[name]) if name in settings else "—"
