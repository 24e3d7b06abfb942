"""`sk.explain_rules`: which rule gave each leaf its spec, which passed, and which did nothing."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .._core.errors import count
from .._core.io._table import Column, Table, fold_text, text_width
from .._core.tree import Leaf, format_bytes, leaves_by_path, short_type
from .._core.types import WithAxes
from ._resolve import Placement, find_unmatched, place_leaf
from ._rule import Entry, Rule, list_rules
from ._specs import HasShape, count_shards, format_mesh, format_spec, mesh_sizes


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


_COLUMNS = (
    "parameter",
    Column("type", most=22),
    Column("spec", most=32),
    Column("per device", right=True),
    "rule",
    "passed",
)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How rules lay out a tree, leaf by leaf. `str()` is a table of at most 100 columns.

    Attributes:
      rows: one per leaf, in JAX's order: spec, source, who passed and why, problems.
      mesh: size of each mesh axis.
      unmatched: sources of entries that match no leaf.
      shadowed: sources of entries that match leaves and decide none: earlier entries do.
    """

    rows: tuple[Placement, ...]
    mesh: Mapping[str, int]
    unmatched: tuple[str, ...]
    shadowed: tuple[str, ...]

    def bytes_per_device(self, row: Placement) -> int:
        """Bytes of a leaf on each device; 0 if it cannot be laid out."""
        return 0 if row.spec is None else row.leaf.nbytes // count_shards(row.spec, self.mesh)

    @property
    def total_bytes(self) -> int:
        """Bytes of all leaves, each counted once."""
        return sum(row.leaf.nbytes for row in self.rows)

    @property
    def total_bytes_per_device(self) -> int:
        """Bytes of all leaves on each device, without those that cannot be laid out."""
        return sum(map(self.bytes_per_device, self.rows))

    def __str__(self) -> str:
        rules = list(dict.fromkeys(_format_reason(row) for row in self.rows if _format_reason(row)))
        notes = list(dict.fromkeys(why for row in self.rows for why in row.passed))
        table = Table(_COLUMNS, [self._format_row(row, rules, notes) for row in self.rows])
        lines = [self._format_headline(), table.to_text(text_width())]
        lines += _format_section("Rules", [f"R{n}  {source}" for n, source in enumerate(rules, 1)])
        lines += _format_section("Passed", [f"P{n}  {why}" for n, why in enumerate(notes, 1)])
        problems = [f"{p.subject}: {p.why}" for row in self.rows for p in row.problems]
        lines += _format_section("Cannot be laid out", problems)
        lines += _format_section("Matched nothing", self.unmatched)
        lines += _format_section("Decided nothing, since earlier rules did", self.shadowed)
        return "\n".join(lines)

    def _format_headline(self) -> str:
        total, each = format_bytes(self.total_bytes), format_bytes(self.total_bytes_per_device)
        leaves = count(len(self.rows), "leaf")
        return f"{leaves} on mesh {format_mesh(self.mesh)}: {total} in all, {each} per device."

    def _format_row(
        self, row: Placement, rules: Sequence[str], notes: Sequence[str]
    ) -> tuple[str, ...]:
        shape = short_type(row.leaf.shape, row.leaf.dtype)
        spec = "error" if row.spec is None else format_spec(row.spec)
        each = "" if row.spec is None else format_bytes(self.bytes_per_device(row))
        rule = f"R{rules.index(_format_reason(row)) + 1}" if _format_reason(row) else ""
        passed = " ".join(f"P{notes.index(why) + 1}" for why in row.passed)
        return row.leaf.path or "(root)", shape, spec, each, rule, passed


def _format_reason(row: Placement) -> str:
    return f"{row.source}: {row.why}" if row.why else row.source


def explain_rules(
    rules: Rule,
    abstract_params: Any,
    mesh: Mapping[str, int] | HasShape,
    axes: Mapping[str, tuple[str | None, ...]] | None = None,
) -> Explanation:
    """Shows for each leaf which rule decided, and why the rules before it passed.

    A leaf that cannot be laid out is not an error here: its row shows the problem.

    Args:
      rules: the rule, such as one made by `sk.first_match`.
      abstract_params: pytree of arrays or `jax.ShapeDtypeStruct`, or of `WithAxes` ones.
      mesh: a mesh, a `MeshSpec` without -1, or `{axis: size}`.
      axes: logical axes by path, for leaves that are not `WithAxes`.

    Returns:
      The explanation; print it.

    >>> import jax
    >>> from jax.sharding import PartitionSpec as P
    >>> from shardkit.rules import REPLICATED, PathRules, first_match
    >>> params = {"up": jax.ShapeDtypeStruct((4, 8), "float32")}
    >>> rules = first_match(PathRules({"down": P("data")}), REPLICATED)
    >>> print(explain_rules(rules, params, {"data": 2}))
    1 leaf on mesh (data=2): 128 B in all, 128 B per device.
    parameter  type      spec  per device  rule  passed
    up         f32[4,8]  P()        128 B  R1    P1
    Rules:
      R1  REPLICATED
    Passed:
      P1  PathRules: no glob of 1 matches
    Matched nothing:
      PathRules["down"]
    """
    sizes, leaves = mesh_sizes(mesh), list_named_leaves(abstract_params, axes)
    rows = tuple(place_leaf(rules, leaf, sizes) for leaf in leaves)
    dead = find_dead_entries(rules, rows)
    unmatched = tuple(d.entry.source for d in dead if not d.matched)
    shadowed = tuple(d.entry.source for d in dead if d.matched)
    return Explanation(rows, sizes, unmatched, shadowed)


def list_named_leaves(
    tree: Any, axes: Mapping[str, tuple[str | None, ...]] | None = None
) -> list[Leaf]:
    """Lists a pytree's leaves with the logical axes that `WithAxes` boxes or `axes` give them.

    Leaves are arrays or `jax.ShapeDtypeStruct`; `axes` are by path. Raises TreeError if two leaves
    have the same path.
    """
    leaves = []
    for path, x in leaves_by_path(tree, is_leaf=lambda x: isinstance(x, WithAxes)).items():
        value, names = (x.value, x.axes) if isinstance(x, WithAxes) else (x, (axes or {}).get(path))
        leaves.append(Leaf(path, tuple(value.shape), value.dtype, names))
    return leaves


def _format_section(title: str, items: Iterable[str]) -> list[str]:
    lines = [line for item in items for line in fold_text(f"  {item}", text_width(), "    ")]
    return [f"{title}:", *lines] if lines else []
