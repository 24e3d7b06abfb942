"""Entries of rules that do nothing: they match no leaf, or earlier rules decide all they match."""

import dataclasses
from collections.abc import Sequence

from .._core.errors import count
from ._resolve import Placement, find_unmatched
from ._rule import Entry, Rule, list_rules


@dataclasses.dataclass(frozen=True)
class DeadEntry:
    """An entry that decides nothing.

    Attributes:
      entry: the glob, or the logical axis.
      matched: how many leaves it matches.
      by: sources of what decided these leaves; none where it matches nothing.
      nearest: a did-you-mean where it matches nothing, or "".
    """

    entry: Entry
    matched: int
    by: tuple[str, ...] = ()
    nearest: str = ""

    def __str__(self) -> str:
        if not self.matched:
            hint = f".{self.nearest}" if self.nearest else ""
            return f"{self.entry.source} matches nothing{hint}"
        leaves = count(self.matched, "leaf")
        return f"{self.entry.source} decides none of {leaves} it matches: {self._first()} first"

    def _first(self) -> str:
        return f"{' and '.join(self.by)} {'come' if len(self.by) > 1 else 'comes'}"


def find_dead_entries(rule: Rule, rows: Sequence[Placement]) -> list[DeadEntry]:
    """Lists the entries of a rule that decide none of the leaves that it was asked for.

    Args:
      rule: the rule, such as a chain.
      rows: how it placed every leaf; see `place_leaf`.

    >>> import numpy as np
    >>> from jax.sharding import PartitionSpec as P
    >>> from shardkit._core.tree import Leaf
    >>> from shardkit.rules import PathRules, place
    >>> rule = PathRules({"**": P(), "up/kernel": P("data")})
    >>> row = place(rule, Leaf("up/kernel", (8,), np.dtype("float32")), {"data": 2})
    >>> print(*dead(rule, [row]))
    PathRules["up/kernel"] decides none of 1 leaf it matches: PathRules["**"] comes first
    """
    leaves = [row.leaf for row in rows]
    won = {(row.won[0], key) for row in rows if row.won for key in row.won[1]}
    found = []
    for position, one in enumerate(list_rules(rule)):
        idle = {entry.key for entry in find_unmatched(one, leaves)}
        for entry in one.entries():
            if entry.key in idle:
                found.append(DeadEntry(entry, 0, nearest=entry.nearest(leaves)))
            elif (position, entry.key) not in won:
                meant = [row for row in rows if entry.matches(row.leaf)]
                by = tuple(dict.fromkeys(row.source for row in meant if row.source))
                found.append(DeadEntry(entry, len(meant), by))
    return found
