"""Compiles what the findings of a report suggest.

A finding is words about one program. Here the program that it asks for is compiled: in another
mode, or with one constraint more, put into the trace of the loss behind the equation whose line the
finding names; or with another spec of a constraint there, or of a leaf. What alone saves nothing
can do so beside others: of two constraints that both have a weight gathered neither one does.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._core.equations import source_of_equation
from .._core.errors import ShardkitError, StepError
from .._core.own_sharding import CONSTRAINT
from .._core.rewriting import rewrite
from .._core.row_dims import RowDims, count_rows
from .._core.source import Source
from .._core.tracing import equations
from .._core.tree import format_bytes, list_leaves
from .._core.types import Accumulate, Loss
from ..nn._constrain import constrain_p
from ..parallel import Strategy
from ..report import (
    AGREE,
    FOLLOW,
    MOVE,
    Finding,
    OddDeclaration,
    PlacedLeaf,
    Program,
    Report,
    layouts_of_others,
    move_dims,
    read_memory,
)
from ..rules import PathRules, Rule, first_match
from ._bound_spec import BoundSpec
from ._compiled_functions import CompiledFunctions
from ._layout import StepLayout
from ._report import build_program

if TYPE_CHECKING:
    from ._spec import StepSpec

CONSTRAIN = "constrain"
_WORDS = {
    CONSTRAIN: "with this constraint",
    AGREE: "with this layout",
    FOLLOW: "with this layout",
    MOVE: "with this layout",
    "shard_map": 'with mode="shard_map"',
    "end": 'with reduce="end"',
    "owners": "with owners=True",
}


@dataclasses.dataclass(frozen=True)
class _Change:
    """An alternative of a finding; equal to that of another finding which asks for the same."""

    alternative: str
    place: Any
    finding: Finding = dataclasses.field(compare=False)

    @classmethod
    def of(cls, finding: Finding) -> "list[_Change]":
        """Those that a finding names."""
        places = {AGREE: finding.declarations, CONSTRAIN: finding.source, FOLLOW: finding.axes}
        places |= {MOVE: (finding.declarations, finding.source)}
        return [cls(name, places.get(name), finding) for name in finding.alternatives]


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What a step sends, and has alive at once, in bytes; or why it cannot be had."""

    sent: int | None
    alive: int | None = None
    refused: str = ""

    def cost(self, finding: Finding) -> int | None:
        """The bytes that a finding is about: what collectives send, or what is in memory."""
        return self.sent if finding.rows or self.alive is None else self.alive

    def describe(self, finding: Finding) -> str:
        """Returns `620 KiB`, or why there is none."""
        cost = self.cost(finding)
        return f"it is refused ({self.refused})" if cost is None else format_bytes(cost)


def try_fixed(report: Report, bound: BoundSpec, layout: StepLayout, program: Program) -> Report:
    """Returns a report whose findings say what their alternatives send, compiled.

    Each alternative is compiled once, however many findings name it, and all of them together.
    Findings that name none stay; those of which none sends less are kept apart.
    """
    trials = _Trials(bound, layout, program)
    now = trials.read(program)
    alone = {
        number: {change: trials.run([change]) for change in _Change.of(finding)}
        for number, finding in enumerate(report.findings)
    }
    best = {number: _least(outcomes) for number, outcomes in alone.items()}
    together = _find_together(trials, [one for one in best.values() if one], now)
    sent = trials.run(together) if len(together) > 1 else None
    findings, kept = list[Finding](), list[Finding]()
    for number, finding in enumerate(report.findings):
        change = best[number]
        beside = sent if change in together else None
        told = _with_outcomes(finding, alone[number], now, beside)
        less = change is None or beside or _is_less(trials.run([change]), now, finding)
        (findings if less else kept).append(told)
    return dataclasses.replace(report, findings=tuple(findings), kept=(*report.kept, *kept))


def _least(outcomes: Mapping[_Change, _Outcome]) -> _Change | None:
    """The change after which the bytes that its finding is about are the fewest."""
    costs = {change: outcome.cost(change.finding) for change, outcome in outcomes.items()}
    known = {change: cost for change, cost in costs.items() if cost is not None}
    return min(known, key=known.__getitem__, default=None)


def _is_less(outcome: _Outcome, than: _Outcome, finding: Finding) -> bool:
    cost, now = outcome.cost(finding), than.cost(finding)
    return cost is not None and now is not None and cost < now


def _find_together(
    trials: "_Trials", changes: Sequence[_Change], now: _Outcome
) -> Sequence[_Change]:
    """The changes to make together: all that save something, and those that do so beside them."""
    group = list(dict.fromkeys(one for one in changes if one.finding.rows))
    if trials.run(group).sent is None:  # such as a mode that one of them has no place in
        group = [one for one in group if one.alternative == AGREE]
    for one in (one for one in group if not _is_less(trials.run([one]), now, one.finding)):
        others = [other for other in group if other != one]
        if not _is_less(trials.run(group), trials.run(others), one.finding):
            group = others
    return group


def _with_outcomes(
    finding: Finding,
    outcomes: Mapping[_Change, _Outcome],
    now: _Outcome,
    together: _Outcome | None,
) -> Finding:
    """The finding, with what was compiled for it as part of its fix."""
    if not outcomes:
        return finding
    said = [f"{_WORDS[one.alternative]} {of.describe(finding)}" for one, of in outcomes.items()]
    said += [f"with those of all such findings {together.describe(finding)}"] if together else []
    verb = "sends" if finding.rows or now.alive is None else "has alive at once"
    fix = f"{finding.fix}. The step, compiled, {verb} {now.describe(finding)} now; "
    sent = [one.sent for one in outcomes.values() if one.sent is not None]
    less = any(_is_less(one, now, finding) for one in (*outcomes.values(), together) if one)
    fix += "; ".join(said) + ("" if less or not sent else ": no less, so keep it as it is")
    return dataclasses.replace(finding, fix=fix, remaining=min(sent, default=None), tried=True)


class _Trials:
    """Compiles a step with the changes of findings, each set of them once."""

    def __init__(self, bound: BoundSpec, layout: StepLayout, program: Program) -> None:
        self._bound, self._layout, self._program = bound, layout, program
        self._known: dict[frozenset[_Change], _Outcome] = {frozenset(): self.read(program)}

    @staticmethod
    def read(program: Program) -> _Outcome:
        """The bytes of a compiled step."""
        return _Outcome(program.ledger.total(), read_memory(program).total)

    def run(self, changes: Sequence[_Change]) -> _Outcome:
        """The bytes with some changes, or why they cannot be had."""
        which = frozenset(changes)
        if which not in self._known:
            try:
                changed = BoundSpec(self._apply(changes), self._bound.mesh)
                functions = CompiledFunctions(changed)
                compiled = build_program(changed, functions.layout, functions.train, ())
                self._known[which] = self.read(compiled)
            except ShardkitError as error:
                said = " ".join(line.strip() for line in str(error).splitlines()[:2])
                self._known[which] = _Outcome(None, refused=said)
        return self._known[which]

    def _apply(self, changes: Sequence[_Change]) -> "StepSpec":
        layout, mesh, spec = self._layout, self._bound.mesh, self._bound.spec
        loss = spec.loss_fn if isinstance(spec.loss_fn, Loss) else Loss(spec.loss_fn, spec.loss_fn)
        train, odd = loss.train, list(self._relaid(changes))
        for one in (one for one in odd if not one.leaves and (one.names or not one.mapped)):
            train = _respecified(train, one, mesh)
        mapped = {name: axes for one in odd for name, axes in one.mapped}
        strategy = spec.strategy.with_names(activations=mapped)
        spec = spec.replace(strategy=_with_specs(strategy, odd, self._bound, layout))
        for one in changes:
            if one.alternative == "shard_map":
                spec = spec.replace(mode="shard_map")
            elif one.alternative == "owners":
                spec = spec.replace(owners=True)
            elif one.alternative == "end":
                micro_batches = spec.accumulate.micro_batches
                spec = spec.replace(accumulate=Accumulate(micro_batches, reduce="end"))
            elif one.alternative == FOLLOW:
                moments = self._program.own_layouts(one.finding.axes)
                own = {leaf: parameter.spec for leaf, parameter in moments.items()}
                strategy = spec.strategy
                changed = dataclasses.replace(strategy, opt_state=_first(own, strategy.opt_state))
                spec = spec.replace(strategy=changed)
            elif one.alternative == CONSTRAIN:
                sharding = NamedSharding(mesh, PartitionSpec(layout.row_axes))
                train = _constrained(train, one.finding.source, layout.row_dims, sharding)
        if train is loss.train:
            return spec
        return spec.replace(loss_fn=dataclasses.replace(loss, train=train))

    def _relaid(self, changes: Iterable[_Change]) -> Iterator[OddDeclaration]:
        """What gets the layout of all others, after what only has another dim split."""
        declared, changes = self._program.declared, list(changes)
        for one in (one for one in changes if one.alternative == MOVE):
            yield from move_dims(one.finding, self._program)
        names = {name for one in changes if one.alternative == AGREE for name in one.place}
        yield from (one for one in declared.odd if one.declared_by in names)


def _first(specs: Mapping[PlacedLeaf, PartitionSpec], rule: Rule | None) -> Rule:
    """A rule with specs of its own for some leaves."""
    own = PathRules({leaf.leaf.path: spec for leaf, spec in specs.items()})
    return first_match(own, rule) if rule else own


def _with_specs(
    strategy: Strategy, odd: Sequence[OddDeclaration], bound: BoundSpec, layout: StepLayout
) -> Strategy:
    """A strategy that lays the leaves of some declarations out as all others do."""
    changed: dict[str, Any] = {}
    for part, layouts in layouts_of_others(odd, dict(bound.mesh.shape)).items():
        specs = {leaf: _to_spec(dims) for leaf, dims in layouts.items()}
        if part != "batch":
            changed[part] = _first(specs, getattr(strategy, part))
            continue
        shardings = zip(
            list_leaves(layout.batch), jax.tree.leaves(layout.batch_shardings), strict=True
        )
        known = {leaf.path: sharding.spec for leaf, sharding in shardings}
        changed[part] = PathRules(known | {leaf.leaf.path: spec for leaf, spec in specs.items()})
    return dataclasses.replace(strategy, **changed)


def _to_spec(dims: Sequence[tuple[str, ...] | None]) -> PartitionSpec:
    return PartitionSpec(
        *(PartitionSpec.UNCONSTRAINED if axes is None else axes or None for axes in dims)
    )


def _respecified(
    function: Callable[..., Any], odd: OddDeclaration, mesh: Mesh
) -> Callable[..., Any]:
    """A function in which a constraint has the layout of all other declarations.

    Its call raises StepError where the constraint is in a part that `rewrite` leaves alone.
    """
    sharding = NamedSharding(mesh, _to_spec(odd.dims(dict(mesh.shape))))
    wanted = len(odd.shape), odd.shape[1:]
    changed: list[core.JaxprEqn] = []

    def change(eqn: core.JaxprEqn) -> core.JaxprEqn:
        aval: Any = eqn.outvars[0].aval
        # A gradient shard has some of the rows.
        if not _is_at(eqn, odd.source) or (len(aval.shape), aval.shape[1:]) != wanted:
            return eqn
        shape = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        traced = jax.make_jaxpr(lambda x: jax.lax.with_sharding_constraint(x, sharding))(shape)
        changed.append(eqn)
        return traced.jaxpr.eqns[0].replace(invars=eqn.invars, outvars=eqn.outvars)

    rewritten = rewrite(function, {CONSTRAINT: change, constrain_p.name: change})

    def run(*args: Any) -> Any:
        result = rewritten(*args)
        if not changed:
            raise StepError("it is in a derivative rule, or the spec of a shard_map")
        return result

    return run


def _makes_rows(eqn: core.JaxprEqn, source: Source | None, rows: Collection[int]) -> bool:
    """Whether an equation of a line computes an activation, its rows in the first dim."""
    if source is None or not _is_at(eqn, source):
        return False
    if len(eqn.outvars) != 1 or any(True for _ in core.jaxprs_in_params(eqn.params)):
        return False
    aval: Any = eqn.outvars[0].aval
    floating = jnp.issubdtype(aval.dtype, jnp.floating)
    return floating and aval.ndim > 1 and aval.shape[0] in rows


def _is_at(eqn: core.JaxprEqn, line: Source) -> bool:
    made = source_of_equation(eqn)
    return made is not None and (made.file, made.line) == (line.file, line.line)


def _constrained(
    function: Callable[..., Any], line: Source | None, dims: RowDims, sharding: NamedSharding
) -> Callable[..., Any]:
    """A function in which the last rows that a line computes, and their like, are split.

    It gets as many rows as its caller takes at once: a gradient shard has some of the batch's.
    """

    def run(*args: Any) -> Any:
        fits = functools.partial(_makes_rows, source=line, rows=count_rows(args[1], dims))
        traced = jax.make_jaxpr(function)(*args)
        last = [eqn for eqn in equations(traced.jaxpr) if fits(eqn)][-1:]

        def change(eqn: core.JaxprEqn) -> core.JaxprEqn:
            return _constrain_result(eqn, traced, sharding) if fits(eqn) else eqn

        changes = {eqn.primitive.name: change for eqn in last}
        return rewrite(function, changes)(*args)

    return run


def _constrain_result(
    eqn: core.JaxprEqn, traced: core.ClosedJaxpr, sharding: NamedSharding
) -> core.JaxprEqn:
    """An equation of a jitted function that computes another one, then constrains its result."""
    inputs = [*dict.fromkeys(v for v in eqn.invars if not isinstance(v, core.Literal))]
    jaxpr = traced.jaxpr.replace(constvars=[], invars=inputs, outvars=eqn.outvars, eqns=[eqn])
    compute = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))

    def constrained(*values: Any) -> Any:
        return jax.lax.with_sharding_constraint(compute(*values)[0], sharding)

    avals: list[Any] = [value.aval for value in inputs]
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    (call,) = jax.make_jaxpr(jax.jit(constrained))(*shapes).jaxpr.eqns
    return call.replace(invars=inputs, outvars=eqn.outvars)
