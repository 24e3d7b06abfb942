"""Where the bytes come from, and which of them the model never trains on.

The embedded corpus is the source of the Python standard library, which every machine that runs
shardkit already has. Files go to the held-out side by a hash of their relative path, so that
neither the order of a directory, nor a seed, nor a mesh, nor a file added later moves one.
"""

import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from .._core.errors import DataError, Problem, count, format_problems, raise_all
from ._shards import SUFFIXES
from ._stream import Stream

# A file ends with this byte, so that a model learns where files begin.
END = b"\0"

# Left out of the standard library: what is installed beside it (site-packages), what not every
# distribution ships or what newer versions dropped (test suites, IDLE, Tk, distutils, lib2to3,
# ensurepip), and what a generator wrote (codec tables, pydoc's topics, build configuration).
SKIPPED = frozenset(
    "site-packages dist-packages test tests idle_test idlelib tkinter turtledemo "
    "distutils lib2to3 ensurepip encodings pydoc_data".split()
)
_GENERATED = ("_sysconfigdata", "config-")  # files and folders at the top


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Bytes in two parts that share no file.

    Attributes:
      source: what was read, in words.
      train: the training files, each followed by a zero byte.
      held_out: the same for the files that are only scored.
      train_files: number of files in `train`.
      held_out_files: number of files in `held_out`.
    """

    source: str
    train: bytes = dataclasses.field(repr=False)
    held_out: bytes = dataclasses.field(repr=False)
    train_files: int
    held_out_files: int


@dataclasses.dataclass(frozen=True)
class TokenCorpus:
    """Tokens in two parts that share no document, or of one document no token.

    Attributes:
      source: what was read, in words.
      train: tokens to train on.
      held_out: tokens that are only scored.
    """

    source: str
    train: Stream = dataclasses.field(repr=False)
    held_out: Stream = dataclasses.field(repr=False)


def is_held_out(name: str, share: float) -> bool:
    """Says on which side a file falls, from its relative path alone.

    Args:
      name: path relative to the corpus, with `/`.
      share: expected fraction of files held out, in (0, 1).

    >>> sum(is_held_out(f"package/module_{i}.py", 0.05) for i in range(1000))
    53
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def standard_library(share: float = 0.05) -> Corpus:
    """Reads the Python standard library's own source files.

    Args:
      share: expected fraction of files held out.

    Returns:
      The corpus of the running interpreter: other Python versions give other bytes.

    Raises:
      DataError: the interpreter has no `.py` files (a zipped or frozen library).
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = [n for n in _relative_names(root, SKIPPED) if n.endswith(".py")]
    names = [n for n in names if not n.startswith(_GENERATED)]
    version = sysconfig.get_python_version()
    return _split(f"the Python {version} standard library", root, names, share)


def read_corpus(path: str | Path, share: float = 0.05) -> Corpus:
    """Reads a user's text, byte by byte.

    Args:
      path: a folder, whose files (but for hidden ones and Python's caches) are split by path;
        or one file, whose last `share` of bytes is held out.
      share: fraction held out.

    Raises:
      DataError: the path is missing, cannot be read, or leaves either side empty.
    """
    root = Path(path).expanduser()
    if os.path.isdir(root):  # unlike Path.is_dir, False for whatever cannot be looked at
        _check_is_data(root)
        return _split(f"the files in {root}", root, _relative_names(root, frozenset()), share)
    text = _read(root)
    _check_is_text({root.name: text})
    cut = len(text) - round(share * len(text))
    return _checked(f"the file {root}", [text[:cut]], [text[cut:]], share)


def documents(path: str | Path) -> Iterator[bytes]:
    """Yields the files of a folder, or the one file, without holding them all.

    Raises:
      DataError: one is missing, unreadable or no text.
    """
    root = Path(path).expanduser()
    folder = os.path.isdir(root)
    if folder:
        _check_is_data(root)
    for file in [root / n for n in _relative_names(root, frozenset())] if folder else [root]:
        text = _read(file)
        _check_is_text({str(file): text})
        yield text


def shard_paths(path: str | Path) -> list[Path]:
    """Lists the token shards that a path names; none where it names text.

    Raises:
      DataError: a folder that holds token shards and other files.
    """
    root = Path(path).expanduser()
    if not os.path.isdir(root):
        return [root] if root.suffix in SUFFIXES else []
    names = _relative_names(root, frozenset())
    shards = [name for name in names if name.endswith(SUFFIXES)]
    rest = [name for name in names if not name.endswith(SUFFIXES)]
    if shards and rest:
        _check_is_data(root)
        why = f"holds {count(len(shards), 'token shard')} (.bin, .npy) and {_some(rest)}."
        fix = "--set data.path=FOLDER with nothing else in it, or the path of one shard"
        problem = Problem(str(root), why, fix)
        raise DataError(format_problems("The folder is neither text nor tokens.", [problem]))
    return [root / name for name in shards]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{count(len(names), 'other file')} ({shown}{', …' if len(names) > 3 else ''})"


# What the folder of a run, or of its checkpoints, holds.
_OWN_FILES = ("metrics.jsonl", "step-*/manifest.json", "checkpoints/step-*/manifest.json")


def _check_is_data(root: Path) -> None:
    """Refuses folders that this package has written for another purpose."""
    found = [path for pattern in _OWN_FILES for path in sorted(root.glob(pattern))[:1]]
    if found:
        why = f"holds {found[0].relative_to(root)}: it is a run or its checkpoints, not text."
        problem = Problem(f"data.path={str(root)!r}", why, _USE_TEXT)
        raise DataError(format_problems("The folder holds something else.", [problem]))


def _check_is_text(texts: dict[str, bytes]) -> None:
    """Refuses files with zero bytes: these are no text, and would be read as ends of files."""
    found = {name: text.index(END) for name, text in texts.items() if END in text}
    problems = [
        Problem(name, f"has a zero byte at byte {at:,}, which no text has.")
        for name, at in list(found.items())[:5]
    ]
    if len(found) > 5:
        problems.append(Problem("…", f"and {count(len(found) - 5, 'more file')} like these."))
    fix = "text alone in data.path, or tokens made of it: sk.data.write_tokens"
    headline = f"{count(len(found), 'file')} of the corpus can be no text."
    raise_all(DataError, headline, problems, fix)


def _relative_names(root: Path, skipped: frozenset[str]) -> list[str]:
    """Lists the files below `root`, without hidden ones, caches, and those in skipped folders."""
    names = []
    for folder, folders, files in os.walk(root):
        left_out = {*skipped, "__pycache__"}
        folders[:] = [f for f in folders if f not in left_out and not f.startswith(".")]
        below = Path(folder).relative_to(root)
        names += [(below / f).as_posix() for f in files if not f.startswith(".")]
    return sorted(names)


def _split(source: str, root: Path, names: Iterable[str], share: float) -> Corpus:
    texts = {name: _read(root / name) for name in names}
    _check_is_text(texts)
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for name, text in texts.items():
        sides[is_held_out(name, share)].append(text)
    return _checked(source, sides[0], sides[1], share)


def _checked(source: str, train: list[bytes], held_out: list[bytes], share: float) -> Corpus:
    train = [text for text in train if text]
    held_out = [text for text in held_out if text]
    if not train and not held_out:
        problem = Problem(source, "holds no bytes.", _USE_TEXT)
        raise DataError(format_problems("The corpus is empty.", [problem]))
    if not train or not held_out:
        side, files = ("held-out", train) if train else ("training", held_out)
        why = f"all of its {count(len(files), 'file')} fell on the other side of data.held_out"
        problem = Problem(source, f"{why}={share:g}.", "--set data.held_out=0.2, or add files")
        raise DataError(format_problems(f"The {side} part of the corpus is empty.", [problem]))
    return Corpus(source, _join(train), _join(held_out), len(train), len(held_out))


def _join(texts: list[bytes]) -> bytes:
    return b"".join(text + END for text in texts)


_USE_TEXT = "--set data.path=FOLDER_OF_TEXT, or leave data.path out for the standard library"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        problem = Problem(f"data.path={str(path)!r}", "there is no such file or folder.", _USE_TEXT)
    except OSError as error:
        denied = isinstance(error, PermissionError)
        fix = f"chmod u+r {str(path)!r}" if denied else _USE_TEXT
        problem = Problem(str(path), f"{error.strerror}.", fix)
    raise DataError(format_problems("The text cannot be read.", [problem]))
