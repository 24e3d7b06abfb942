"""Rules by logical axis: one table from the names a model gives its dims to mesh axes."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from .._core.errors import Problem, ShardingError, count, did_you_mean, raise_all
from .._core.options import check_arguments
from .._core.tree import Leaf
from ._rule import Decided, Decision, Entry, Passed, Refused
from ._specs import Axes, axes_of, spec_from_axes


@dataclasses.dataclass(frozen=True)
class UnlistedAxis(Problem):
    """A logical axis of a leaf that a table does not list."""

    logical: str = ""


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class AxisRules:
    """Maps logical axes to mesh axes, for leaves whose dims a model has named.

    Every logical axis that a leaf names must be listed, with None for "not split", so that a
    misspelt name is an error and not a silently replicated dim. A leaf without names passes
    to the next rule. An entry that no leaf names is not an error: one table serves many models.

    Attributes:
      table: the mesh axes of each logical axis, in order.

    >>> rules = AxisRules({"embed": "fsdp", "mlp": ("tensor", "expert"), "norm": None})
    >>> rules.spec(("embed", "mlp"))
    P('fsdp', ('tensor', 'expert'))
    """

    table: tuple[tuple[str, tuple[str, ...]], ...]

    def __init__(self, table: Mapping[str, Axes]) -> None:
        """Makes the rules of a table.

        Args:
          table: `{logical axis: mesh axis, tuple of mesh axes, or None}`; a tuple splits a dim over
            several mesh axes, the first one outermost.

        Raises:
          ShardingError: a value is none of these.
        """
        headline = "AxisRules has values that are not mesh axes."
        check_arguments(ShardingError, headline, "AxisRules.", table=(table, Mapping[str, Any]))
        problems = [
            Problem(
                f"AxisRules[{name!r}]",
                f"{axes!r} is not a mesh axis, a tuple of them, or None",
                f'AxisRules({{{name!r}: "tensor"}}), ("data", "fsdp") or None',
            )
            for name, axes in table.items()
            if not _is_axes(axes)
        ]
        raise_all(ShardingError, headline, problems)
        rows = tuple((name, axes_of(axes)) for name, axes in table.items())
        object.__setattr__(self, "table", rows)

    def mesh_axes(self, name: str | None) -> tuple[str, ...]:
        """Returns the mesh axes of a listed logical axis; () for None."""
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
        raise_all(ShardingError, "Unknown logical axes.", self._find_unknown(repr(names), names))
        return spec_from_axes(map(self.mesh_axes, names))

    def decide(self, leaf: Leaf, mesh: Mapping[str, int]) -> Decision:
        """Gives a spec from the leaf's logical axes; passes when it has none."""
        names = leaf.axes
        if names is None:
            return Passed("AxisRules: the leaf names no logical axes")
        if len(names) > len(leaf.shape):
            why = f"names {count(len(names), 'logical axis')} {names!r} for {len(leaf.shape)} dims"
            return Refused((Problem(str(leaf), why, "at most one name or None per dim"),))
        names = (*names, *[None] * (len(leaf.shape) - len(names)))
        if unknown := self._find_unknown(str(leaf), names):
            return Refused(tuple(unknown))
        dims = tuple(self._format_source(name) for name in names)
        used = tuple(name for name in dict.fromkeys(names) if name is not None)
        shown = [name for name in used if self.mesh_axes(name)] or used
        source = f"AxisRules[{', '.join(map(self._format_row, shown))}]"
        return Decided(spec_from_axes(map(self.mesh_axes, names)), source, entries=used, dims=dims)

    def entries(self) -> tuple[Entry, ...]:
        """Lists the logical axes, which a model need not name."""
        return tuple(
            Entry(
                key=name,
                source=self._format_source(name),
                required=False,
                matches=functools.partial(_has_axis, name),
                nearest=functools.partial(_suggest_axis, name),
            )
            for name, _ in self.table
        )

    def replaced(self, table: Mapping[str, Axes]) -> "AxisRules":
        """Returns a copy in which some logical axes map elsewhere, or are added."""
        return AxisRules({**dict(self.table), **table})

    def renamed(self, names: Mapping[str, str]) -> "AxisRules":
        """Returns a copy for a model that has other names for some logical axes.

        Args:
          names: logical axis of this table → the model's name for it. Names may be swapped.

        Returns:
          The rules, in the same order.

        Raises:
          ShardingError: this table does not list a logical axis, or two would get the same name.

        >>> AxisRules({"embed": "fsdp", "mlp": "tensor"}).renamed({"embed": "hidden"})
        AxisRules({'hidden': 'fsdp', 'mlp': 'tensor'})
        """
        listed = [name for name, _ in self.table]
        problems = [
            Problem(
                f"renamed({{{old!r}: {new!r}}})",
                f"AxisRules does not list logical axis {old!r}." + did_you_mean(old, listed),
                f"one of {', '.join(map(repr, listed))}",
            )
            for old, new in names.items()
            if old not in listed
        ]
        renamed = [names.get(name, name) for name in listed]
        for new in dict.fromkeys(name for name in renamed if renamed.count(name) > 1):
            sources = [old for old, name in zip(listed, renamed, strict=True) if name == new]
            why = f"{' and '.join(map(repr, sources))} would both be {new!r}"
            problems.append(Problem(f"renamed(… → {new!r})", why, "one new name per logical axis"))
        raise_all(ShardingError, "Logical axes cannot be renamed.", problems)
        rows = zip(renamed, self.table, strict=True)
        return AxisRules({name: axes for name, (_, axes) in rows})

    def merged(self, other: "AxisRules") -> "AxisRules":
        """Joins two tables: a logical axis gets the mesh axes of both, those of `self` first.

        >>> AxisRules({"mlp": "fsdp"}).merged(AxisRules({"mlp": "tensor", "norm": None}))
        AxisRules({'mlp': ('fsdp', 'tensor'), 'norm': None})
        """
        table = dict(self.table)
        for name, axes in other.table:
            table[name] = tuple(dict.fromkeys((*table.get(name, ()), *axes)))
        return AxisRules(table)

    def _find_unknown(self, subject: str, names: Sequence[str | None]) -> list["UnlistedAxis"]:
        known = [name for name, _ in self.table]
        return [
            UnlistedAxis(
                subject,
                f"AxisRules does not list logical axis {name!r}." + did_you_mean(name, known),
                f"AxisRules({{..., {name!r}: None}}), or a mesh axis",
                logical=name,
            )
            for name in dict.fromkeys(names)
            if name is not None and name not in known
        ]

    def _format_row(self, name: str) -> str:
        return f"{name!r} → {_format_axes(self.mesh_axes(name))}"

    def _format_source(self, name: str | None) -> str:
        return "AxisRules" if name is None else f"AxisRules[{self._format_row(name)}]"

    def __repr__(self) -> str:
        rows = (f"{name!r}: {_format_axes(axes)}" for name, axes in self.table)
        return f"AxisRules({{{', '.join(rows)}}})"


def _is_axes(axes: object) -> bool:
    entries = axes if isinstance(axes, tuple) else (axes,)
    return axes is None or all(isinstance(axis, str) and axis for axis in entries)


def _format_axes(axes: tuple[str, ...]) -> str:
    return repr(axes if len(axes) > 1 else axes[0] if axes else None)


def _has_axis(name: str, leaf: Leaf) -> bool:
    return name in (leaf.axes or ())


def _suggest_axis(name: str, leaves: list[Leaf]) -> str:
    named = {axis for leaf in leaves for axis in leaf.axes or () if axis is not None}
    return did_you_mean(name, sorted(named))
