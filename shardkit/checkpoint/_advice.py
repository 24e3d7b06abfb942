"""The fix of a restore that does not fit: what matches is kept, and what moved is renamed.

An example: the state has a layer `new` that the checkpoint lacks, in its parameters and in both
moments of its optimizer.

    params/new  opt_state/0/mu/new  opt_state/0/nu/new    do not match
    params/a    opt_state/0/mu/a    …                     match

The glob `**/new` covers the three and nothing that matches, so it is all that is fresh:

    partial={"**/new": "fresh", "**": "saved"}
"""

import difflib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

from .._core.tree import short_type
from ..rules import matches
from ._manifest import SavedLeaf
from ._rename import rename_path

_Rule = TypeVar("_Rule")
# Renamed leaves are looked for pair by pair; more than so many are another model.
_MOST_PAIRED = 1000


def suggest_restore(
    bad: Collection[str], saved: Mapping[str, SavedLeaf], wanted: Mapping[str, Any]
) -> str:
    """Returns calls of `restore` that keep every leaf that matches.

    Args:
      bad: paths of leaves that do not match, in the checkpoint, the state or both.
      saved: leaves of the checkpoint.
      wanted: abstract leaves of the state.
    """
    pairs = _pair_renamed(bad, saved, wanted) if len(bad) <= _MOST_PAIRED else {}
    calls = []

    @functools.lru_cache(maxsize=1024)
    def renames_no_other(glob: str, new: str) -> bool:
        moved = {path: rename_path(path, {glob: new}) for path in saved}
        return all(pairs.get(path, path) == to for path, to in moved.items() if to != path)

    if pairs:
        rename = _cover(set(pairs), lambda path: _renames(path, pairs[path], renames_no_other))
        unpaired = set(bad) - pairs.keys() - set(pairs.values())
        calls.append(_format_call(unpaired, saved, wanted, rename=dict(rename)))
    if set(bad) < {*saved, *wanted}:
        calls.append(_format_call(bad, saved, wanted))
    return ", or ".join([*calls, "the state it was saved from"])


def _format_call(
    bad: Collection[str],
    saved: Mapping[str, SavedLeaf],
    wanted: Mapping[str, Any],
    rename: Mapping[str, str] | None = None,
) -> str:
    arguments = [f"rename={rename}"] if rename else []
    if bad:
        good = {glob for path in {*saved, *wanted} - set(bad) for glob in _globs(path)}
        rules = _cover(set(bad), lambda path: (g for g in _globs(path) if g not in good))
        covered = {glob: [path for path in bad if matches(glob, path)] for glob in rules}
        partial = {
            glob: "fresh" if any(path in wanted for path in paths) else "drop"
            for glob, paths in covered.items()
        }
        arguments += [f"partial={ {**partial, '**': 'saved'} }".replace("{ ", "{")]
        arguments += ["fresh=step.init(key)"] if "fresh" in partial.values() else []
    return f"restore(..., {', '.join(arguments)})"


def _cover(paths: set[str], rules_of: Callable[[str], Iterator[_Rule]]) -> list[_Rule]:
    """Returns few rules that cover all paths: always the one that covers most of what is left."""
    covered: dict[_Rule, set[str]] = {}
    for path in sorted(paths):
        for rule in rules_of(path):
            covered.setdefault(rule, set()).add(path)
    chosen = []
    while paths:
        best = min(covered, key=lambda rule: (-len(covered[rule] & paths), _complexity(rule)))
        chosen.append(best)
        paths = paths - covered[best]
    return chosen


def _complexity(rule: Any) -> tuple[int, int]:
    return str(rule).count("**"), len(str(rule))


def _globs(path: str) -> Iterator[str]:
    """Yields globs that match a path: itself, and with `**` for its beginning, its end or both.

    >>> list(_globs("a/b"))
    ['a/**', '**/a/**', 'a/b', 'a/b/**', '**/a/b', '**/a/b/**', '**/b', '**/b/**']
    """
    segments = path.split("/")
    n = len(segments)
    for start in range(n):
        for stop in range(start + 1, n + 1):
            middle = "/".join(segments[start:stop])
            heads = ["", "**/"] if start == 0 else ["**/"]
            tails = ["", "/**"] if stop == n else ["/**"]
            yield from (f"{head}{middle}{tail}" for head in heads for tail in tails)


def _pair_renamed(
    bad: Collection[str], saved: Mapping[str, SavedLeaf], wanted: Mapping[str, Any]
) -> dict[str, str]:
    """Returns `{saved path: path in the state}` of leaves of one type whose names look alike."""
    unused = [path for path in saved if path in bad and path not in wanted]
    pairs: dict[str, str] = {}
    for path, leaf in wanted.items():
        if path not in bad or path in saved:
            continue
        same_type = [
            old
            for old in unused
            if saved[old].type == short_type(leaf.shape, str(leaf.dtype)) and _is_near(old, path)
        ]
        if same_type:
            old = max(same_type, key=lambda old: (_shared_ends(old, path), _likeness(old, path)))
            unused.remove(old)
            pairs[old] = path
    return pairs


def _is_near(old: str, new: str) -> bool:
    return any(_shared_ends(old, new)) or _likeness(old, new) >= 0.5


def _likeness(old: str, new: str) -> float:
    return difflib.SequenceMatcher(None, old.lower(), new.lower()).ratio()


def _shared_ends(old: str, new: str) -> tuple[int, int]:
    """Returns how many last and how many first segments two paths share."""
    a, b = old.split("/"), new.split("/")
    most = min(len(a), len(b)) - 1
    tail = next((i for i in range(most) if a[-1 - i] != b[-1 - i]), most)
    head = next((i for i in range(most - tail) if a[i] != b[i]), most - tail)
    return tail, head


def _renames(
    old: str, new: str, renames_no_other: Callable[[str, str], bool]
) -> Iterator[tuple[str, str]]:
    """Yields `(glob, new path)` that rename this pair, perhaps other pairs, and nothing else."""
    a, b = old.split("/"), new.split("/")
    tail, head = _shared_ends(old, new)
    before, after = "/".join([*a[:head], ""]), "/".join(["", *a[len(a) - tail :]])
    middles = "/".join(a[head : len(a) - tail]), "/".join(b[head : len(b) - tail])
    for prefix in dict.fromkeys(["**/", before]):
        for suffix in ["/**", after] if tail else [""]:
            rule = f"{prefix}{middles[0]}{suffix}", f"{prefix}{middles[1]}{suffix}"
            if renames_no_other(*rule):
                yield rule
