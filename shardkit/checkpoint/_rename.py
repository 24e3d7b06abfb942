"""`rename=`: leaves of a checkpoint under other names than they were saved with."""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping

from .._core.errors import Problem, did_you_mean
from ..rules import matches

_WILD = re.compile(r"\*\*|\*")


def rename_path(path: str, rename: Mapping[str, str]) -> str:
    """Returns the new path of a saved leaf; that of the first glob that matches it.

    Each `*` and `**` of the new path stands for what its counterpart in the glob matched.

    >>> rename_path("params/old/up/kernel", {"**/old/**": "**/new/**"})
    'params/new/up/kernel'
    >>> rename_path("layer_3/w", {"layer_*/w": "block_*/kernel"}), rename_path("b", {"a": "c"})
    ('block_3/kernel', 'b')
    """
    for glob, new in rename.items():
        if matched := _compile_captures(glob).fullmatch(f"{path}/"):
            return _fill(new, iter(matched.groups())).removesuffix("/")
    return path


def _fill(new: str, captured: Iterator[str]) -> str:
    return _WILD.sub(lambda _: next(captured), "".join(_split(new)))


@functools.lru_cache(maxsize=1024)
def _compile_captures(glob: str) -> re.Pattern[str]:
    """Compiles a glob to a pattern over a path that ends in `/`, with a group per wildcard."""
    return re.compile("".join(map(_capture, _split(glob))))


def _capture(segment: str) -> str:
    if segment == "**":
        return "((?:[^/]*/)*)"
    return "([^/]*)".join(map(re.escape, segment.split("*")))


def _split(glob: str) -> list[str]:
    """Returns segments with the slash behind them, but `**` alone: it matches its own slashes."""
    return [s if s == "**" else f"{s}/" for s in glob.split("/")]


def rename_problems(rename: Mapping[str, str], saved: Iterable[str]) -> list[Problem]:
    """Lists globs that match no leaf, lose a wildcard, or give two leaves one name."""
    paths = list(saved)
    problems = []
    for glob, new in rename.items():
        subject = f"rename[{glob!r}]"
        if _WILD.findall(glob) != _WILD.findall(new):
            why = f"has other wildcards than {new!r}"
            problems.append(Problem(subject, why, 'rename={"old/**": "new/**"}'))
        elif not any(matches(glob, path) for path in paths):
            why = f"matches no leaf of the checkpoint.{did_you_mean(glob, paths)}"
            problems.append(Problem(subject, why))
    if problems:
        return problems
    new_names: dict[str, str] = {}
    for path in paths:
        other = new_names.setdefault(rename_path(path, rename), path)
        if other != path:
            why = f"is renamed to {rename_path(path, rename)}, and so is {other}"
            problems.append(Problem(path, why))
    return problems
