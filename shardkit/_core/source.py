"""Which line of a user's code an operation comes from, for jaxprs and for compiled programs.

Of the calls that made an operation, JAX records each frame; here the innermost first:

    optax/losses/_classification.py   softmax_cross_entropy   installed, of a numerical library
    model.py:42                       token_loss              ← the source
    train.py:80                       loss_fn
    shardkit/step/_objective.py       run                     from here on, the compilation

The source is the innermost frame of the user's own files; without one, of the reference decoder, or
of another installed package. Frames outside of the loss only say where the step was compiled.
"""

import dataclasses
import functools
import linecache
import os
import pathlib
import sys
import sysconfig
import time
from collections.abc import Iterable

_HERE = f"{pathlib.Path(__file__).parents[1]}{os.sep}"
_COMPILATION = f"{_HERE}step{os.sep}"
# Parts of this package that use it as a user does.
_EXAMPLES = (f"{_HERE}lm{os.sep}", f"{_HERE}configs{os.sep}")
_STANDARD = f"{sysconfig.get_path('stdlib')}{os.sep}"
_INSTALLED = ("site-packages", "dist-packages")
# Their lines say less than the line that calls them.
_LIBRARIES = frozenset("jax jaxlib flax optax equinox haiku chex distrax einops shardkit".split())
_INTERACTIVE = ("<stdin>", "<ipython-input")
_STARTED = time.time()


@dataclasses.dataclass(frozen=True)
class Frame:
    """One call of a stack: a line and the function that it is in."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        """Returns `model.py:42 in attend`."""
        return f"{os.path.basename(self.file)}:{self.line} in {self.function}"


@dataclasses.dataclass(frozen=True)
class Source(Frame):
    """The line of a user's code that an operation comes from.

    Attributes:
      file: full path of the file.
      line: number of the line, from 1.
      function: name of the function, qualified by its class.
      stack: every call from the operation out to the loss, `/path/model.py:42 in attend`, the
        innermost first.
      code: text of the line; "" where the file is gone, or has changed since it was imported.
    """

    stack: tuple[str, ...] = ()
    code: str = ""

    __str__ = Frame.__str__


def choose_source(frames: Iterable[Frame]) -> Source | None:
    """Returns the source among the frames of a stack, the innermost first; None if it has none."""
    inside: list[Frame] = []
    for frame in frames:
        if frame.file.startswith(_COMPILATION):
            break
        inside.append(frame)
    ranked = [(rank, frame) for frame in inside if (rank := _rank_file(frame.file)) is not None]
    if not ranked:
        return None
    _, best = min(ranked, key=lambda pair: pair[0])
    stack = tuple(f"{frame.file}:{frame.line} in {frame.function}" for frame in inside)
    return Source(best.file, best.line, best.function, stack, read_line(best.file, best.line))


def find_user_line(places: Iterable[tuple[str, int]]) -> str:
    """The first of some places in code, the innermost first, that is a user's; "" if none is.

    >>> find_user_line([(__file__, 3), ("/home/ada/model.py", 12), ("/home/ada/train.py", 7)])
    '/home/ada/model.py:12'
    """
    users = (f"{file}:{line}" for file, line in places if is_user_file(file))
    return next(users, "")


def is_user_file(file: str) -> bool:
    """Whether a file is the user's own, or of the reference decoder."""
    return _rank_file(file) in (0, 1)


def package_of(file: str) -> str:
    """The installed package that a file belongs to; "" if it belongs to none.

    >>> package_of("/usr/lib/python3/site-packages/optax/contrib/_muon.py")
    'optax'
    """
    parts = pathlib.PurePath(file).parts
    for name in _INSTALLED:
        if name in parts:
            return parts[parts.index(name) + 1]
    return ""


@functools.lru_cache(4096)
def _rank_file(file: str) -> int | None:
    """How well a file's lines explain an operation, 0 best; None: not at all."""
    if file.startswith("<"):
        return 0 if file.startswith(_INTERACTIVE) else None
    if file.startswith(_EXAMPLES):
        return 1
    if file.startswith(_HERE):
        return None
    if package := package_of(file):
        return None if package in _LIBRARIES else 2
    return None if file.startswith(_STANDARD) else 0


def read_line(file: str, line: int) -> str:
    """Text of a line; "" where the file is gone, or has changed since it was imported."""
    return "" if _has_changed(file) else linecache.getline(file, line).strip()


def _has_changed(file: str) -> bool:
    """Whether a file is another than the one that runs, as far as that is recorded.

    The bytecode file of a module has the time at which its source was last changed, in whole
    seconds, after 8 bytes. Without one, as for a script, a file is as it was if it is older than
    this process.
    """
    try:
        changed = os.path.getmtime(file)
    except OSError:
        return False  # an interactive cell, whose text only `linecache` has, or a file that is gone
    try:
        with open(_bytecode_of(file, len(sys.modules)), "rb") as bytecode:
            return int.from_bytes(bytecode.read(12)[8:], "little") != int(changed) & 0xFFFFFFFF
    except OSError:
        return changed > _STARTED


@functools.lru_cache(256)
def _bytecode_of(file: str, modules: int) -> str:
    """The bytecode file of the module of a file; "" without one. `modules`: how many there are."""
    del modules  # so that a module that is imported later is found
    loaded = (m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == file)
    return getattr(next(loaded, None), "__cached__", None) or ""
