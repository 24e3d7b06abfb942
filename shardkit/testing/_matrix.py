"""The kill matrix: which check of the certificate finds which injected bug."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from .._core.errors import Problem, VerificationError, count, format_problems
from .._core.io._table import Table
from .._core.types import Accumulate
from ..parity import (
    ParityReport,
    Row,
    Standard,
    StepFactory,
    Trial,
    made_up,
    one_device,
    step_factory,
)
from ..step import CompiledStep, StepSpec
from .mutations import MUTATIONS, Mutation


@dataclasses.dataclass(frozen=True)
class Killed:
    """What became of one mutation.

    Attributes:
      mutation: the bug.
      failed: rows of the certificate that failed.
    """

    mutation: Mutation
    failed: tuple[Row, ...]

    @property
    def checks(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(row.check for row in self.failed)

    @property
    def missed(self) -> tuple[str, ...]:
        """Names of the checks that must find the bug and have not."""
        return tuple(check for check in self.mutation.killed_by if check not in self.checks)

    @property
    def ok(self) -> bool:
        """Whether every check that must find the bug has found it."""
        return not self.missed


@dataclasses.dataclass(frozen=True)
class KillMatrix:
    """The certificates of mutated steps, and of the step itself.

    Attributes:
      control: certificate of the step without a mutation, which must be ok.
      rows: one per mutation.
    """

    control: ParityReport
    rows: tuple[Killed, ...]

    @property
    def ok(self) -> bool:
        """Whether the step itself passes and every mutation is found by its check."""
        return self.control.ok and all(row.ok for row in self.rows)

    def check(self) -> "KillMatrix":
        """Returns the matrix itself if it is ok.

        Raises:
          VerificationError: the step itself fails, or with every mutation that survives.
        """
        self.control.check()
        problems = [
            Problem(row.mutation.name, f"{row.mutation.what}: {_survived(row)}", _FIX)
            for row in self.rows
            if not row.ok
        ]
        if problems:
            found = f"{count(len(problems), 'mutation')} of {len(self.rows)} not killed."
            raise VerificationError(format_problems(found, problems))
        return self

    def __str__(self) -> str:
        """A table of at most 100 columns."""
        verdict = "passes" if self.control.ok else "FAILS"
        rows = []
        for row in self.rows:
            must = row.mutation.killed_by
            others = [check for check in row.checks if check not in must]
            more = f" (also {', '.join(others)})" if others else ""
            mark = "killed" if row.ok else "SURVIVES"
            rows.append((row.mutation.name, mark, f"by {', '.join(must)}{more}"))
        table = Table(("", "", ""), rows).to_text(100)
        killed = f"{sum(row.ok for row in self.rows)} of {len(self.rows)} mutations killed."
        return "\n".join([f"without a mutation: {verdict}", table, killed])


_FIX = "a mesh that splits batch and parameters, unequal weights and dropout in the batches"


def kill_matrix(
    spec: StepSpec | StepFactory,
    mesh: Mesh,
    *,
    batches: Sequence[Any] | None = None,
    steps: int = 3,
    mutations: Sequence[Mutation] = MUTATIONS,
) -> KillMatrix:
    """Injects each mutation into the step and says which checks of the certificate find it.

    The step is compiled with two micro-batches if it has one, so that lanes and their reduction
    are there to be broken; not where an override has micro-batches of its own.

    Args:
      spec: the step, or a function that compiles it for a mesh, as for `sk.verify`. Its loss has
        no mutable state.
      mesh: splits rows and some parameters; otherwise some mutations change nothing and survive.
      batches: as for `sk.verify`; their rows of unequal weight, and the loss with dropout, or
        the mutations of weights and keys survive.
      steps: updates with the declared optimizer.
      mutations: which to inject. Of the checks that take a compilation of their own, only those
        that must find the bug are made.
    """
    compiled = step_factory(spec)
    one = compiled(one_device(mesh))
    trial = Trial(made_up(one) if batches is None else batches, steps, jax.random.key(0))
    step = compiled(mesh)
    overrides = [override for _, override in step.spec.strategy.overrides]
    split_already = any(override.incompatibilities(Accumulate(2), False) for override in overrides)
    if step.spec.accumulate.micro_batches == 1 and not split_already:
        step = step.replace(accumulate=2)
    plain = one.spec.replace(accumulate=step.spec.accumulate)
    standard = Standard(plain, one.mesh.devices.flat[0], trial)
    control = ParityReport(tuple(standard.rows(step)), standard.title)
    return KillMatrix(control, tuple(_killed(standard, step, mutations)))


def _killed(
    standard: Standard, step: CompiledStep, mutations: Sequence[Mutation]
) -> Iterator[Killed]:
    for mutation in mutations:
        with mutation.apply():
            rows = standard.rows(step.replace(), mutation.killed_by)
        yield Killed(mutation, tuple(row for row in rows if not row.ok))


def _survived(row: Killed) -> str:
    found = ", ".join(row.checks)
    return f"not found by {', '.join(row.missed)}" + (f", only by {found}" if found else "")
