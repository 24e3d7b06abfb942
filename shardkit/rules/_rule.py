"""What a rule is: a frozen object that gives a leaf its spec, or passes with a reason."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from jax.sharding import PartitionSpec

from .._core.errors import Problem
from .._core.tree import Leaf


@dataclasses.dataclass(frozen=True)
class Decided:
    """A rule's spec for one leaf.

    Attributes:
      spec: the spec as declared; `resolve` checks it against the leaf and the mesh.
      source: what an error or `explain_rules` names: `PathRules["**/up/kernel"]`.
      entries: the keys of the rule's `Entry`s that decided; none where the rule is one whole.
      dims: the source of each dim of the spec, where they differ: `AxisRules['mlp' → 'tensor']`.
      why: a reason worth showing, such as "fewer elements than min_size".
    """

    spec: PartitionSpec
    source: str
    entries: tuple[str, ...] = ()
    dims: tuple[str, ...] = ()
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Passed:
    """A rule leaves a leaf to the next rule.

    Attributes:
      why: the reason, the same for all leaves it holds for.
      nearest: what comes closest to this leaf, for the error when no rule decides it, or "".
    """

    why: str
    nearest: str = ""


@dataclasses.dataclass(frozen=True)
class Refused:
    """A rule is meant for a leaf and cannot serve it: an error, not a pass."""

    problems: tuple[Problem, ...]


Decision = Decided | Passed | Refused


@dataclasses.dataclass(frozen=True)
class Entry:
    """One part of a rule that may turn out to match nothing.

    Attributes:
      key: what a user wrote: a glob, a logical axis.
      source: how errors name it: `PathRules["**/up/kernel"]`.
      required: matching no leaf at all is an error, not merely worth a line in `explain_rules`.
      matches: whether it applies to a leaf, whatever comes before it.
      nearest: given every leaf, the text of a did-you-mean, or "".
    """

    key: str
    source: str
    required: bool
    matches: Callable[[Leaf], bool]
    nearest: Callable[[list[Leaf]], str]


@runtime_checkable
class Rule(Protocol):
    """Maps a leaf (path, shape, dtype, logical axes) to a spec, or passes.

    Rules are frozen data, combined with `first_match`. One more kind of rule is one more frozen
    dataclass with these two methods.
    """

    def decide(self, leaf: Leaf, mesh: Mapping[str, int]) -> Decision:
        """Gives `leaf` a spec on a mesh of `{axis: size}`, passes, or refuses."""
        ...

    def entries(self) -> tuple[Entry, ...]:
        """Lists the parts that should each match some leaf."""
        ...


@dataclasses.dataclass(frozen=True)
class Replicated:
    """Whole on every device: a rule that decides any leaf, and a value in `PathRules`."""

    def decide(self, leaf: Leaf, mesh: Mapping[str, int]) -> Decided:
        """Gives every leaf the empty spec."""
        return Decided(PartitionSpec(), "REPLICATED")

    def entries(self) -> tuple[Entry, ...]:
        """Returns (): a catch-all may match nothing."""
        return ()

    def __repr__(self) -> str:
        return "REPLICATED"


REPLICATED = Replicated()


@dataclasses.dataclass(frozen=True)
class Chain:
    """Rules in order: the first that does not pass decides. Made by `first_match`."""

    rules: tuple[Rule, ...]

    def decide(self, leaf: Leaf, mesh: Mapping[str, int]) -> Decision:
        """Gives the first decision or refusal, else passes with every reason."""
        passed: list[Passed] = []
        for rule in self.rules:
            decision = rule.decide(leaf, mesh)
            if not isinstance(decision, Passed):
                return decision
            passed.append(decision)
        nearest = "; ".join(filter(None, (p.nearest for p in passed)))
        return Passed("; ".join(p.why for p in passed), nearest)

    def entries(self) -> tuple[Entry, ...]:
        """Lists the entries of all its rules."""
        return tuple(entry for rule in self.rules for entry in rule.entries())

    def __repr__(self) -> str:
        return f"first_match({', '.join(map(repr, self.rules))})"


def list_rules(rule: Rule) -> tuple[Rule, ...]:
    """Lists the rules that are asked in order: those of a `Chain`, or the rule itself."""
    return rule.rules if isinstance(rule, Chain) else (rule,)


def first_match(*rules: Rule) -> Rule:
    """Combines rules: for each leaf, the first that does not pass decides.

    Nested calls are flat: `first_match(a, first_match(b, c)) == first_match(a, b, c)`.

    Args:
      *rules: any number of rules, most specific first. End with `REPLICATED` to replicate
        what none of them decides.

    Returns:
      A rule.

    >>> first_match(REPLICATED, first_match(REPLICATED))
    first_match(REPLICATED, REPLICATED)
    """
    return Chain(tuple(inner for rule in rules for inner in list_rules(rule)))
