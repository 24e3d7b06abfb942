"""The kill matrix: which check of `sk.verify` finds which injected bug."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh

from .._core.errors import Problem, VerificationError, count, format_problems
from .._core.io._table import Table, text_width
from .._core.options import check_arguments
from .._core.types import Accumulate, Batch
from ..parity import (
    ParityInputs,
    ParityReport,
    ParityRow,
    ReferenceResults,
    StepFactory,
    as_step_factory,
    build_one_device_mesh,
    make_random_batches,
)
from ..step import CompiledStep, StepSpec
from .mutations import MUTATIONS, Mutation


@dataclasses.dataclass(frozen=True)
class MutationResult:
    """The checks that one injected mutation failed.

    Attributes:
      mutation: the bug.
      failed_rows: rows of the parity report that failed.
    """

    mutation: Mutation
    failed_rows: tuple[ParityRow, ...]

    @property
    def failed_checks(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(row.check for row in self.failed_rows)

    @property
    def missed_checks(self) -> tuple[str, ...]:
        """Names of the checks that must find the bug and did not."""
        return tuple(check for check in self.mutation.killed_by if check not in self.failed_checks)

    @property
    def ok(self) -> bool:
        """Whether every check that must find the bug did."""
        return not self.missed_checks


@dataclasses.dataclass(frozen=True)
class KillMatrix:
    """The parity reports of a step and of its mutations.

    Attributes:
      control: report of the step without a mutation, which must be ok.
      rows: one per mutation, in order.
    """

    control: ParityReport
    rows: tuple[MutationResult, ...]

    @property
    def ok(self) -> bool:
        """Whether the step itself passes and every mutation fails its checks."""
        return self.control.ok and all(row.ok for row in self.rows)

    def check(self) -> "KillMatrix":
        """Returns the matrix itself if it is ok.

        Raises:
          VerificationError: the step itself fails, or mutations survive; all are listed.
        """
        self.control.check()
        problems = [
            Problem(row.mutation.name, f"{row.mutation.what}: {_explain_survival(row)}", _FIX)
            for row in self.rows
            if not row.ok
        ]
        if problems:
            headline = f"{count(len(problems), 'mutation')} of {len(self.rows)} not killed."
            raise VerificationError(format_problems(headline, problems))
        return self

    def __str__(self) -> str:
        """A table of at most 100 columns."""
        verdict = "passes" if self.control.ok else "FAILS"
        rows = []
        for row in self.rows:
            required = row.mutation.killed_by
            others = [check for check in row.failed_checks if check not in required]
            also = f" (also {', '.join(others)})" if others else ""
            status = "killed" if row.ok else "SURVIVES"
            rows.append((row.mutation.name, status, f"by {', '.join(required)}{also}"))
        table = Table(("", "", ""), rows).to_text(text_width())
        killed = f"{sum(row.ok for row in self.rows)} of {len(self.rows)} mutations killed."
        return "\n".join([f"without a mutation: {verdict}", table, killed])


_FIX = "a mesh that splits batch and parameters, batches with unequal weights, and dropout"


def kill_matrix(
    spec: StepSpec | StepFactory,
    mesh: Mesh,
    *,
    batches: Sequence[Batch] | None = None,
    steps: int = 3,
    mutations: Sequence[Mutation] = MUTATIONS,
) -> KillMatrix:
    """Injects each mutation into the step and reports which checks of `sk.verify` find it.

    A step without micro-batches is compiled with two, so that there is a reduction over gradient
    shards to break; unless a strategy splits the batch into micro-batches of its own.

    Args:
      spec: the step, or a function that compiles it for a mesh, as for `sk.verify`. Its loss has
        no mutable state.
      mesh: must split rows and some parameters; otherwise some mutations change nothing and
        survive.
      batches: as for `sk.verify`. Without rows of unequal weight and a loss with dropout, the
        mutations of weights and keys survive.
      steps: updates with the declared optimizer.
      mutations: to inject. Of the checks that compile a program of their own, only those that must
        find the mutation run.
    """
    check_arguments(VerificationError, "No mutations can be injected.", steps=(steps, int))
    compile_for = as_step_factory(spec)
    # Mutations that break the mean of rows are to be found in the numbers, not refused.
    plain = compile_for(build_one_device_mesh(mesh)).replace(independent_rows=True)
    step = compile_for(mesh).replace(independent_rows=True)
    overrides = [override for _, override in step.spec.strategy.overrides]
    has_micro_batches = any(
        override.incompatibilities(Accumulate(2), False) for override in overrides
    )
    if step.spec.accumulate.micro_batches == 1 and not has_micro_batches:
        step = step.replace(accumulate=2)
    inputs = ParityInputs(
        make_random_batches(plain) if batches is None else batches, steps, jax.random.key(0)
    )
    plain_spec = plain.spec.replace(accumulate=step.spec.accumulate)
    device = plain.mesh.devices.flat[0]
    reference = ReferenceResults(plain_spec, device, inputs, plain.layout.row_dims)
    control = ParityReport(tuple(reference.compare(step)), reference.title)
    return KillMatrix(control, tuple(_run_mutations(reference, step, mutations)))


def _run_mutations(
    reference: ReferenceResults, step: CompiledStep, mutations: Sequence[Mutation]
) -> Iterator[MutationResult]:
    for mutation in mutations:
        with mutation.apply():
            rows = reference.compare(step.replace(), mutation.killed_by)
        yield MutationResult(mutation, tuple(row for row in rows if not row.ok))


def _explain_survival(row: MutationResult) -> str:
    only = f", only by {', '.join(row.failed_checks)}" if row.failed_checks else ""
    return f"not found by {', '.join(row.missed_checks)}{only}"
