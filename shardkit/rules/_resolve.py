"""Gives every leaf its spec, or lists everything that is wrong in all of them."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from jax.sharding import PartitionSpec

from .._core.errors import Problem, ShardingError, count, raise_all
from .._core.tree import Leaf, path_to_glob
from .._core.types import Follows
from ._check import check_spec, share_fixes
from ._path import matches
from ._rule import Decided, Entry, Passed, Refused, Rule, list_rules
from ._specs import HasShape, axes_of, format_mesh, mesh_sizes, normalize_spec, spec_from_axes


@dataclasses.dataclass(frozen=True)
class Unmatched(Problem):
    """An entry of a rule that matches no leaf."""


@dataclasses.dataclass(frozen=True)
class Undecided(Problem):
    """A leaf, at `path`, that no rule decides."""

    path: str = ""


@dataclasses.dataclass(frozen=True)
class Placement:
    """How one leaf got its spec, or why it has none."""

    leaf: Leaf  # the leaf
    spec: PartitionSpec | None  # its spec in normal form; None if there are problems
    source: str = ""  # the rule that decided; "" if none did
    # index of that rule and the keys of its entries; None if none decided
    won: tuple[int, tuple[str, ...]] | None = None
    passed: tuple[str, ...] = ()  # why each rule before it passed, in order
    why: str = ""  # the rule's reason for its spec, or ""
    problems: tuple[Problem, ...] = ()  # what keeps the leaf from being laid out


def place_leaf(rule: Rule, leaf: Leaf, mesh: Mapping[str, int]) -> Placement:
    """Asks a rule for the spec of one leaf and checks it. A scalar is replicated without asking."""
    if not leaf.shape:
        return Placement(leaf, PartitionSpec(), "a scalar is replicated")
    passed: list[Passed] = []
    for index, candidate in enumerate(list_rules(rule)):
        decision = candidate.decide(leaf, mesh)
        reasons = tuple(p.why for p in passed)
        if isinstance(decision, Refused):
            return Placement(leaf, None, passed=reasons, problems=decision.problems)
        if isinstance(decision, Decided):
            return _check_decision(leaf, decision, mesh, index, reasons)
        passed.append(decision)
    return _refuse_undecided(leaf, passed)


def _refuse_undecided(leaf: Leaf, passed: Sequence[Passed]) -> Placement:
    tried = [f"{p.why}, {p.nearest}" if p.nearest else p.why for p in passed]
    why = f"no rule decides it ({'; '.join(tried)})" if tried else "there are no rules"
    reasons = tuple(p.why for p in passed)
    problem = Undecided(str(leaf), why, path=leaf.path)
    return Placement(leaf, None, passed=reasons, problems=(problem,))


def _decide_rest(
    problems: Sequence[Problem], field: str, rule: Rule, leaves: Sequence[Leaf]
) -> list[Problem]:
    """Gives the leaves that no rule decides one fix for all of them."""
    paths = {p.path for p in problems if isinstance(p, Undecided)}
    fix = f"{field}=sk.first_match(strategy.{field}, sk.REPLICATED) replicates what no rule decides"
    fix += "; or add a rule for each"
    if field == "opt_state":  # what follows its parameter would be replicated as well
        others = [leaf.path for leaf in leaves if leaf.path not in paths]
        listed = ", ".join(f'"{glob}": sk.REPLICATED' for glob in _globs_of(paths, others))
        fix = f"strategy | sk.Strategy(opt_state=sk.PathRules({{{listed}}})), or a spec for each"
        if len(list_rules(rule)) > 1:  # two rules for optimizer state are not joined by `|`
            fix = f"opt_state=sk.first_match(strategy.opt_state, sk.PathRules({{{listed}}}))"
    return [dataclasses.replace(p, fix=fix) if isinstance(p, Undecided) else p for p in problems]


def _globs_of(paths: Iterable[str], others: Sequence[str]) -> list[str]:
    """Globs that match some paths and none of the others: a number is any, where that is enough.

    >>> _globs_of(["s/0/left", "s/1/left", "s/0/right"], ["s/1/right"])
    ['s/*/left', 's/0/right']
    """
    globs = []
    for path in paths:
        glob = "/".join("*" if key.isdecimal() else key for key in path.split("/"))
        unique = "*" in path or any(matches(glob, other) for other in others)
        globs.append(path_to_glob(path if unique else glob))
    return list(dict.fromkeys(globs))


def _check_decision(
    leaf: Leaf, decided: Decided, mesh: Mapping[str, int], index: int, passed: tuple[str, ...]
) -> Placement:
    problems = check_spec(leaf, decided.spec, mesh, decided.source, dims=decided.dims)
    return Placement(
        leaf=leaf,
        spec=None if problems else normalize_spec(decided.spec),
        source=decided.source,
        won=(index, decided.entries),
        passed=passed,
        why=decided.why,
        problems=tuple(problems),
    )


def find_unmatched(rule: Rule, leaves: Sequence[Leaf]) -> list[Entry]:
    """Lists the entries of a rule that match no leaf, required or not."""
    return [e for e in rule.entries() if not any(map(e.matches, leaves))]


def resolve_all(
    rule: Rule,
    leaves: Sequence[Leaf],
    mesh: Mapping[str, int] | HasShape,
    *,
    what: str = "parameters",
    field: str = "params",
    follows: Sequence[Follows] = (),
) -> tuple[dict[str, PartitionSpec], list[Problem]]:
    """Gives specs to the leaves that can be laid out, and lists what is wrong with the others.

    Args:
      rule: the rule for every leaf; scalars are replicated without asking it.
      leaves: all leaves that the rule is for; an entry that matches none of them is a problem.
      mesh: the mesh, or `{axis: size}`.
      what: what the leaves are, in the plural, for messages.
      field: the field of the strategy that has the rule.
      follows: leaves that the rule is not asked for, since they are laid out like others.

    Returns:
      Specs in normal form by path, of the leaves without a problem, and the problems.
    """
    sizes, every = mesh_sizes(mesh), {leaf.path: leaf for leaf in leaves}
    leaves = list_ruled(leaves, follows)
    placements = [place_leaf(rule, leaf, sizes) for leaf in leaves]
    problems = [problem for placement in placements for problem in placement.problems]
    problems = _decide_rest(problems, field, rule, leaves)
    if leaves:
        problems += [
            Unmatched(
                entry.source,
                f"matches none of the {len(leaves)} {what}.{entry.nearest(list(leaves))}",
                "correct or remove it, or PathRules(..., allow_unmatched=True)",
            )
            for entry in find_unmatched(rule, leaves)
            if entry.required
        ]
    specs = {p.leaf.path: p.spec for p in placements if p.spec is not None}
    for f in follows:
        if f.of in specs and f.path in every:
            spec = _follow(f, specs[f.of])
            found = check_spec(every[f.path], spec, sizes, f"split like {f.of}")
            last = spec[-1] if len(spec) == len(every[f.path].shape) else None
            fix = f.fix and f.fix(math.prod(sizes.get(axis, 1) for axis in axes_of(last)))
            problems += [Problem(p.subject, p.why, fix) if fix else p for p in found]
            specs[f.path] = spec
    return specs, share_fixes(problems, sizes)


def list_ruled(leaves: Sequence[Leaf], follows: Sequence[Follows]) -> list[Leaf]:
    """The leaves that rules decide: those that do not follow another one."""
    following = {f.path for f in follows}
    return [leaf for leaf in leaves if leaf.path not in following]


def _follow(follower: Follows, spec: PartitionSpec) -> PartitionSpec:
    """The spec of a leaf that is split like dims of another one."""
    split = dict(enumerate(map(axes_of, spec)))
    return spec_from_axes(() if dim is None else split.get(dim, ()) for dim in follower.dims)


def resolve(
    rule: Rule,
    leaves: Sequence[Leaf],
    mesh: Mapping[str, int] | HasShape,
    *,
    what: str = "parameters",
) -> dict[str, PartitionSpec]:
    """Gives every leaf its spec.

    Args:
      rule: the rule for every leaf; scalars are replicated without asking it.
      leaves: all leaves that the rule is for.
      mesh: the mesh, or `{axis: size}`.
      what: what the leaves are, in the plural, for the message.

    Returns:
      The spec of each leaf by path: no trailing None, no tuple of one axis.

    Raises:
      ShardingError: lists everything that is wrong, in every leaf and rule.

    >>> import numpy as np
    >>> from jax.sharding import PartitionSpec as P
    >>> from shardkit.rules import PathRules
    >>> leaf = Leaf("up/kernel", (4, 8), np.dtype("float32"))
    >>> resolve(PathRules({"**/kernel": P(None, "tensor")}), [leaf], {"data": 2, "tensor": 4})
    {'up/kernel': P(None, 'tensor')}
    """
    specs, problems = resolve_all(rule, leaves, mesh, what=what)
    raise_all(ShardingError, format_headline(problems, mesh, what), problems)
    return specs


def format_headline(
    problems: Sequence[Problem], mesh: Mapping[str, int] | HasShape, what: str = "parameters"
) -> str:
    """Counts the failures: `2 parameters cannot be laid out on mesh (data=2), and 1 rule …`."""
    where = f"on mesh {format_mesh(mesh_sizes(mesh))}"
    unmatched = {p.subject for p in problems if isinstance(p, Unmatched)}
    n = len({p.subject for p in problems} - unmatched)
    counted = count(n, what.removesuffix("s")) if what.endswith("s") else what
    parts = [f"{counted} cannot be laid out {where}"] if n else []
    if unmatched:
        match = "match" if len(unmatched) > 1 else "matches"
        parts.append(f"{count(len(unmatched), 'rule')} {match} nothing")
    return f"{', and '.join(parts)}."
