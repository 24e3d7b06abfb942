"""A saved state beside the one that is wanted: what comes from where, or every difference."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .._core.errors import CheckpointError, Problem, count, did_you_mean, raise_all
from .._core.tree import join_path, short_type
from ..rules import matches
from ._fingerprint import is_key
from ._manifest import SavedLeaf

SAVED, FRESH, DROP = "saved", "fresh", "drop"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each leaf of a wanted state comes from.

    Attributes:
      saved: paths read from the checkpoint.
      fresh: paths taken from the state that the caller made.
      cast: paths whose dtype changes on the way, all of them declared.
      assumed: paths that the checkpoint is too old to hold, whose value is known.
    """

    saved: tuple[str, ...]
    fresh: tuple[str, ...]
    cast: tuple[str, ...]
    assumed: tuple[str, ...] = ()


def dtype_name(dtype: Any) -> str:
    """Returns `float32`, or `key<fry>` for a typed PRNG key."""
    return str(dtype) if is_key(dtype) else dtype.name


def plan(
    saved: Mapping[str, SavedLeaf],
    wanted: Mapping[str, Any],
    partial: Mapping[str, str] | None,
    cast: Sequence[str],
    where: str,
    assumed: Collection[str] = (),
) -> Plan:
    """Decides for every leaf of both sides, or says everything that does not fit.

    Args:
      saved: leaves of the checkpoint.
      wanted: abstract leaves of the state.
      partial: `{glob: "saved", "fresh" or "drop"}`, first match wins; None: all are saved.
      cast: globs of leaves that may change their dtype.
      where: names the checkpoint in an error.
      assumed: paths that need not be in the checkpoint.

    Raises:
      CheckpointError: with every leaf that is missing, extra, reshaped or of another dtype, and
        every glob that matches nothing.
    """
    rules = {"**": SAVED} if partial is None else partial
    problems = _rule_problems(rules, cast, {**saved, **wanted}) if partial or cast else []
    source = {path: _source(path, rules) for path in {**wanted, **saved}}
    left_out = tuple(p for p in assumed if p not in saved and source[p] == SAVED)
    for path, leaf in wanted.items():
        if path in left_out:
            continue
        problems += _wanted_problems(path, leaf, source[path], saved, wanted, cast)
    for path in saved:
        if path not in wanted and source[path] in (SAVED, None):
            why = f"is saved as {saved[path].type}; the state has no such leaf."
            why += did_you_mean(path, [p for p in wanted if p not in saved])
            problems.append(Problem(path, why))
    headline = f"{count(len(problems), 'leaf')} of {where} cannot be restored as asked."
    raise_all(CheckpointError, headline, problems, _fix(problems, saved, wanted))
    read = tuple(path for path in wanted if source[path] == SAVED and path in saved)
    other = tuple(p for p in read if saved[p].dtype != dtype_name(wanted[p].dtype))
    return Plan(read, tuple(path for path in wanted if source[path] == FRESH), other, left_out)


def _source(path: str, rules: Mapping[str, str]) -> str | None:
    return next((what for glob, what in rules.items() if matches(glob, path)), None)


def _rule_problems(
    rules: Mapping[str, str], cast: Sequence[str], known: Mapping[str, Any]
) -> list[Problem]:
    words = (SAVED, FRESH, DROP)
    problems = [
        Problem(f"partial[{glob!r}]", f"{what!r} is none of {words}." + did_you_mean(what, words))
        for glob, what in rules.items()
        if what not in words
    ]
    named = [(f"partial[{glob!r}]", glob) for glob in rules] + [(f"cast {g!r}", g) for g in cast]
    return problems + [
        Problem(name, "matches no leaf." + did_you_mean(glob, known))
        for name, glob in named
        if glob != "**" and not any(matches(glob, path) for path in known)
    ]


def _wanted_problems(
    path: str,
    leaf: Any,
    source: str | None,
    saved: Mapping[str, SavedLeaf],
    wanted: Mapping[str, Any],
    cast: Sequence[str],
) -> list[Problem]:
    want = short_type(leaf.shape, dtype_name(leaf.dtype))
    if source is None:
        return [Problem(path, "no glob of partial matches; every leaf must be decided")]
    if source == DROP:
        return [Problem(path, f"partial drops it, and the state has it as {want}")]
    if source == FRESH:
        return []
    if path not in saved:
        near = did_you_mean(path, [p for p in saved if p not in wanted])
        return [Problem(path, f"is wanted as {want} and not in the checkpoint.{near}")]
    have = saved[path]
    if have.shape != tuple(leaf.shape):
        return [Problem(path, f"is saved as {have.type} and wanted as {want}")]
    if have.dtype == dtype_name(leaf.dtype):
        return []
    why = f"is saved as {have.type} and wanted as {want}: dtypes change only where cast says so"
    if is_key(leaf.dtype) or have.key:
        return [Problem(path, f"is saved as {have.type} and wanted as {want}")]
    allowed = any(matches(glob, path) for glob in cast)
    return [] if allowed else [Problem(path, why, f'restore(..., cast=["{path}"])')]


def _fix(
    problems: Sequence[Problem], saved: Mapping[str, SavedLeaf], wanted: Mapping[str, Any]
) -> str:
    """A partial rule, tree by tree, that would restore what does fit."""
    if all(problem.fix for problem in problems):
        return ""
    trees = dict.fromkeys(path.split("/")[0] for path in {**wanted, **saved})
    bad = {problem.subject.split("/")[0] for problem in problems}
    if not bad & set(trees):
        return 'partial={"params/**": "saved", "**": "fresh"}, fresh=step.init(key)'
    rules = {join_path(tree, "**"): _verdict(tree, tree in bad, wanted) for tree in trees}
    return f"restore(..., partial={rules}, fresh=step.init(key)), or the state it was saved from"


def _verdict(tree: str, bad: bool, wanted: Mapping[str, Any]) -> str:
    if not bad:
        return SAVED
    return FRESH if any(path.split("/")[0] == tree for path in wanted) else DROP
