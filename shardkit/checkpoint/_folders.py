"""Where the leaves of a step lie: each one has a folder, named by its path."""

import urllib.parse
from collections.abc import Iterable
from pathlib import PurePosixPath

from .._core.errors import CheckpointError, Problem, raise_all

_ARRAYS = "arrays/state"
_MAX_NAME = 255  # bytes of a file's name


def stored_name(path: str) -> str:
    """Returns a leaf's folder below the arrays: its path, with unsafe characters quoted."""
    return "/".join(map(_quote_key, path.split("/")))


def _quote_key(key: str) -> str:
    if set(key) <= {"."}:  # as folders ".", ".." and "" have another meaning
        return key.replace(".", "%2E") or "%"
    return urllib.parse.quote(key, safe="<>[]=,+")


def check_folders(leaves: Iterable[str]) -> None:
    """Refuses leaves whose folder has too long a name, or is inside the folder of another leaf.

    Dict keys with a `/` can cause the latter. Raises CheckpointError, which names all of them.
    """
    stored = {stored_name(path): path for path in leaves}
    problems = [
        Problem(path, f"would be stored among the files of {stored[above]}")
        for name, path in stored.items()
        for above in map(str, PurePosixPath(name).parents)
        if above in stored
    ]
    longest = {path: max(map(len, name.split("/"))) for name, path in stored.items()}
    problems += [
        Problem(path, f"would be a folder whose name has {n} bytes; files have at most {_MAX_NAME}")
        for path, n in longest.items()
        if n > _MAX_NAME
    ]
    fix = "shorter keys, of which no path begins with that of another leaf"
    raise_all(CheckpointError, "The state cannot be saved leaf by leaf.", problems, fix)


def leaf_folder(path: str) -> str:
    """Returns a leaf's folder below the folder of its step."""
    return f"{_ARRAYS}/{stored_name(path)}"


def leaves_of_files(names: Iterable[str], paths: Iterable[str]) -> dict[str, str | None]:
    """Returns the leaf that each file of the step belongs to; None for files about all leaves.

    >>> leaves_of_files(["arrays/state/a/b/c/0", "manifest.json"], ["a", "a/b"])
    {'arrays/state/a/b/c/0': 'a/b', 'manifest.json': None}
    """
    stored = {stored_name(path): path for path in paths}
    above = {name: map(str, PurePosixPath(name.split("/", 2)[-1]).parents) for name in names}
    return {
        name: next((stored[folder] for folder in folders if folder in stored), None)
        for name, folders in above.items()
    }
