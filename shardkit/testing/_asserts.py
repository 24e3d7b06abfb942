"""What a project asserts of its own steps, in its own tests."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from .._core.errors import BudgetError, Problem, count, raise_all
from ..mesh import MeshSpec
from ..parity import ParityReport, StepFactory, verify
from ..report import Budget, Ledger, LedgerRow, Report
from ..rules import format_mesh
from ..step import CompiledStep, StepSpec

Key = str | tuple[str, str]


def assert_matches_one_device(
    spec: StepSpec | StepFactory,
    mesh: Mesh | MeshSpec,
    *,
    batches: Sequence[Any] | None = None,
    steps: int = 3,
) -> ParityReport:
    """Asserts that a step gives on a mesh the numbers of one device.

    Args:
      spec: the step, or a function that compiles it for a mesh.
      mesh: the mesh, or a spec that is built from the first local devices.
      batches: host batches; by default made up, as `sk.verify` says.
      steps: updates with the declared optimizer.

    Returns:
      The certificate, for a look at errors and noise.

    Raises:
      VerificationError: with every check that failed and its worst leaf.
    """
    return verify(spec, [mesh], batches=batches, steps=steps).check()


def assert_collectives(step: CompiledStep | Report, expected: Mapping[Key, int]) -> None:
    """Asserts how often collectives run in one step, exactly, loops counted by their trips.

    A compiler may join several reductions into one: count what you have seen, or forbid with 0.

    Args:
      step: a compiled step, or its report.
      expected: number by mesh axis (`"tensor"`: every collective that spans it), by kind
        (`"all-gather"`), or by both (`("data", "all-reduce")`).

    Raises:
      BudgetError: with every number that is another one, and the collectives responsible.
      ReportError: there is no such axis or kind.
    """
    report = step if isinstance(step, Report) else step.report()
    problems = []
    for key, wanted in expected.items():
        rows = _rows(report.ledger, key)
        found = sum(row.trips or 1 for row in rows)
        if found != wanted:
            seen = "".join(f"\n      {row}" for row in rows)
            fix = f"{{{key!r}: {found}}}, if that is what the step should do"
            problems.append(
                Problem(f"collectives[{key!r}]", f"{wanted} expected, {found} found{seen}", fix)
            )
    problems += [Problem("ledger", f"cannot be counted: {why}") for why in report.ledger.problems]
    where = f"the step compiled for mesh {format_mesh(dict(report.mesh))}"
    raise_all(
        BudgetError, f"{count(len(problems), 'number')} not as expected in {where}.", problems
    )


def assert_within(step: CompiledStep | Report, budget: Budget) -> None:
    """Asserts that a step costs no more than a budget.

    Args:
      step: a compiled step, or its report.
      budget: the most that it may cost.

    Raises:
      BudgetError: with every part of the budget that is exceeded.
    """
    (step if isinstance(step, Report) else step.report()).check(budget)


def _rows(ledger: Ledger, key: Key) -> list[LedgerRow]:
    if isinstance(key, tuple):
        return ledger.where(*key)
    axes = [name for name, _ in ledger.mesh]
    return ledger.where(axis=key) if key in axes else ledger.where(kind=key)
