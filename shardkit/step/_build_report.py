"""Builds the report of a step, and compiles what its findings suggest.

A finding of a report is words about one program. Here the program that it asks for is compiled: in
another mode, or with one constraint more, put into the trace of the loss behind the equation whose
line the finding names; or with another spec of a constraint there, or of a leaf.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._core.equations import source_of_equation
from .._core.errors import ShardkitError, StepError
from .._core.own_sharding import CONSTRAINT
from .._core.rewriting import rewrite
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
    find_split_dim,
    layouts_of_others,
    phase_of,
)
from ..rules import PathRules, Rule, first_match
from ._bound_spec import BoundSpec
from ._compiled_functions import CompiledFunctions
from ._idle_options import find_idle_options
from ._layout import StepLayout
from ._param_uses import find_param_uses
from ._report import build_program

if TYPE_CHECKING:
    from ..hardware import Chip
    from ._spec import StepSpec

CONSTRAIN, _TOGETHER = "constrain", "together"
_WORDS = {
    CONSTRAIN: "with this constraint",
    AGREE: "with this layout",
    FOLLOW: "with this layout",
    MOVE: "with this layout",
    _TOGETHER: "with those of all such findings",
    "shard_map": 'with mode="shard_map"',
    "end": 'with reduce="end"',
    "owners": "with owners=True",
}


def build_report(
    bound: BoundSpec,
    functions: CompiledFunctions,
    retraced: Sequence[str] = (),
    *,
    chip: "str | Chip | None" = None,
    try_fixes: bool = False,
) -> Report:
    """Reads the training step of a spec; see `CompiledStep.report`.

    `retraced` says how each other compiled batch variant differs.
    """
    compiled = functions.train
    program = build_program(bound, functions.layout, compiled, retraced)
    idle = tuple(find_idle_options(bound, compiled.jaxpr.jaxpr))
    declared = dataclasses.replace(program.declared, idle_options=idle)
    leaves = tuple(_mark_forward_only(program.leaves, compiled.jaxpr.jaxpr))
    program = dataclasses.replace(program, declared=declared, leaves=leaves)
    report = Report.of(program, chip=chip)
    return _try_fixes(report, bound, functions.layout, program) if try_fixes else report


def _mark_forward_only(leaves: Sequence[PlacedLeaf], step: core.Jaxpr) -> Sequence[PlacedLeaf]:
    """Marks the frozen parameters that the backward pass of a step does not need."""
    if not any(leaf.frozen for leaf in leaves):
        return leaves
    frozen = [leaf.leaf.path if leaf.frozen else None for leaf in leaves]
    uses = find_param_uses(dce_jaxpr(step, [True] * len(step.outvars))[0], frozen)
    again = [use for use in uses if phase_of(use.path) in ("backward", "recompute")]
    needed = frozenset[str]().union(*(use.leaves for use in again))
    return [
        dataclasses.replace(leaf, forward_only=leaf.frozen and leaf.leaf.path not in needed)
        for leaf in leaves
    ]


def _try_fixes(report: Report, bound: BoundSpec, layout: StepLayout, program: Program) -> Report:
    """Returns a report whose findings say what their alternatives send, compiled.

    Each alternative is compiled once, however many findings name it. Findings that name none stay.
    """
    outcomes: dict[tuple[str, Any], tuple[int | None, str]] = {}
    findings, now = list[Finding](), report.ledger.total()
    at_odds = [one.declarations for one in report.findings if AGREE in one.alternatives]
    together = tuple(dict.fromkeys(name for names in at_odds for name in names))
    for finding in report.findings:
        tried = {}
        places = {MOVE: (finding.declarations, finding.source)}
        places |= {AGREE: finding.declarations, CONSTRAIN: finding.source, FOLLOW: finding.axes}
        keys = [(name, places.get(name)) for name in finding.alternatives]
        keys += (
            [(_TOGETHER, together)] if (AGREE, together) not in keys and AGREE in dict(keys) else []
        )
        for name, place in keys:
            if (name, place) not in outcomes:
                change = functools.partial(_change, bound, layout, program, finding)
                outcomes[name, place] = _send(bound, functools.partial(change, name, place))
            tried[name] = outcomes[name, place]
        findings.append(_add_outcomes(finding, tried, now))
    return dataclasses.replace(report, findings=tuple(findings))


def _add_outcomes(
    finding: Finding, tried: Mapping[str, tuple[int | None, str]], now: int
) -> Finding:
    if not tried:
        return finding
    said = [
        f"{_WORDS[name]} {why if sent is None else format_bytes(sent)}"
        for name, (sent, why) in tried.items()
    ]
    alone = (sent for name, (sent, _) in tried.items() if sent is not None and name != _TOGETHER)
    best, least = min(alone, default=None), tried.get(_TOGETHER, (None, ""))[0]
    fix = f"{finding.fix}. The step, compiled, sends {format_bytes(now)} now; {'; '.join(said)}"
    if best is not None and min(best, least or best) >= now:
        fix += ": no less, so keep it as it is"
    return dataclasses.replace(finding, fix=fix, remaining=best)


def _send(bound: BoundSpec, change: Callable[[], "StepSpec"]) -> tuple[int | None, str]:
    """What a step sends with an alternative, in bytes, or why it cannot be had."""
    try:
        changed = BoundSpec(change(), bound.mesh)
        functions = CompiledFunctions(changed)
        program = build_program(changed, functions.layout, functions.train, ())
    except ShardkitError as error:
        return None, f"it is refused ({str(error).splitlines()[0]})"
    return program.ledger.total(), ""


def _change(
    bound: BoundSpec,
    layout: StepLayout,
    program: Program,
    finding: Finding,
    alternative: str,
    place: Any,
) -> "StepSpec":
    spec, strategy = bound.spec, bound.spec.strategy
    if alternative == "shard_map":
        return spec.replace(mode="shard_map")
    if alternative == "owners":
        return spec.replace(owners=True)
    if alternative == "end":
        return spec.replace(accumulate=Accumulate(spec.accumulate.micro_batches, reduce="end"))
    if alternative == FOLLOW:
        moments = program.own_layouts(finding.axes)
        rule = _first({leaf: own.spec for leaf, own in moments.items()}, strategy.opt_state)
        return spec.replace(strategy=dataclasses.replace(strategy, opt_state=rule))
    loss = spec.loss_fn if isinstance(spec.loss_fn, Loss) else Loss(spec.loss_fn, spec.loss_fn)
    if alternative in (AGREE, _TOGETHER, MOVE):
        odd = [one for one in program.declared.odd if one.declared_by in place]
        if alternative == MOVE:
            split = find_split_dim(finding, program.declared.split_dims)
            odd = [*split.declarations] if split else []
        train = loss.train
        for one in (one for one in odd if not one.leaves):
            train = _respecified(train, one, bound.mesh)
        changed = _with_specs(strategy, odd, bound, layout)
        return spec.replace(loss_fn=dataclasses.replace(loss, train=train), strategy=changed)
    sharding = NamedSharding(bound.mesh, PartitionSpec(layout.row_axes))
    fits = functools.partial(_makes_rows, source=finding.source, rows=layout.rows)
    train = _constrained(loss.train, fits, sharding)
    return spec.replace(loss_fn=dataclasses.replace(loss, train=train))


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
    changed: list[core.JaxprEqn] = []

    def change(eqn: core.JaxprEqn) -> core.JaxprEqn:
        aval: Any = eqn.outvars[0].aval
        if not _is_at(eqn, odd.source) or aval.shape != odd.shape:
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


def _makes_rows(eqn: core.JaxprEqn, source: Source | None, rows: int) -> bool:
    """Whether an equation of a line computes an activation, its rows in the first dim."""
    if source is None or not _is_at(eqn, source):
        return False
    if len(eqn.outvars) != 1 or any(True for _ in core.jaxprs_in_params(eqn.params)):
        return False
    aval: Any = eqn.outvars[0].aval
    floating = jnp.issubdtype(aval.dtype, jnp.floating)
    return floating and aval.ndim > 1 and aval.shape[0] == rows


def _is_at(eqn: core.JaxprEqn, line: Source) -> bool:
    made = source_of_equation(eqn)
    return made is not None and (made.file, made.line) == (line.file, line.line)


def _constrained(
    function: Callable[..., Any], fits: Callable[[core.JaxprEqn], bool], sharding: NamedSharding
) -> Callable[..., Any]:
    """A function in which the results of the last equation that fits, and its like, are split."""

    def run(*args: Any) -> Any:
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
