"""Builds the report of a step."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr

from ..report import PlacedLeaf, Report, phase_of
from ._bound_spec import BoundSpec
from ._compiled_functions import CompiledFunctions
from ._idle_options import find_idle_options
from ._param_uses import find_param_uses
from ._report import build_program
from ._tried_fixes import try_fixed

if TYPE_CHECKING:
    from ..hardware import Chip


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
    return try_fixed(report, bound, functions.layout, program) if try_fixes else report


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
