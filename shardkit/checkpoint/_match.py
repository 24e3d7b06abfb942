"""Compares a checkpoint with the state to restore, and decides the source of each leaf."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .._core.errors import CheckpointError, Problem, count, did_you_mean, raise_all
from .._core.tree import short_type
from ..rules import matches
from ._advice import suggest_restore
from ._fingerprint import is_key
from ._manifest import SavedLeaf
from ._rename import rename_path, rename_problems

SAVED, FRESH, DROP = "saved", "fresh", "drop"
_MOST_COMPARED = 50  # names among which the nearest is looked for; the fix says what is renamed
_EXAMPLE = 'restore(..., partial={"params/**": "saved", "**": "fresh"}, fresh=step.init(key))'


@dataclasses.dataclass(frozen=True)
class RestorePlan:
    """Where each leaf of the state to restore comes from."""

    saved: Mapping[str, str]  # `{path: its path in the checkpoint}` of what is read from there
    fresh: tuple[str, ...]  # paths taken from the state that the caller initialized
    cast: tuple[str, ...]  # paths whose dtype changes, as the caller allowed
    assumed: tuple[str, ...] = ()  # paths with a known value that older checkpoints do not have


def dtype_name(dtype: Any) -> str:
    """Returns `float32`, or `key<fry>` for a typed PRNG key."""
    return str(dtype) if is_key(dtype) else dtype.name


def plan_restore(
    saved: Mapping[str, SavedLeaf],
    wanted: Mapping[str, Any],
    partial: Mapping[str, str] | None,
    cast: Sequence[str],
    where: str,
    assumed: Collection[str] = (),
    rename: Mapping[str, str] | None = None,
) -> RestorePlan:
    """Decides for every leaf of checkpoint and state, or lists everything that does not fit.

    In `partial`, `{glob: "saved", "fresh" or "drop"}`, the first match wins; None for all saved.
    Globs in `cast` may change their dtype; paths in `assumed` may be missing in the checkpoint,
    which errors name as `where`; `rename` is `{glob: new path}` of leaves that it has under other
    names. Raises CheckpointError with every leaf that is missing, extra, reshaped or of another
    dtype, and every glob that matches nothing.
    """
    problems = rename_problems(rename or {}, saved)
    raise_all(CheckpointError, f"Leaves of {where} cannot be renamed.", problems)
    stored = {rename_path(path, rename or {}): path for path in saved}
    saved = {path: saved[old] for path, old in stored.items()}
    rules = {"**": SAVED} if partial is None else partial
    problems = _rule_problems(rules, cast, {**saved, **wanted}) if partial or cast else []
    source = {path: _find_source(path, rules) for path in {**wanted, **saved}}
    absent = tuple(p for p in assumed if p not in saved and source[p] == SAVED)
    for path, leaf in wanted.items():
        if path in absent:
            continue
        problems += _leaf_problems(path, leaf, source[path], saved=saved, wanted=wanted, cast=cast)
    for path in saved:
        if path not in wanted and source[path] in (SAVED, None):
            why = f"is saved as {saved[path].type}; the state has no such leaf."
            why += _nearest(path, wanted, saved)
            problems.append(Problem(path, why))
    headline = f"{count(len(problems), 'leaf')} of {where} cannot be restored."
    bad = {p.subject for p in problems if not p.fix and p.subject in source}
    fix = suggest_restore(bad, saved, wanted) if bad else ""
    raise_all(CheckpointError, headline, problems, fix or _EXAMPLE)
    read = {p: stored[p] for p in wanted if source[p] == SAVED and p in saved}
    return RestorePlan(
        saved=read,
        fresh=tuple(path for path in wanted if source[path] == FRESH),
        cast=tuple(p for p in read if saved[p].dtype != dtype_name(wanted[p].dtype)),
        assumed=absent,
    )


def _find_source(path: str, rules: Mapping[str, str]) -> str | None:
    return next((source for glob, source in rules.items() if matches(glob, path)), None)


def _rule_problems(
    rules: Mapping[str, str], cast: Sequence[str], known: Mapping[str, Any]
) -> list[Problem]:
    words = (SAVED, FRESH, DROP)
    problems = [
        Problem(
            f"partial[{glob!r}]", f"{source!r} is not in {words}." + did_you_mean(source, words)
        )
        for glob, source in rules.items()
        if source not in words
    ]
    named = [(f"partial[{glob!r}]", glob) for glob in rules] + [(f"cast {g!r}", g) for g in cast]
    return problems + [
        Problem(name, "matches no leaf." + did_you_mean(glob, known))
        for name, glob in named
        if glob != "**" and not any(matches(glob, path) for path in known)
    ]


def _leaf_problems(
    path: str,
    leaf: Any,
    source: str | None,
    *,
    saved: Mapping[str, SavedLeaf],
    wanted: Mapping[str, Any],
    cast: Sequence[str],
) -> list[Problem]:
    want = short_type(leaf.shape, dtype_name(leaf.dtype))
    if source is None:
        return [Problem(path, "is matched by no glob of partial; every leaf needs one")]
    if source == DROP:
        return [Problem(path, f"is dropped by partial, but the state has it as {want}")]
    if source == FRESH:
        return []
    if path not in saved:
        near = _nearest(path, saved, wanted)
        return [Problem(path, f"is {want} in the state, and not in the checkpoint.{near}")]
    have = saved[path]
    if have.shape != tuple(leaf.shape):
        return [Problem(path, f"is saved as {have.type}, and {want} in the state")]
    if have.dtype == dtype_name(leaf.dtype):
        return []
    why = f"is saved as {have.type}, and {want} in the state"
    if is_key(leaf.dtype) or have.key:
        return [Problem(path, why)]
    if any(matches(glob, path) for glob in cast):
        return []
    return [Problem(path, f"{why}: cast does not name it", f'restore(..., cast=["{path}"])')]


def _nearest(path: str, options: Collection[str], others: Collection[str]) -> str:
    """The most similar of `options` that are not in `others`, unless these are many."""
    only = [option for option in options if option not in others]
    return did_you_mean(path, only) if len(only) <= _MOST_COMPARED else ""
