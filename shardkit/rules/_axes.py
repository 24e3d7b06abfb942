"""Rules by logical axis: one table from the names a model gives its dims to mesh axes."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from .._core.errors import Problem, ShardingError, count, did_you_mean, raise_all
from .._core.tree import Leaf
from ._rule import Decided, Decision, Entry, Passed, Refused
from ._specs import Axes, axes_of, from_axes


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class AxisRules:
    """Maps logical axes to mesh axes, for leaves whose dims a model has named.

    Every logical axis that a leaf names must be listed, with None for "not split", so that a
    misspelt name is an error and never a silently replicated dim. A leaf without names passes
    to the next rule. An entry that no leaf names is no error: one table serves many models.

    Attributes:
      table: the mesh axes of each logical axis, in order.

    >>> rules = AxisRules({"embed": "fsdp", "mlp": ("tensor", "expert"), "norm": None})
    >>> rules.spec(("embed", "mlp"))
    P('fsdp', ('tensor', 'expert'))
    """

    table: tuple[tuple[str, tuple[str, ...]], ...]

    def __init__(self, table: Mapping[str, Axes]) -> None:
        """Takes `{logical axis: mesh axis, tuple of mesh axes, or None}`.

        Args:
          table: the mapping; a tuple splits a dim over several mesh axes, first one outermost.

        Raises:
          ShardingError: a value is none of these.
        """
        problems = [
            Problem(
                f"AxisRules[{name!r}]",
                f"{axes!r} is not a mesh axis, a tuple of them, or None",
                f'AxisRules({{{name!r}: "tensor"}}), ("data", "fsdp") or None',
            )
            for name, axes in table.items()
            if not _is_axes(axes)
        ]
        raise_all(ShardingError, "AxisRules cannot be read.", problems)
        rows = tuple((name, axes_of(axes)) for name, axes in table.items())
        object.__setattr__(self, "table", rows)

    def mesh_axes(self, name: str | None) -> tuple[str, ...]:
        """Returns the mesh axes of a listed logical axis; none for None."""
        return () if name is None else dict(self.table)[name]

    def spec(self, names: Sequence[str | None]) -> PartitionSpec:
        """Returns the spec of an array whose dims have these logical names.

        Args:
          names: one logical axis or None per dim.

        Returns:
          The spec in normal form; it may name axes that a mesh lacks (see `check_spec`).

        Raises:
          ShardingError: a name is not in the table.
        """
        raise_all(ShardingError, "Logical axes are unknown.", self._unknown(repr(names), names))
        return from_axes(map(self.mesh_axes, names))

    def decide(self, leaf: Leaf, mesh: Mapping[str, int]) -> Decision:
        """Gives a spec from the leaf's logical axes; passes when it has none."""
        names = leaf.axes
        if names is None:
            return Passed("AxisRules: the leaf names no logical axes")
        if len(names) != len(leaf.shape):
            why = f"names {count(len(names), 'logical axis')} {names!r} for {len(leaf.shape)} dims"
            return Refused((Problem(str(leaf), why, "name every dim, None where it has no name"),))
        if unknown := self._unknown(str(leaf), names):
            return Refused(tuple(unknown))
        dims = tuple(self._source(name) for name in names)
        used = tuple(name for name in dict.fromkeys(names) if name is not None)
        split = [name for name in used if self.mesh_axes(name)] or used
        source = f"AxisRules[{', '.join(map(self._row, split))}]"
        return Decided(from_axes(map(self.mesh_axes, names)), source, entries=used, dims=dims)

    def entries(self) -> tuple[Entry, ...]:
        """Lists the logical axes, which a model need not name."""
        return tuple(
            Entry(
                key=name,
                source=self._source(name),
                required=False,
                matches=functools.partial(_names, name),
                nearest=functools.partial(_nearest, name),
            )
            for name, _ in self.table
        )

    def replaced(self, table: Mapping[str, Axes]) -> "AxisRules":
        """Returns a copy in which some logical axes map elsewhere, or are added."""
        return AxisRules({**dict(self.table), **table})

    def renamed(self, names: Mapping[str, str]) -> "AxisRules":
        """Returns a copy in which some logical axes have other names.

        >>> AxisRules({"embed": "fsdp", "norm": None}).renamed({"embed": "hidden"})
        AxisRules({'hidden': 'fsdp', 'norm': None})
        """
        return AxisRules({names.get(name, name): axes for name, axes in self.table})

    def merged(self, other: "AxisRules") -> "AxisRules":
        """Joins two tables: a logical axis gets the mesh axes of both, these first.

        Whether a dim that both split should be split over both is the caller's to decide;
        `conflicts` lists those.

        >>> AxisRules({"mlp": "fsdp"}).merged(AxisRules({"mlp": "tensor", "norm": None}))
        AxisRules({'mlp': ('fsdp', 'tensor'), 'norm': None})
        """
        table = dict(self.table)
        for name, axes in other.table:
            table[name] = tuple(dict.fromkeys((*table.get(name, ()), *axes)))
        return AxisRules(table)

    def conflicts(self, other: "AxisRules") -> tuple[str, ...]:
        """Lists the logical axes that both tables split, over different mesh axes."""
        mine = dict(self.table)
        return tuple(n for n, axes in other.table if axes and mine.get(n) and mine[n] != axes)

    def _unknown(self, subject: str, names: Sequence[str | None]) -> list[Problem]:
        known = [name for name, _ in self.table]
        return [
            Problem(
                subject,
                f"AxisRules does not list logical axis {name!r}." + did_you_mean(name, known),
                f"AxisRules({{..., {name!r}: None}}), or a mesh axis",
            )
            for name in dict.fromkeys(names)
            if name is not None and name not in known
        ]

    def _row(self, name: str) -> str:
        return f"{name!r} → {_shown(self.mesh_axes(name))}"

    def _source(self, name: str | None) -> str:
        return "AxisRules" if name is None else f"AxisRules[{self._row(name)}]"

    def __repr__(self) -> str:
        rows = (f"{name!r}: {_shown(axes)}" for name, axes in self.table)
        return f"AxisRules({{{', '.join(rows)}}})"


def _is_axes(axes: object) -> bool:
    entries = axes if isinstance(axes, tuple) else (axes,)
    return axes is None or all(isinstance(axis, str) and axis for axis in entries)


def _shown(axes: tuple[str, ...]) -> str:
    return repr(axes if len(axes) > 1 else axes[0] if axes else None)


def _names(name: str, leaf: Leaf) -> bool:
    return name in (leaf.axes or ())


def _nearest(name: str, leaves: list[Leaf]) -> str:
    named = {axis for leaf in leaves for axis in leaf.axes or () if axis is not None}
    return did_you_mean(name, sorted(named))
