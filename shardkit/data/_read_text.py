"""Reads text from files, and decides which of them a model never trains on.

The default corpus is the source of the Python standard library, which is on every machine that
runs shardkit. A hash of a file's relative path decides whether it is validation text, so neither
the order of a directory, nor a seed, nor a mesh, nor a file added later moves a file.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from .._core.errors import DataError, Problem, count, format_problems, raise_all
from .._core.io._files import check_regular, local_path
from ._corpus import END, Corpus
from ._shards import SUFFIXES

# Not read from the standard library: packages installed beside it (site-packages), modules that
# not every distribution ships or that newer versions dropped (test suites, IDLE, Tk, distutils,
# lib2to3, ensurepip), and generated files (codec tables, pydoc's topics, build configuration).
SKIPPED = frozenset(
    "site-packages dist-packages test tests idle_test idlelib tkinter turtledemo "
    "distutils lib2to3 ensurepip encodings pydoc_data".split()
)
_GENERATED = ("_sysconfigdata", "config-")  # files and folders at the top


def is_validation(name: str, fraction: float) -> bool:
    """Whether a file is validation text, from its relative path, with `/`, alone.

    The fraction is that of validation files, in (0, 1).

    >>> sum(is_validation(f"package/module_{i}.py", 0.05) for i in range(1000))
    53
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def read_standard_library(validation_fraction: float = 0.05) -> Corpus:
    """Reads the source files of the Python standard library.

    Args:
      validation_fraction: expected fraction of validation files.

    Returns:
      The corpus of the running interpreter; other Python versions have other bytes.

    Raises:
      DataError: the interpreter has no `.py` files (a zipped or frozen library).
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = [n for n in _relative_names(root, SKIPPED) if n.endswith(".py")]
    names = [n for n in names if not n.startswith(_GENERATED)]
    version = sysconfig.get_python_version()
    source = f"the Python {version} standard library"
    return _split_files(source, root, names, validation_fraction)


def read_corpus(path: str | Path, validation_fraction: float = 0.05) -> Corpus:
    """Reads a user's text as bytes.

    Args:
      path: a folder, whose files are split by path (hidden ones and Python's caches are not
        read); or one file, whose last bytes are validation text.
      validation_fraction: of the files, or of the bytes of one file.

    Raises:
      DataError: the path is missing, cannot be read, or leaves either part empty.
    """
    root = local_path(path, DataError, fix=_FIX)
    if os.path.isdir(root):  # unlike Path.is_dir, False if the path cannot be looked at
        _check_is_no_run(root)
        names = _relative_names(root, frozenset())
        return _split_files(f"the files in {root}", root, names, validation_fraction)
    text = _read_file(root)
    _check_is_text({root.name: text})
    cut = len(text) - round(validation_fraction * len(text))
    return _make_corpus(f"the file {root}", [text[:cut]], [text[cut:]], validation_fraction)


def read_documents(path: str | Path) -> Iterator[bytes]:
    """Yields the text files of a folder, or the one file; raises DataError for one that is none."""
    root = local_path(path, DataError, fix=_FIX)
    is_folder = os.path.isdir(root)
    if is_folder:
        _check_is_no_run(root)
    for file in [root / n for n in _relative_names(root, frozenset())] if is_folder else [root]:
        text = _read_file(file)
        _check_is_text({str(file): text})
        yield text


def list_shards(path: str | Path) -> list[Path]:
    """Lists the token shards at a path, none for text; raises DataError for a folder with both."""
    root = local_path(path, DataError, fix=_FIX)
    if not os.path.isdir(root):
        return [root] if root.suffix in SUFFIXES else []
    names = _relative_names(root, frozenset())
    shards = [name for name in names if name.endswith(SUFFIXES)]
    others = [name for name in names if not name.endswith(SUFFIXES)]
    if shards and others:
        _check_is_no_run(root)
        why = f"holds {count(len(shards), 'token shard')} (.bin, .npy) and {_list_some(others)}."
        fix = "--set data.path=FOLDER with nothing else in it, or the path of one shard"
        raise DataError.of("The folder is neither text nor tokens.", str(root), why, fix)
    return [root / name for name in shards]


def _list_some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{count(len(names), 'other file')} ({shown}{', …' if len(names) > 3 else ''})"


_FIX = "--set data.path=FOLDER of this machine"
# Files that identify the folder of a run, or of its checkpoints.
_RUN_FILES = ("metrics.jsonl", "step-*/manifest.json", "checkpoints/step-*/manifest.json")


def _check_is_no_run(root: Path) -> None:
    """Refuses the folder of a run: its metrics and checkpoints would be read as text."""
    run_files = [path for pattern in _RUN_FILES for path in sorted(root.glob(pattern))[:1]]
    if run_files:
        why = f"holds {run_files[0].relative_to(root)}: it is a run or its checkpoints, not text."
        problem = Problem(f"data.path={str(root)!r}", why, _USE_TEXT)
        raise DataError(format_problems("The folder holds something else.", [problem]))


def _check_is_text(texts: dict[str, bytes]) -> None:
    """Refuses files with zero bytes, which mark the ends of files in a corpus."""
    binary = {name: text.index(END) for name, text in texts.items() if END in text}
    problems = [
        Problem(name, f"has a zero byte at byte {at:,}; text has none.")
        for name, at in list(binary.items())[:5]
    ]
    if len(binary) > 5:
        problems.append(Problem("…", f"and {count(len(binary) - 5, 'more file')} like these."))
    fix = "only text in data.path, or tokens made of it: sk.data.write_tokens"
    headline = f"{count(len(binary), 'file')} of the corpus cannot be text."
    raise_all(DataError, headline, problems, fix)


def _relative_names(root: Path, skipped: frozenset[str]) -> list[str]:
    """Lists the files below `root`, without hidden ones, caches, and those in skipped folders.

    Links to folders are followed, each once. A folder that cannot be read raises a DataError.
    """
    names, seen = [], set()
    for folder, folders, files in os.walk(root, onerror=_raise_unreadable, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        ignored = {*skipped, "__pycache__"}
        folders[:] = [f for f in folders if f not in ignored and not f.startswith(".")]
        below = Path(folder).relative_to(root)
        names += [(below / f).as_posix() for f in files if not f.startswith(".")]
    return sorted(names)


def _split_files(source: str, root: Path, names: Iterable[str], fraction: float) -> Corpus:
    texts = {name: _read_file(root / name) for name in names}
    _check_is_text(texts)
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for name, text in texts.items():
        parts[is_validation(name, fraction)].append(text)
    return _make_corpus(source, parts[0], parts[1], fraction)


def _make_corpus(
    source: str, train: list[bytes], validation: list[bytes], fraction: float
) -> Corpus:
    train = [text for text in train if text]
    validation = [text for text in validation if text]
    if not train and not validation:
        raise DataError.of("The corpus is empty.", source, "holds no bytes.", _USE_TEXT)
    if not train or not validation:
        empty, files = ("validation", train) if train else ("training", validation)
        why = f"{count(len(files), 'file')} fell into the other part at "
        why += f"data.validation_fraction={fraction:g}."
        fix = "--set data.validation_fraction=0.2, or add files"
        raise DataError.of(f"The {empty} part of the corpus is empty.", source, why, fix)
    return Corpus(
        source=source,
        train=_join_files(train),
        validation=_join_files(validation),
        train_files=len(train),
        validation_files=len(validation),
    )


def _join_files(texts: list[bytes]) -> bytes:
    return b"".join(text + END for text in texts)


_USE_TEXT = "--set data.path=FOLDER_OF_TEXT, or leave data.path out for the standard library"


def _read_file(path: Path) -> bytes:
    try:
        check_regular(path)
        return path.read_bytes()
    except FileNotFoundError:
        problem = Problem(f"data.path={str(path)!r}", "there is no such file or folder.", _USE_TEXT)
        raise DataError(format_problems("The text cannot be read.", [problem])) from None
    except OSError as error:
        raise _unreadable(error, path) from error


def _raise_unreadable(error: OSError) -> NoReturn:
    raise _unreadable(error, Path(error.filename)) from error


def _unreadable(error: OSError, path: Path) -> DataError:
    denied = isinstance(error, PermissionError)
    fix = f"chmod -R u+rX {str(path)!r}" if denied else _USE_TEXT
    return DataError.of("The text cannot be read.", str(path), f"{error.strerror}.", fix)
