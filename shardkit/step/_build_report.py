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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._core.equations import source_of_equation
from .._core.errors import ShardkitError, StepError
from .._core.own_sharding import CONSTRAINT
from .._core.rewriting import rewrite
from .._core.source import Source
from .._core.tracing import equations
from .._core.tree import format_bytes, list_leaves
from .._core.types import Accumulate
from ..nn._constrain import constrain_p
from ..parallel import Strategy
from ..report import AGREE, Finding, OddDeclaration, Report, find_blamed
from ..rules import PathRules, first_match
from ._bound_spec import BoundSpec
from ._compiled_functions import CompiledFunctions
from ._idle_options import find_idle_options
from ._layout import StepLayout
from ._objective import Loss
from ._report import build_program

if TYPE_CHECKING:
    from ..hardware import Chip
    from ._spec import StepSpec

CONSTRAIN = "constrain"
_WORDS = {
    CONSTRAIN: "with this constraint",
    AGREE: "with this layout",
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
    report = Report.of(dataclasses.replace(program, declared=declared), chip=chip)
    return _try_fixes(report, bound, functions.layout, declared.odd) if try_fixes else report


def _try_fixes(
    report: Report, bound: BoundSpec, layout: StepLayout, odd: Sequence[OddDeclaration]
) -> Report:
    """Returns a report whose findings say what their alternatives send, compiled.

    Each alternative is compiled once, however many findings name it. Findings that name none stay.
    """
    outcomes: dict[tuple[str, Source | None], tuple[int | None, str]] = {}
    findings = []
    for finding in report.findings:
        tried = {}
        for name in finding.alternatives:
            blamed = find_blamed(finding, report.ledger, odd) if name == AGREE else None
            place = blamed.source if blamed else finding.source
            key = name, place if name in (CONSTRAIN, AGREE) else None
            if key not in outcomes:
                change = functools.partial(_change, bound, layout, blamed, *key)
                outcomes[key] = _send(bound, change)
            tried[name] = outcomes[key]
        findings.append(_add_outcomes(finding, tried, report.ledger.total()))
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
    known = [sent for sent, _ in tried.values() if sent is not None]
    fix = f"{finding.fix}. The step, compiled, sends {format_bytes(now)} now; {'; '.join(said)}"
    return dataclasses.replace(finding, fix=fix, remaining=min(known, default=None))


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
    odd: OddDeclaration | None,
    alternative: str,
    source: Source | None,
) -> "StepSpec":
    spec = bound.spec
    if alternative == "shard_map":
        return spec.replace(mode="shard_map")
    if alternative == "owners":
        return spec.replace(owners=True)
    if alternative == "end":
        return spec.replace(accumulate=Accumulate(spec.accumulate.micro_batches, reduce="end"))
    loss = spec.loss_fn if isinstance(spec.loss_fn, Loss) else Loss(spec.loss_fn, spec.loss_fn)
    if odd is not None:
        if odd.leaves:
            return spec.replace(strategy=_with_specs(spec.strategy, odd, bound, layout))
        train = _respecified(loss.train, odd, bound.mesh)
        return spec.replace(loss_fn=dataclasses.replace(loss, train=train))
    sharding = NamedSharding(bound.mesh, PartitionSpec(layout.row_axes))
    fits = functools.partial(_makes_rows, source=source, rows=layout.rows)
    train = _constrained(loss.train, fits, sharding)
    return spec.replace(loss_fn=dataclasses.replace(loss, train=train))


def _with_specs(
    strategy: Strategy, odd: OddDeclaration, bound: BoundSpec, layout: StepLayout
) -> Strategy:
    """A strategy that lays some leaves out as all other declarations do."""
    spec = _to_spec(odd.dims(dict(bound.mesh.shape)))
    rules: dict[str, Any] = {leaf.leaf.path: spec for leaf in odd.leaves}
    if odd.leaves[0].part == "params":
        rule = first_match(PathRules(rules), strategy.params)
        return dataclasses.replace(strategy, params=rule)
    leaves = list_leaves(layout.batch)
    shardings = jax.tree.leaves(layout.batch_shardings)
    known = {leaf.path: s.spec for leaf, s in zip(leaves, shardings, strict=True)}
    return dataclasses.replace(strategy, batch=PathRules(known | rules))


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
