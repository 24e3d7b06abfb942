"""`SelfCheck`: what a step proved about itself, how far apart it was, and how far it may be."""

import dataclasses
from typing import Literal

from ..._core.errors import Problem, VerificationError, count, raise_all
from ..._core.io._table import Column, Table, text_width

Verdict = Literal["ok", "FAILED", "too noisy", "not checked"]

_FIXES = {
    "loss": (
        "step.replace(accumulate=1), mode='auto' or another mesh, to see whose loss differs; "
        "return sk.Mean(total, weight) where rows weigh differently"
    ),
    "rows": "return sk.Mean(total, weight) where rows weigh differently; no statistic of the batch",
    "gradient": (
        "another order of the batch axes, sk.nn.constrain on the activations around the leaf, or "
        "mode='shard_map'; where a custom_vjp of the loss means another gradient: "
        "TrainConfig(check='off')"
    ),
    "grad_norm": "sk.verify(spec, meshes=[mesh]) on a small model, which names the leaf",
    "copies": "no shard_map(check_vma=False) in the loss, or a psum over each axis it splits",
    "update": "take norms over whole gradients: no clipping inside shard_map",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One check of a compiled step.

    Attributes:
      name: `loss`, `rows`, `gradient`, `grad_norm`, `copies` or `update`.
      gap: relative difference of the two sides; for `copies` the number of leaves at fault.
      threshold: largest gap that passes.
      leaf: path and type of the worst leaf; "" where no leaf is at fault.
      why: for a check that failed, what differs; for one that was not made or is too noisy, the
        reason.
      verdict: `too noisy` where the measured noise exceeds what a wrong leaf would show, so that
        nothing can be said; `not checked` where the check does not apply to the step.
    """

    name: str
    gap: float
    threshold: float
    leaf: str = ""
    why: str = ""
    verdict: Verdict = "ok"

    @classmethod
    def of(
        cls, name: str, gap: float, threshold: float, *, leaf: str = "", why: str = ""
    ) -> "Check":
        """A check with its verdict; a gap that is not a number fails."""
        passed = gap <= threshold
        shown = ("", "") if passed else (leaf, why)
        return cls(name, gap, threshold, *shown, "ok" if passed else "FAILED")

    @classmethod
    def skipped(cls, name: str, why: str) -> "Check":
        """A check that does not apply."""
        return cls(name, float("nan"), float("nan"), why=why, verdict="not checked")

    @property
    def problem(self) -> Problem:
        """The failed check as a row of an error."""
        numbers = f"the gap is {self.gap:.1e}, at most {self.threshold:.1e} passes"
        why = f"{self.name}: {self.why}; {numbers}"
        return Problem(self.leaf or self.name, why, _FIXES[self.name])


@dataclasses.dataclass(frozen=True)
class SelfCheck:
    """The result of `step.self_check`.

    Attributes:
      checks: every check, in the order in which they were made.
      mesh: `data=2, tensor=4`.
      evaluations: forward passes of the loss; the gradient and the update are one more each.
      seconds: wall time, with compiling.
      compile_seconds: the part of it that compiled programs, which only the first call does.
    """

    checks: tuple[Check, ...]
    mesh: str
    evaluations: int
    seconds: float
    compile_seconds: float

    @property
    def ok(self) -> bool:
        """Whether no check failed. One that is too noisy proves nothing, and fails nothing."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.verdict == "FAILED")

    @property
    def worst_leaf(self) -> str:
        """Path and type of the leaf that the first failed check names; "" if none does."""
        return next((check.leaf for check in self.failed if check.leaf), "")

    def __getitem__(self, name: str) -> Check:
        """The check of a name."""
        return {check.name: check for check in self.checks}[name]

    def check(self) -> "SelfCheck":
        """Returns the result itself if it is ok.

        Raises:
          VerificationError: with every check that failed, its leaf, numbers and a fix.
        """
        headline = (
            f"The compiled step contradicts itself on mesh ({self.mesh}): "
            f"{count(len(self.failed), 'check')} of {len(self.checks)} failed."
        )
        raise_all(VerificationError, headline, [check.problem for check in self.failed])
        return self

    @property
    def line(self) -> str:
        """The result in one line, as a run prints it."""
        gradient = next((c for c in self.checks if c.name == "gradient"), None)
        parts = []
        if gradient and gradient.verdict != "not checked":
            parts = [f"gradient gap {gradient.gap:.1e} (at most {gradient.threshold:.1e})"]
        for verdict in ("FAILED", "too noisy", "not checked"):
            if names := [c.name for c in self.checks if c.verdict == verdict]:
                parts.append(f"{', '.join(names)} {verdict}")
        word = "ok" if self.ok else "FAILED"
        return (
            f"{word}: {'; '.join(parts)}; {self.evaluations} evaluations in {self.seconds:.1f} s, "
            f"{self.compile_seconds:.1f} s of it compiling"
        )

    def __str__(self) -> str:
        """A table of at most 100 columns, and the line below it."""
        gap, most = Column("gap", right=True), Column("at most", right=True)
        columns = ["check", gap, most, "", "leaf", "why"]
        table = Table(columns, [_cells(check) for check in self.checks], indent=2)
        return f"self check on mesh ({self.mesh})\n{table.to_text(text_width())}\n{self.line}"


def _cells(check: Check) -> tuple[str, ...]:
    known = check.gap == check.gap
    numbers = (f"{check.gap:.1e}", f"{check.threshold:.1e}") if known else ("", "")
    return check.name, *numbers, check.verdict, check.leaf, check.why
