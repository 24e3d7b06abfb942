"""`Strategy`: the declaration of one parallel layout, and how two of them join."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from .._core.errors import Problem, StepError, format_problems, raise_all
from .._core.precision import Precision
from .._core.types import Accumulate
from ..nn._overridable import Override
from ..rules import REPLICATED, AxisRules, Rule, axes_of, first_match, flatten, from_axes
from ._compression import GradientCompression
from ._kind import Kind
from ._zero_update import Zero

_WHOLE = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One parallel layout, as data.

    Attributes:
      params: rule that decides every parameter.
      batch: spec of every batch leaf (a leaf of lower rank takes its first entries), or a rule
        over the leaves. Dim 0 of every leaf that is no scalar counts rows.
      activations: logical axis names to mesh axes for `sk.nn.constrain`; None for models without.
      opt_state: rule for optimizer leaves that no parameter explains, or that are to live
        elsewhere than their parameter; leaves that it passes follow their parameter.
      zero: splits the update, and so the optimizer's state, further than the parameters.
      model_state: rule for mutable model state.
      accumulate: micro-batches per step, an int or `sk.Accumulate`.
      remat: named checkpoint policy for the layers that a model marks with `sk.nn.remat`.
      precision: `"float32"`, `"bfloat16"`, `"pure_bfloat16"` or `sk.Precision`.
      compression: sums gradients over one mesh axis in 8 bits; None: as `precision` says.
      kinds: the kinds of parallelism, each on its mesh axis; see `Kind`.
      overrides: `(name, override)` of the parts of a model that the strategy carries out itself.

    >>> from shardkit.parallel import strategies
    >>> both = strategies.data() | strategies.tensor()
    >>> both.batch, both.kinds
    (P('data',), (Data(axis='data'), Tensor(axis='tensor', sequence=False)))
    """

    params: Rule = REPLICATED
    batch: PartitionSpec | Rule = _WHOLE
    activations: AxisRules | None = None
    opt_state: Rule | None = None
    zero: Zero | None = None
    model_state: Rule = REPLICATED
    accumulate: int | Accumulate = 1
    remat: str = "none"
    precision: str | Precision = "float32"
    compression: GradientCompression | None = None
    kinds: tuple[Kind, ...] = ()
    overrides: tuple[tuple[str, Override], ...] = ()

    def __post_init__(self) -> None:
        """Refuses a spec or a dict where a rule is wanted."""
        rules = {"params": self.params, "model_state": self.model_state}
        if self.opt_state is not None:
            rules["opt_state"] = self.opt_state
        if not isinstance(self.batch, PartitionSpec):
            rules["batch"] = self.batch
        fix = 'sk.PathRules({"**/kernel": P(None, "tensor"), "**": sk.REPLICATED})'
        problems = [
            Problem(name, f"{rule!r} is no rule", 'P("data")' if name == "batch" else fix)
            for name, rule in rules.items()
            if not isinstance(rule, Rule)
        ]
        if not isinstance(self.activations, AxisRules | None):
            why = f"{self.activations!r} is no table of logical axes"
            problems.append(Problem("activations", why, 'sk.AxisRules({"batch": "data"})'))
        problems += [
            Problem(
                "kinds", f"{kind!r} is not a kind of parallelism", 'strategies.own("ring").kinds'
            )
            for kind in self.kinds
            if not isinstance(kind, Kind)
        ]
        raise_all(StepError, "The strategy cannot be read.", problems)

    def __or__(self, other: "Strategy") -> "Strategy":
        """Joins two layouts: each logical name over the axes of both, options from either.

        Raises:
          StepError: both decide the same parameters, or give one option two values.
        """
        if not isinstance(other, Strategy):
            why = "is no strategy, and only strategies join"
            problem = Problem(f"| {other!r}", why, "| strategies.data()")
            raise StepError(format_problems("Two strategies do not join.", [problem]))
        problems: list[Problem] = []
        joined = {
            "params": _join_rules(self.params, other.params, problems),
            "batch": _join_batch(self.batch, other.batch, problems),
            "activations": _join_tables(self.activations, other.activations),
            "kinds": self.kinds + other.kinds,
            "overrides": _join_overrides(self.overrides, other.overrides, problems),
        }
        plain = _defaults()
        for name in [name for name in plain if name not in joined]:
            values = [getattr(one, name) for one in (self, other)]
            given = [value for value in values if value != plain[name]]
            if len(given) == 2 and given[0] != given[1]:
                problems.append(Problem(name, f"{given[0]!r} in one, {given[1]!r} in the other"))
            joined[name] = given[-1] if given else plain[name]
        if problems:
            fix = "dataclasses.replace(one, ...) for what both declare"
            raise StepError(format_problems("Two strategies do not join.", problems, fix))
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
        head, *rest = flatten(self.params)
        if (params and not isinstance(head, AxisRules)) or (activations and not self.activations):
            problem = Problem("with_names", "this strategy has no table of logical names to add to")
            raise StepError(format_problems("Names do not fit.", [problem], "AxisRules({...})"))
        return dataclasses.replace(
            self,
            params=_chained(head.replaced(params), rest) if params else self.params,
            activations=self.activations.replaced(activations) if activations else self.activations,
        )


def _defaults() -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(Strategy)}


def _join_rules(one: Rule, other: Rule, problems: list[Problem]) -> Rule:
    """A rule that replicates everything yields; tables of names merge; the rest follows."""
    if one == REPLICATED or one == other:
        return other
    if other == REPLICATED:
        return one
    tables, rest = [], []
    for rule in (*flatten(one), *flatten(other)):
        (tables if isinstance(rule, AxisRules) else rest).append(rule)
    if len(tables) != 2:
        problems.append(Problem("params", f"{one} and {other} both decide the parameters"))
        return one
    merged = tables[0].merged(tables[1])
    return _chained(merged, rest)


def _chained(table: AxisRules, rest: Sequence[Rule]) -> Rule:
    return first_match(table, *rest) if rest else table


def _join_tables(one: AxisRules | None, other: AxisRules | None) -> AxisRules | None:
    """Each name is split over the axes of both tables, those of the first one outermost.

    The residual stream's length is a finer split of the length, so its axes come after those.
    """
    if not (one and other):
        return one or other
    merged = one.merged(other)
    table = dict(merged.table)
    if not {"length", "residual_length"} <= table.keys():
        return merged
    finer = dict.fromkeys((*table["length"], *table["residual_length"]))
    return merged.replaced({"residual_length": tuple(finer)})


def _join_overrides(
    one: tuple[tuple[str, Override], ...],
    other: tuple[tuple[str, Override], ...],
    problems: list[Problem],
) -> tuple[tuple[str, Override], ...]:
    taken = dict(one)
    for name, override in other:
        if taken.setdefault(name, override) != override:
            why = f"{taken[name]} and {override} both override the model's {name}"
            problems.append(Problem("overrides", why))
    return tuple(taken.items())


def _join_batch(one: Any, other: Any, problems: list[Problem]) -> Any:
    specs = [isinstance(spec, PartitionSpec) for spec in (one, other)]
    if all(specs):
        rank = max(len(one), len(other))
        rows = [[*spec, *[None] * (rank - len(spec))] for spec in (one, other)]
        pairs = zip(*rows, strict=True)
        return from_axes(dict.fromkeys((*axes_of(a), *axes_of(b))) for a, b in pairs)
    if one == PartitionSpec() or other == PartitionSpec():
        return other if one == PartitionSpec() else one
    problems.append(Problem("batch", f"{one} and {other} both decide the batch"))
    return one
