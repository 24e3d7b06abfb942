"""Why each leaf got its spec: which rule won, which passed, and which did nothing."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from .._core.errors import count
from .._core.io._table import Column, Table, fold_text
from .._core.tree import Leaf, format_bytes, path_str, short_type
from .._core.types import WithAxes
from ._resolve import Placement, place_leaf
from ._rule import Rule
from ._specs import HasShape, count_shards, format_mesh, format_spec, mesh_sizes
from ._unused import find_dead_entries

_WIDTH = 100
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
      shadowed: sources of entries that match leaves and decide none, earlier ones being first.
    """

    rows: tuple[Placement, ...]
    mesh: Mapping[str, int]
    unmatched: tuple[str, ...]
    shadowed: tuple[str, ...]

    def bytes_per_device(self, row: Placement) -> int:
        """Bytes of one row on each device; a leaf that cannot be laid out counts nothing."""
        return 0 if row.spec is None else row.leaf.nbytes // count_shards(row.spec, self.mesh)

    @property
    def total_bytes(self) -> int:
        """Bytes of all leaves, whole and without replicas."""
        return sum(row.leaf.nbytes for row in self.rows)

    @property
    def total_bytes_per_device(self) -> int:
        """Bytes of all leaves that can be laid out, on each device."""
        return sum(map(self.bytes_per_device, self.rows))

    def __str__(self) -> str:
        rules = list(dict.fromkeys(_reason(row) for row in self.rows if _reason(row)))
        notes = list(dict.fromkeys(why for row in self.rows for why in row.passed))
        table = Table(_COLUMNS, [self._cells(row, rules, notes) for row in self.rows])
        lines = [self._headline(), table.to_text(_WIDTH)]
        lines += _section("Rules", [f"R{n}  {source}" for n, source in enumerate(rules, 1)])
        lines += _section("Passed", [f"P{n}  {why}" for n, why in enumerate(notes, 1)])
        wrong = [f"{p.subject}: {p.why}" for row in self.rows for p in row.problems]
        lines += _section("Cannot be laid out", wrong)
        lines += _section("Matched nothing", self.unmatched)
        lines += _section("Decided nothing, earlier rules being first", self.shadowed)
        return "\n".join(lines)

    def _headline(self) -> str:
        whole, each = format_bytes(self.total_bytes), format_bytes(self.total_bytes_per_device)
        leaves = count(len(self.rows), "leaf")
        return f"{leaves} on mesh {format_mesh(self.mesh)}: {whole} whole, {each} per device."

    def _cells(self, row: Placement, rules: Sequence[str], notes: Sequence[str]) -> tuple[str, ...]:
        shape = short_type(row.leaf.shape, row.leaf.dtype)
        spec = "error" if row.spec is None else format_spec(row.spec)
        each = "" if row.spec is None else format_bytes(self.bytes_per_device(row))
        rule = f"R{rules.index(_reason(row)) + 1}" if _reason(row) else ""
        passed = " ".join(f"P{notes.index(why) + 1}" for why in row.passed)
        return row.leaf.path or "(root)", shape, spec, each, rule, passed


def _reason(row: Placement) -> str:
    return f"{row.source}: {row.why}" if row.why else row.source


def explain_rules(
    rules: Rule,
    abstract_params: Any,
    mesh: Mapping[str, int] | HasShape,
    axes: Mapping[str, tuple[str | None, ...]] | None = None,
) -> Explanation:
    """Says for each leaf which rule won, which were asked before it and why they passed.

    Nothing is raised for a leaf that cannot be laid out: its row shows what is wrong.

    Args:
      rules: the rule, such as a chain.
      abstract_params: pytree of arrays or `jax.ShapeDtypeStruct`, or of `WithAxes` ones.
      mesh: a mesh, a `MeshSpec` without -1, or `{axis: size}`.
      axes: logical axes by path, for leaves that are not `WithAxes`.

    Returns:
      The explanation; print it.

    >>> import jax
    >>> from jax.sharding import PartitionSpec as P
    >>> from shardkit.rules import REPLICATED, PathRules, chain
    >>> params = {"up": jax.ShapeDtypeStruct((4, 8), "float32")}
    >>> rules = chain(PathRules({"down": P("data")}), REPLICATED)
    >>> print(explain(rules, params, {"data": 2}))
    1 leaf on mesh (data=2): 128 B whole, 128 B per device.
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
    found = find_dead_entries(rules, rows)
    idle = tuple(one.entry.source for one in found if not one.matched)
    return Explanation(rows, sizes, idle, tuple(one.entry.source for one in found if one.matched))


def list_named_leaves(
    tree: Any, axes: Mapping[str, tuple[str | None, ...]] | None = None
) -> list[Leaf]:
    """Lists a pytree's leaves with the logical axes that `WithAxes` boxes or `axes` give them.

    Args:
      tree: pytree of arrays, `jax.ShapeDtypeStruct`, or `WithAxes` ones.
      axes: logical axes by path, for leaves that are not `WithAxes`.
    """
    paired = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, WithAxes))
    found = []
    for key_path, x in paired:
        path = path_str(key_path)
        value, names = (x.value, x.axes) if isinstance(x, WithAxes) else (x, (axes or {}).get(path))
        found.append(Leaf(path, tuple(value.shape), value.dtype, names))
    return found


def _section(title: str, items: Iterable[str]) -> list[str]:
    lines = [line for item in items for line in fold_text(f"  {item}", _WIDTH, "    ")]
    return [f"{title}:", *lines] if lines else []
