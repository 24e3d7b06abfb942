"""Files of a checkpoint: folders of steps appear and vanish atomically; files have checksums."""

import contextlib
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .._core.errors import CheckpointError, Problem, format_problems
from .._core.io._files import FileInUseError, file_lock, os_errors_as, sync_folder, write_atomic
from ._manifest import MANIFEST, SavedFile, step_name, step_of_name

LOCK = ".lock"
# Folders that are being written or deleted, or are damaged, have no name of a step.
_SAVING, _DELETING, _DAMAGED = ".saving-", ".deleting-", "damaged-"
_BLOCK = 2**20


def step_folder(root: Path, step: int) -> Path:
    """Returns the folder of a complete step: `ROOT/step-00000300`."""
    return root / step_name(step)


def list_steps(root: Path) -> tuple[int, ...]:
    """Lists the complete steps below a folder, oldest first; none if there is no such folder."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        if os.path.lexists(root):  # a link to nothing
            raise
        names = []
    steps = map(step_of_name, names)
    return tuple(sorted(step for step in steps if step is not None))


def create_temporary_folder(root: Path, step: int) -> Path:
    """Creates a folder to write a step to until it is complete, under a name that is new."""
    path = root / f"{_SAVING}{step_name(step)}-{secrets.token_hex(4)}"
    path.mkdir()  # without parents: if the run's folder has vanished, the save fails
    return path


def commit(written: Path, root: Path, step: int, manifest: str) -> None:
    """Adds the manifest and renames the folder, which makes the step visible, complete."""
    with write_atomic(written / MANIFEST, sync=True) as temporary:
        temporary.write_text(manifest, "utf-8")
    for folder, _, _ in os.walk(written, topdown=False):
        sync_folder(Path(folder))
    os.rename(written, step_folder(root, step))
    sync_folder(root)


def delete_step(root: Path, step: int) -> list[str]:
    """Deletes a step; it leaves the listing before its first file is deleted.

    Returns:
      What could not be deleted; a folder that cannot leave the listing stays complete.
    """
    folder = step_folder(root, step)
    renamed = root / f"{_DELETING}{folder.name}-{secrets.token_hex(4)}"
    try:
        os.rename(folder, renamed)
    except OSError as error:
        return [_describe_remains(folder, error)]
    return delete(renamed)


def quarantine(root: Path, step: int) -> Path:
    """Renames a damaged step to `damaged-step-…`, which keeps its files; returns the new path."""
    number = 1
    while True:
        name = f"{_DAMAGED}{step_folder(root, step).name}" + (f"-{number}" if number > 1 else "")
        if not (root / name).exists():
            os.rename(step_folder(root, step), root / name)
            return root / name
        number += 1


def delete_incomplete(root: Path) -> list[str]:
    """Deletes what killed processes left half-written or half-deleted; returns what stays."""
    remains = [path for path in root.iterdir() if path.name.startswith((_SAVING, _DELETING))]
    return [message for path in remains for message in delete(path)]


def delete(path: Path) -> list[str]:
    """Deletes a folder, file or link; returns a message if it cannot be deleted.

    Steps are complete without it, so neither a save nor a start fails for it.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)  # what else can be deleted
        return [_describe_remains(path, error)]
    return []


def _describe_remains(path: Path, error: OSError) -> str:
    name = Path(error.filename or path).name
    problem = Problem(name, f"{error.strerror}; what is left only uses disk space")
    return format_problems(f"{path} cannot be deleted.", [problem], f"rm -r {str(path)!r}")


@contextlib.contextmanager
def lock_folder(root: Path) -> Iterator[None]:
    """Locks a folder for one writer; the lock ends with the process, however that ends.

    Raises CheckpointError if another process writes to the folder, or nobody can.
    """
    with contextlib.ExitStack() as stack:
        try:
            with os_errors_as(CheckpointError, "Nothing can be saved.", root, "a writable folder"):
                root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(file_lock(root / LOCK))
        except FileInUseError:
            problem = Problem(str(root), "another process is writing checkpoints there")
            fix = "wait for it, or another folder"
            message = format_problems("The folder is in use.", [problem], fix)
            raise CheckpointError(message) from None
        yield


class UnreadableFile(Exception):
    """A file is not what was written; the message says how."""


def read_file(
    folder: Path,
    name: str,
    files: Mapping[str, SavedFile],
    into: memoryview | None = None,
    *,
    checked: bool,
) -> memoryview:
    """Returns the bytes of a file below a step's folder, in the memory `into` if that is given.

    Raises UnreadableFile if they are not those that were written, by number and, if `checked`,
    CRC-32, or cannot be read.
    """
    if name not in files:
        raise UnreadableFile("was not written by this save")
    content = memoryview(bytearray(files[name].bytes)) if into is None else into
    assert len(content) == files[name].bytes, name
    try:
        with (folder / name).open("rb", buffering=0) as file:
            size, done = os.fstat(file.fileno()).st_size, 0
            while done < min(size, len(content)):
                done += file.readinto(content[done:]) or len(content)
    except FileNotFoundError:
        raise UnreadableFile("is gone") from None
    except OSError as error:
        raise UnreadableFile(f"cannot be read: {error.strerror}") from error
    crc = f"{zlib.crc32(content):08x}" if checked else files[name].crc32
    if why := _describe_difference(files[name], SavedFile(size, crc)):
        raise UnreadableFile(why)
    return content


def listing_problems(folder: Path, files: Mapping[str, SavedFile]) -> dict[str, str]:
    """Compares names and sizes below a folder with a manifest: `{name: what is wrong with it}`."""
    sizes = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
    }
    wrong = {name: "is gone" for name in files if name not in sizes}
    for name, want in files.items():
        if name in sizes and sizes[name] != want.bytes:
            wrong[name] = _describe_difference(want, SavedFile(sizes[name], ""))
    unknown = set(sizes) - {MANIFEST, *files}
    return wrong | {name: "was not written by this save" for name in sorted(unknown)}


def content_problems(folder: Path, files: Mapping[str, SavedFile]) -> dict[str, str]:
    """Compares the CRC-32 of files with a manifest: `{name: what is wrong with it}`."""

    def check(name: str) -> str:
        try:
            return _describe_difference(files[name], _compute_checksum(folder / name))
        except FileNotFoundError:
            return "is gone"
        except OSError as error:
            return f"cannot be read: {error.strerror}"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = dict(zip(files, pool.map(check, files), strict=True))
    return {name: why for name, why in results.items() if why}


def _describe_difference(want: SavedFile, actual: SavedFile) -> str:
    if actual.bytes != want.bytes:
        return f"has {actual.bytes} bytes, {want.bytes} were written"
    if actual.crc32 != want.crc32:
        return f"has CRC-32 {actual.crc32}, {want.crc32} was written"
    return ""


def _compute_checksum(path: Path) -> SavedFile:
    crc = size = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return SavedFile(size, f"{crc:08x}")
