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
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

from .._core.tree import short_type
from ..rules import matches
from ._manifest import SavedLeaf
from ._rename import rename_path

_Rule = TypeVar("_Rule")
# Rules of one call, and leaves for which a rule is looked for: more are another model.
_MOST_RULES, _MOST_TRIED = 12, 40
_NUMBER = re.compile(r"\d+")


def suggest_restore(
    bad: Collection[str], saved: Mapping[str, SavedLeaf], wanted: Mapping[str, Any]
) -> str:
    """Returns calls of `restore` that keep every leaf that matches.

    The `bad` paths are of those that do not match, in the checkpoint, the state or both.
    """
    calls = []
    rename, moved = _find_renames(bad, saved, wanted)
    if rename:
        unpaired = set(bad) - moved.keys() - set(moved.values())
        calls.append(_format_call(unpaired, saved, wanted, rename=rename))
    if set(bad) < {*saved, *wanted}:
        calls.append(_format_call(bad, saved, wanted))
    return ", or ".join([*calls, "the state it was saved from"])


def _format_call(
    bad: Collection[str],
    saved: Mapping[str, SavedLeaf],
    wanted: Mapping[str, Any],
    rename: Mapping[str, str] | None = None,
) -> str:
    arguments, more = [f"rename={rename}"] if rename else [], ""
    if bad:
        good = {*saved, *wanted} - set(bad)
        taken = {glob for path in good for glob in _globs(path)}

        @functools.lru_cache(maxsize=1024)
        def matches_none(glob: str) -> bool:
            return not any(matches(glob, path) for path in good)

        def globs_of(path: str) -> Iterator[str]:
            for glob in _globs(path):
                numbered = _NUMBER.sub("*", glob)
                if glob not in taken:
                    yield glob
                if numbered != glob and numbered not in taken and matches_none(numbered):
                    yield numbered

        rules, left = _cover(set(bad), globs_of)
        covered = {glob: [path for path in bad if matches(glob, path)] for glob in rules}
        partial = {
            glob: "fresh" if any(path in wanted for path in paths) else "drop"
            for glob, paths in covered.items()
        }
        arguments += [f"partial={ {**partial, '**': 'saved'} }"]
        arguments += ["fresh=step.init(key)"] if "fresh" in partial.values() else []
        more = f" with {len(left)} more leaves in partial" if left else ""
    return f"restore(..., {', '.join(arguments)}){more}"


def _cover(
    paths: set[str], rules_of: Callable[[str], Iterator[_Rule]]
) -> tuple[list[_Rule], set[str]]:
    """Returns few rules that cover paths, and what is left: always the one that covers most."""
    covered: dict[_Rule, set[str]] = {}
    for path in sorted(paths):
        for rule in rules_of(path):
            covered.setdefault(rule, set()).add(path)
    chosen = []
    while paths and len(chosen) < _MOST_RULES:
        best = min(covered, key=lambda rule: (-len(covered[rule] & paths), _complexity(rule)))
        chosen.append(best)
        paths = paths - covered[best]
    return chosen, paths


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


def _find_renames(
    bad: Collection[str], saved: Mapping[str, SavedLeaf], wanted: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns `{glob: new path}`, and `{saved path: path in the state}` of leaves that they rename.

    A rule is made of one leaf and the one of its type whose name is most alike, and taken if all
    that it renames becomes a leaf that the checkpoint lacks, of the same type. If leaves that match
    have both names, nothing was renamed: another part is trained, and has moments.
    """
    split = [path.split("/") for path in {*saved, *wanted} - set(bad)]
    matching = {"/".join(segments[n:]) for segments in split for n in range(len(segments))}
    types = {path: short_type(x.shape, str(x.dtype)) for path, x in wanted.items() if path in bad}
    lacked = [path for path in types if path not in saved]
    unused = {path for path in saved if path in bad and path not in wanted}
    free, tried = set(lacked), set()
    rename: dict[str, str] = {}
    moved: dict[str, str] = {}

    def rename_all(rule: tuple[str, str]) -> dict[str, str]:
        """What a rule renames; nothing if it renames any leaf wrongly."""
        glob, new = rule
        pairs = {path: rename_path(path, {glob: new}) for path in saved if matches(glob, path)}
        right = all(
            old in unused and to in free and saved[old].type == types[to]
            for old, to in pairs.items()
        )
        return pairs if right and len({*pairs.values()}) == len(pairs) else {}

    for _ in range(_MOST_TRIED):
        path = next((path for path in lacked if path in free and path not in tried), None)
        if path is None or len(rename) == _MOST_RULES:
            break
        tried.add(path)
        same_type = [old for old in saved if old in unused and saved[old].type == types[path]]
        moves = {old: _shared_ends(old, path) for old in same_type}
        likeness = {
            old: (ends, _likeness(old, path))
            for old, ends in moves.items()
            if not all("/".join(p.split("/")[ends[1] :]) in matching for p in (old, path))
        }
        old = max(likeness, key=likeness.__getitem__, default="")
        if old and (any(likeness[old][0]) or likeness[old][1] >= 0.5):
            found = {rule: rename_all(rule) for rule in _renames(old, path)}
            best = min(found, key=lambda rule: (-len(found[rule]), _complexity(rule)))
            rename |= dict([best]) if found[best] else {}
            moved |= found[best]
            unused -= found[best].keys()
            free -= set(found[best].values())
    return rename, moved


def _likeness(old: str, new: str) -> float:
    return difflib.SequenceMatcher(None, old.lower(), new.lower()).ratio()


def _shared_ends(old: str, new: str) -> tuple[int, int]:
    """Returns how many last and how many first segments two paths share."""
    a, b = old.split("/"), new.split("/")
    most = min(len(a), len(b)) - 1
    tail = next((i for i in range(most) if a[-1 - i] != b[-1 - i]), most)
    head = next((i for i in range(most - tail) if a[i] != b[i]), most - tail)
    return tail, head


def _renames(old: str, new: str) -> Iterator[tuple[str, str]]:
    """Yields `(glob, new path)` that rename a leaf, and perhaps other ones like it.

    >>> next(_renames("params/layer_3/w", "params/block_3/w"))
    ('**/layer_*/**', '**/block_*/**')
    """
    a, b = old.split("/"), new.split("/")
    tail, head = _shared_ends(old, new)
    before, after = "/".join([*a[:head], ""]), "/".join(["", *a[len(a) - tail :]])
    middles = ["/".join(names[head : len(names) - tail]) for names in (a, b)]
    numbers = [_NUMBER.findall(middle) for middle in middles]
    numbered = [[_NUMBER.sub("*", middle) for middle in middles]]
    for x, y in [*(numbered if numbers[0] == numbers[1] != [] else []), middles]:
        for prefix in dict.fromkeys(["**/", before]):
            for suffix in ["/**", after] if tail else [""]:
                yield f"{prefix}{x}{suffix}", f"{prefix}{y}{suffix}"
