"""`Strategy`: the declaration of one parallel layout, and how two of them combine."""

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from .._core.errors import Problem, StepError, did_you_mean, format_problems, raise_all
from .._core.io._notebook import notebook_html
from .._core.options import option_problems
from .._core.precision import AS_INITIALIZED, Precision, dtype_name
from .._core.types import Accumulate
from ..nn._overridable import Override
from ..rules import REPLICATED, AxisRules, Rule, axes_of, first_match, list_rules, spec_from_axes
from ._compression import GradientCompression
from ._kind import Kind
from ._zero_update import Zero

_UNSPLIT = PartitionSpec()
# Longer fields are cut in the short text of a strategy.
_SHORT = 60


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One parallel layout, as data. Combine strategies with `|`.

    Attributes:
      params: rule that decides every parameter.
      batch: spec of every batch leaf (a leaf of lower rank takes its first entries), whose first
        entry is that of the rows; or a rule over the leaves, such as
        `sk.PathRules({"tokens": P(None, "data"), "class_weights": sk.REPLICATED, "**": P("data")})`
        where rows are not on dim 0 of every leaf. `StepSpec.row_dims` says the same without a rule.
      activations: logical axis names to mesh axes for `sk.nn.constrain`; None for models without.
      opt_state: rule for optimizer leaves that match no parameter, or whose layout differs from
        that of their parameter; leaves that it passes follow their parameter.
      zero: splits the update, and so the optimizer's state, further than the parameters.
      model_state: rule for mutable model state.
      accumulate: micro-batches per step, an int or `sk.Accumulate`.
      remat: named checkpoint policy for the layers that a model marks with `sk.nn.remat`.
      precision: `"float32"`, `"bfloat16"`, `"pure_bfloat16"` or `sk.Precision`; by default every
        parameter keeps the dtype that `init` gives it.
      compression: sums gradients over one mesh axis in 8 bits; None: as `parse_precision` says.
      kinds: the kinds of parallelism, each on its mesh axis; see `Kind`.
      overrides: `(name, override)` of each part of a model that the strategy computes itself:
        `"attention"` for `sk.nn.attention`.
      names: `(conventional, the model's)` logical names, as `rename` sets them.

    >>> from shardkit.parallel import strategies
    >>> both = strategies.data() | strategies.tensor()
    >>> both.batch, both.kinds
    (P('data',), (Data(axis='data'), Tensor(axis='tensor', sequence=False)))
    """

    params: Rule = REPLICATED
    batch: PartitionSpec | Rule = _UNSPLIT
    activations: AxisRules | None = None
    opt_state: Rule | None = None
    zero: Zero | None = None
    model_state: Rule = REPLICATED
    accumulate: int | Accumulate = 1
    remat: str = "none"
    precision: str | Precision = AS_INITIALIZED
    compression: GradientCompression | None = None
    kinds: tuple[Kind, ...] = ()
    overrides: tuple[tuple[str, Override], ...] = ()
    names: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Refuses a spec or a dict in place of a rule; takes a dtype as the policy of its name."""
        object.__setattr__(self, "precision", dtype_name(self.precision))
        rules = {"params": self.params, "model_state": self.model_state}
        if self.opt_state is not None:
            rules["opt_state"] = self.opt_state
        if not isinstance(self.batch, PartitionSpec):
            rules["batch"] = self.batch
        fix = 'sk.PathRules({"**/kernel": P(None, "tensor"), "**": sk.REPLICATED})'
        problems = [
            Problem(name, f"{rule!r} is not a rule", 'P("data")' if name == "batch" else fix)
            for name, rule in rules.items()
            if not isinstance(rule, Rule)
        ]
        if not isinstance(self.activations, AxisRules | None):
            why = f"{self.activations!r} is not a table of logical axes"
            problems.append(Problem("activations", why, 'sk.AxisRules({"batch": "data"})'))
        problems += [
            Problem(
                "kinds", f"{kind!r} is not a kind of parallelism", 'strategies.own("ring").kinds'
            )
            for kind in (self.kinds if isinstance(self.kinds, tuple) else [self.kinds])
            if not isinstance(kind, Kind) or kind is self.kinds
        ]
        problems += option_problems(
            zero=(self.zero, Zero | None),
            accumulate=(self.accumulate, int | Accumulate),
            remat=(self.remat, str),
            precision=(self.precision, str | Precision),
            compression=(self.compression, GradientCompression | None),
            overrides=(self.overrides, tuple[tuple[str, Override], ...]),
            names=(self.names, tuple[tuple[str, str], ...]),
        )
        raise_all(StepError, "The strategy is declared wrongly.", problems)

    def describe(self) -> dict[str, str]:
        """What it declares, as text by field: its kinds, and every field that is not a default."""
        kinds = " | ".join(f"{kind} over {kind.axis}" for kind in self.kinds)
        fields = (field for field in dataclasses.fields(self) if field.name != "kinds")
        values = {field.name: (getattr(self, field.name), field.default) for field in fields}
        declared = {name: repr(value) for name, (value, own) in values.items() if value != own}
        return {"kinds": kinds, **declared} if kinds else declared

    def __repr__(self) -> str:
        """Its kinds, and each field that is not a default, long ones cut."""
        about = self.describe()
        parts = [about.pop("kinds")] if "kinds" in about else []
        parts += [f"{name}={text if len(text) <= _SHORT else '…'}" for name, text in about.items()]
        return f"Strategy({', '.join(parts)})"

    def _repr_html_(self) -> str:
        return notebook_html("Strategy", self.describe())

    @property
    def _stores(self) -> bool:
        """Whether rows are split over an axis that weights are stored over as well."""
        return any({"rows", "weights"} <= kind.splits for kind in self.kinds)

    def __or__(self, other: "Strategy") -> "Strategy":
        """Combines two layouts: each logical name over the axes of both, options from either.

        Raises StepError if both decide the same parameters, or give one option two values.
        """
        if not isinstance(other, Strategy):
            problem = Problem(f"| {other!r}", "is not a strategy", "| strategies.data()")
            raise StepError(format_problems("Two strategies cannot be combined.", [problem]))
        problems: list[Problem] = []
        # Axes that also store weights are the outer ones of a split of rows. With data=2, fsdp=2,
        # tensor=2 and rows over (data, fsdp), XLA sums the gradient of a weight over the wrong
        # devices (98 % off, in plain `jax.jit` too; benchmarks/xla_faults.py); with (fsdp, data)
        # it does not.
        outer, inner = (other, self) if other._stores > self._stores else (self, other)
        joined = {
            "params": _join_rules(self.params, other.params, problems),
            "batch": _join_batch(outer.batch, inner.batch, problems),
            "activations": _join_tables(outer.activations, inner.activations),
            "kinds": self.kinds + other.kinds,
            "overrides": _join_overrides(self.overrides, other.overrides, problems),
        }
        for field in dataclasses.fields(Strategy):
            if field.name in joined:
                continue
            values = [getattr(self, field.name), getattr(other, field.name)]
            declared = [value for value in values if value != field.default]
            if len(declared) == 2 and declared[0] != declared[1]:
                why = f"{declared[0]!r} in the first, {declared[1]!r} in the second"
                problems.append(Problem(field.name, why))
            joined[field.name] = declared[-1] if declared else field.default
        if problems:
            fix = "dataclasses.replace(strategy, ...) of one for what both declare"
            raise StepError(format_problems("Two strategies cannot be combined.", problems, fix))
        return Strategy(**joined)

    def with_names(
        self, params: Mapping[str, Any] | None = None, activations: Mapping[str, Any] | None = None
    ) -> "Strategy":
        """Adds logical names of your own model to the tables of a ready strategy.

        Args:
          params: `{logical axis: mesh axis, axes or None}` for parameters.
          activations: the same for activations.

        >>> from shardkit.parallel import strategies
        >>> own = strategies.tensor().with_names(params={"filters": "tensor"})
        >>> own.params.spec(("embed", "filters"))
        P(None, 'tensor')
        """
        first, *others = list_rules(self.params)
        changes: dict[str, Any] = {}
        if params and isinstance(first, AxisRules):
            changes["params"] = _chain(first.replaced(params), others)
        if activations and self.activations:
            changes["activations"] = self.activations.replaced(activations)
        if len(changes) < bool(params) + bool(activations):
            problem = Problem("with_names", "this strategy has no table of logical names to add to")
            raise_all(StepError, "Names cannot be added.", [problem], "AxisRules({...})")
        return dataclasses.replace(self, **changes)

    def rename(self, names: Mapping[str, str]) -> "Strategy":
        """Renames logical axes, for a model that calls the conventional ones something else.

        Combine strategies first, then rename.

        Args:
          names: `{name in the strategy's tables: your model's name}`.

        Returns:
          A strategy whose tables, overrides and reports use the model's names.

        Raises:
          StepError: a name that no table lists, or two dims that would have one name.

        >>> from shardkit.parallel import strategies
        >>> both = strategies.fsdp() | strategies.tensor()
        >>> both.rename({"embed": "hidden", "mlp": "ffn"}).params.rules[0].spec(("hidden", "ffn"))
        P('fsdp', 'tensor')
        """
        problems = _rename_problems(names, self.logical_axes)
        raise_all(StepError, "Logical axes cannot be renamed.", problems)
        rules = list_rules(self.params)
        params = [_rename(rule, names) if isinstance(rule, AxisRules) else rule for rule in rules]
        # Names that were renamed before keep their conventional name: embed → hidden → width.
        conventional = {current: original for original, current in self.names}
        renamed = {conventional.get(old, old): new for old, new in names.items()}
        zero = self.zero
        if zero:
            zero = dataclasses.replace(zero, last=tuple(names.get(n, n) for n in zero.last))
        return dataclasses.replace(
            self,
            params=_chain(params[0], params[1:]),
            activations=self.activations and _rename(self.activations, names),
            zero=zero,
            names=tuple({**dict(self.names), **renamed}.items()),
        )

    def renamed_like(self, other: "Strategy") -> "Strategy":
        """Renames logical axes as another strategy does, as far as its own tables list them.

        >>> from shardkit.parallel import strategies
        >>> own = strategies.tensor().rename({"mlp": "ffn", "layers": "depth"})
        >>> strategies.data().renamed_like(own).activations.mesh_axes("ffn")
        ()
        """
        listed = self.logical_axes
        names = {old: new for old, new in other.names if old in listed}
        return dataclasses.replace(self.rename(names), names=other.names)

    @property
    def logical_axes(self) -> tuple[str, ...]:
        """Logical axes that its tables list."""
        rules = (*list_rules(self.params), self.activations)
        tables = [rule.table for rule in rules if isinstance(rule, AxisRules)]
        return tuple(dict.fromkeys(name for table in tables for name, _ in table))

    def conventional_names(self, axes: Sequence[str | None] | None) -> tuple[str | None, ...]:
        """The conventional names of a model's logical axes; others stay as they are."""
        original = {new: old for old, new in self.names}
        return tuple(original.get(name, name) if name else None for name in axes or ())


def _join_rules(first: Rule, second: Rule, problems: list[Problem]) -> Rule:
    """Tables of names are merged, other rules follow them; `REPLICATED` yields to anything."""
    if first == REPLICATED or first == second:
        return second
    if second == REPLICATED:
        return first
    tables: list[AxisRules] = []
    others: list[Rule] = []
    for rule in (*list_rules(first), *list_rules(second)):
        if isinstance(rule, AxisRules):
            tables.append(rule)
        else:
            others.append(rule)
    if len(tables) != 2:
        problems.append(Problem("params", f"{first} and {second} both decide the parameters"))
        return first
    return _chain(tables[0].merged(tables[1]), others)


def _rename_problems(names: Mapping[str, str], listed: Collection[str]) -> list[Problem]:
    problems = []
    renamed = [names.get(name, name) for name in listed]
    for old, new in names.items():
        subject = f"rename({{{old!r}: {new!r}}})"
        if old not in listed:
            why = f"the strategy lists no {old!r}.{did_you_mean(old, listed)}"
            problems.append(Problem(subject, why, f"one of {', '.join(listed)}"))
        if renamed.count(new) > 1:
            why = f"two logical axes would be called {new!r}"
            fix = f"rename({{..., {new!r}: another name}}) as well"
            problems.append(Problem(subject, why, fix))
    return problems


def _rename(table: AxisRules, names: Mapping[str, str]) -> AxisRules:
    return table.renamed({old: new for old, new in names.items() if old in dict(table.table)})


def _chain(first: Rule, others: Sequence[Rule]) -> Rule:
    return first_match(first, *others) if others else first


def _join_tables(first: AxisRules | None, second: AxisRules | None) -> AxisRules | None:
    """Each name is split over the axes of both tables, those of the first outermost.

    The residual stream's length splits the length further, so its axes come after the length's:
    context() | tensor(sequence=True) has length over context, residual_length over both.
    """
    if not (first and second):
        return first or second
    merged = first.merged(second)
    table = dict(merged.table)
    if not {"length", "residual_length"} <= table.keys():
        return merged
    finer = dict.fromkeys((*table["length"], *table["residual_length"]))
    return merged.replaced({"residual_length": tuple(finer)})


def _join_overrides(
    first: tuple[tuple[str, Override], ...],
    second: tuple[tuple[str, Override], ...],
    problems: list[Problem],
) -> tuple[tuple[str, Override], ...]:
    joined = dict(first)
    for name, override in second:
        if joined.setdefault(name, override) != override:
            why = f"{joined[name]} and {override} would both override the model's {name}"
            problems.append(Problem("overrides", why))
    return tuple(joined.items())


def _join_batch(
    first: PartitionSpec | Rule, second: PartitionSpec | Rule, problems: list[Problem]
) -> PartitionSpec | Rule:
    """Specs are merged dim by dim; an unsplit batch yields to a rule."""
    if isinstance(first, PartitionSpec) and isinstance(second, PartitionSpec):
        pairs = itertools.zip_longest(first, second)
        return spec_from_axes(dict.fromkeys((*axes_of(a), *axes_of(b))) for a, b in pairs)
    if _UNSPLIT in (first, second):
        return second if first == _UNSPLIT else first
    problems.append(Problem("batch", f"{first} and {second} both decide the batch"))
    return first
