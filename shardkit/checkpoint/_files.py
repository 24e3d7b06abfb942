"""Files of a checkpoint: whole folders appear and vanish at once, and every byte is accounted."""

import contextlib
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .._core.errors import CheckpointError, Problem, format_problems
from .._core.io._files import FileInUseError, file_lock, os_errors_as, sync_folder, write_atomic
from ._manifest import MANIFEST, SavedFile

ARRAYS, LOCK = "arrays", ".lock"
# What is being written or deleted has a name that no listing of steps matches.
_SAVING, _DELETING, _DAMAGED = ".saving-", ".deleting-", "damaged-"
_STEP = re.compile(r"step-(\d{8,})")
_BLOCK = 2**20


def step_folder(root: Path, step: int) -> Path:
    """Where a complete step is: `ROOT/step-00000300`."""
    return root / f"step-{step:08d}"


def list_steps(root: Path) -> tuple[int, ...]:
    """Complete steps below a folder, oldest first; none where there is no such folder."""
    names = os.listdir(root) if root.is_dir() else []
    return tuple(sorted(int(found[1]) for name in names if (found := _STEP.fullmatch(name))))


def being_saved(root: Path, step: int) -> Path:
    """Where a step is written before it has its name."""
    return root / f"{_SAVING}{step_folder(root, step).name}"


def saving_folder(root: Path, step: int) -> Path:
    """Makes the folder in which a step is written."""
    path = being_saved(root, step)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()  # a folder that vanished under a run is told, not made anew
    return path


def commit(written: Path, root: Path, step: int, manifest: str) -> None:
    """Gives a written folder its manifest and name: invisible before, complete after."""
    with write_atomic(written / MANIFEST, sync=True) as part:
        part.write_text(manifest, "utf-8")
    for folder, _, _ in os.walk(written, topdown=False):
        sync_folder(Path(folder))
    os.rename(written, step_folder(root, step))
    sync_folder(root)


def delete_step(root: Path, step: int) -> None:
    """Deletes a step; it is gone from the listing before its first file is."""
    gone = root / f"{_DELETING}{step_folder(root, step).name}"
    os.rename(step_folder(root, step), gone)
    shutil.rmtree(gone)


def set_aside(root: Path, step: int) -> Path:
    """Renames a damaged step, so that it neither counts nor is lost; returns its new name."""
    number = 1
    while True:
        name = f"{_DAMAGED}{step_folder(root, step).name}" + (f"-{number}" if number > 1 else "")
        if not (root / name).exists():
            os.rename(step_folder(root, step), root / name)
            return root / name
        number += 1


def sweep(root: Path) -> None:
    """Deletes what killed processes left half-written or half-deleted."""
    for path in root.iterdir():
        if path.name.startswith((_SAVING, _DELETING)):
            shutil.rmtree(path)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds a folder for one writer; the lock goes with the process, however it ends.

    Raises:
      CheckpointError: another process writes there, or nothing can be written there.
    """
    with contextlib.ExitStack() as held:
        try:
            with os_errors_as(
                CheckpointError, "Nothing can be saved.", root, "a folder that can be written"
            ):
                root.mkdir(parents=True, exist_ok=True)
                held.enter_context(file_lock(root / LOCK))
        except FileInUseError:
            problem = Problem(str(root), "another process is writing checkpoints there")
            fix = "wait for it, or another folder"
            message = format_problems("The folder is in use.", [problem], fix)
            raise CheckpointError(message) from None
        yield


def checksums(folder: Path) -> dict[str, SavedFile]:
    """Size and CRC-32 of every file below a folder but the manifest, and puts them on the disk."""
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: _checksum(folder / name, sync=True), names)
        return dict(zip(names, found, strict=True))


class Unreadable(Exception):
    """A file is not what was written; says how."""


def read_checked(folder: Path, name: str, files: Mapping[str, SavedFile]) -> bytes:
    """Returns the bytes of a file, which are those that were written.

    Raises:
      Unreadable: they are not, or cannot be had.
    """
    if name not in files:
        raise Unreadable("was not written by this save")
    try:
        content = (folder / name).read_bytes()
    except FileNotFoundError:
        raise Unreadable("is gone") from None
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from error
    if why := _differs(files[name], SavedFile(len(content), f"{zlib.crc32(content):08x}")):
        raise Unreadable(why)
    return content


def listing_problems(folder: Path, files: Mapping[str, SavedFile]) -> dict[str, str]:
    """Compares names and sizes below a folder with a manifest: `{name: what is wrong with it}`."""
    there = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
    }
    wrong = {name: "is gone" for name in files if name not in there}
    for name, want in files.items():
        if name in there and there[name] != want.bytes:
            wrong[name] = _differs(want, SavedFile(there[name], ""))
    strange = set(there) - {MANIFEST, *files}
    return wrong | {name: "was not written by this save" for name in sorted(strange)}


def content_problems(folder: Path, files: Mapping[str, SavedFile]) -> dict[str, str]:
    """Compares the CRC-32 of files with a manifest: `{name: what is wrong with it}`."""

    def look(name: str) -> str:
        try:
            return _differs(files[name], _checksum(folder / name))
        except FileNotFoundError:
            return "is gone"
        except OSError as error:
            return f"cannot be read: {error.strerror}"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = dict(zip(files, pool.map(look, files), strict=True))
    return {name: why for name, why in found.items() if why}


def _differs(want: SavedFile, found: SavedFile) -> str:
    if found.bytes != want.bytes:
        return f"has {found.bytes} bytes, {want.bytes} were written"
    if found.crc32 != want.crc32:
        return f"has CRC-32 {found.crc32}, {want.crc32} was written"
    return ""


def _checksum(path: Path, sync: bool = False) -> SavedFile:
    crc = size = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
        if sync:
            os.fsync(file.fileno())
    return SavedFile(size, f"{crc:08x}")
