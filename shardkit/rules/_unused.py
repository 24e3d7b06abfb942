"""Entries of rules that decide nothing: no leaf matches, or earlier rules decide every match."""

import dataclasses
from collections.abc import Sequence

from .._core.errors import count
from ._resolve import Placement, find_unmatched
from ._rule import Entry, Rule, list_rules


@dataclasses.dataclass(frozen=True)
class DeadEntry:
    """An entry that decides no leaf."""

    entry: Entry  # the glob or the logical axis
    matched: int  # number of leaves that it matches
    # sources of the rules that decided these leaves; () if it matches none
    by: tuple[str, ...] = ()
    nearest: str = ""  # a did-you-mean if it matches none, or ""

    def __str__(self) -> str:
        if not self.matched:
            hint = f".{self.nearest}" if self.nearest else ""
            return f"{self.entry.source} matches nothing{hint}"
        leaves = count(self.matched, "leaf")
        winners = f"{' and '.join(self.by)} {'come' if len(self.by) > 1 else 'comes'}"
        return f"{self.entry.source} decides none of {leaves} it matches: {winners} first"


def find_dead_entries(rule: Rule, rows: Sequence[Placement]) -> list[DeadEntry]:
    """Lists the entries of a rule that decide no leaf, from how `place_leaf` placed every one.

    >>> import numpy as np
    >>> from jax.sharding import PartitionSpec as P
    >>> from shardkit._core.tree import Leaf
    >>> from shardkit.rules import PathRules, place_leaf
    >>> rule = PathRules({"**": P(), "up/kernel": P("data")})
    >>> row = place_leaf(rule, Leaf("up/kernel", (8,), np.dtype("float32")), {"data": 2})
    >>> print(*find_dead_entries(rule, [row]))
    PathRules["up/kernel"] decides none of 1 leaf it matches: PathRules["**"] comes first
    """
    leaves = [row.leaf for row in rows]
    won = {(row.won[0], key) for row in rows if row.won for key in row.won[1]}
    dead = []
    for index, inner in enumerate(list_rules(rule)):
        unmatched = {entry.key for entry in find_unmatched(inner, leaves)}
        for entry in inner.entries():
            if entry.key in unmatched:
                dead.append(DeadEntry(entry, 0, nearest=entry.nearest(leaves)))
            elif (index, entry.key) not in won:
                matching = [row for row in rows if entry.matches(row.leaf)]
                by = tuple(dict.fromkeys(row.source for row in matching if row.source))
                dead.append(DeadEntry(entry, len(matching), by))
    return dead
