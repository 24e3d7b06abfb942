"""Assertions about steps, for the tests of a project that uses shardkit."""

from collections.abc import Mapping, Sequence

from jax.sharding import Mesh

from .._core.errors import BudgetError, Problem, count, raise_all
from .._core.types import Batch
from ..mesh import MeshSpec
from ..parity import ParityReport, StepFactory, verify
from ..report import Budget, Ledger, LedgerRow, Report
from ..rules import format_mesh
from ..step import CompiledStep, StepSpec

CollectiveKey = str | tuple[str, str]


def assert_matches_one_device(
    spec: StepSpec | StepFactory,
    mesh: Mesh | MeshSpec,
    *,
    batches: Sequence[Batch] | None = None,
    steps: int = 3,
) -> ParityReport:
    """Asserts that a step gives the results of one device on a mesh.

    Args:
      spec: the step, or a function that compiles it for a mesh.
      mesh: the mesh, or a spec that is built from the first local devices.
      batches: host batches; random by default, as for `sk.verify`.
      steps: updates with the declared optimizer.

    Returns:
      The parity report, with all errors and noise.

    Raises:
      VerificationError: lists every check that failed and its worst leaf.
    """
    return verify(spec, [mesh], batches=batches, steps=steps).check()


def assert_collectives(step: CompiledStep | Report, expected: Mapping[CollectiveKey, int]) -> None:
    """Asserts the exact number of collectives in one step; those in loops count once per trip.

    A compiler can merge several reductions: expect the number that you observed, or 0.

    Args:
      step: a compiled step, or its report.
      expected: numbers by mesh axis (`"tensor"`: every collective that spans it), by kind
        (`"all-gather"`), or by both (`("data", "all-reduce")`).

    Raises:
      BudgetError: lists every number that differs, and the collectives that were counted.
      ReportError: there is no such axis or kind.
    """
    report = step if isinstance(step, Report) else step.report()
    problems = []
    for key, number in expected.items():
        rows = _select_rows(report.ledger, key)
        actual = sum(row.counted_trips for row in rows)
        if actual != number:
            counted = "".join(f"\n      {row}" for row in rows)
            why = f"{number} expected, {actual} found{counted}"
            fix = f"{{{key!r}: {actual}}}, if the step should run that many"
            problems.append(Problem(f"collectives[{key!r}]", why, fix))
    problems += [Problem("ledger", f"cannot be counted: {why}") for why in report.ledger.problems]
    where = f"the step compiled for mesh {format_mesh(dict(report.mesh))}"
    raise_all(
        BudgetError, f"{count(len(problems), 'number')} not as expected in {where}.", problems
    )


def assert_within(step: CompiledStep | Report, budget: Budget) -> None:
    """Asserts that a step stays within a budget.

    Args:
      step: a compiled step, or its report.
      budget: upper limits.

    Raises:
      BudgetError: lists every limit that is exceeded.
    """
    (step if isinstance(step, Report) else step.report()).check(budget)


def _select_rows(ledger: Ledger, key: CollectiveKey) -> list[LedgerRow]:
    if isinstance(key, tuple):
        return ledger.where(*key)
    axes = [name for name, _ in ledger.mesh]
    return ledger.where(axis=key) if key in axes else ledger.where(kind=key)
