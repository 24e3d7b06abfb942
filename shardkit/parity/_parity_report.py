"""`ParityReport`: what was compared, with which error, noise and threshold."""

import dataclasses
import itertools
import math

from .._core.errors import Problem, VerificationError, count, format_problems
from .._core.io._notebook import text_html
from .._core.io._table import Column, Table, text_width

_NUMBERS = [Column(name, right=True) for name in ("error", "noise", "threshold")]


@dataclasses.dataclass(frozen=True)
class ParityRow:
    """One check on one mesh.

    Attributes:
      mesh: `(data=2, tensor=4)`.
      check: what was compared.
      leaf: path of the worst leaf; "" if no leaf is at fault.
      error: of that leaf: its largest difference over its largest magnitude. For `layout`, `init`,
        `copies` and `compiles once`: the number of leaves or programs at fault.
      noise: the same measure between two correct runs; None for checks that count.
      threshold: largest error that passes.
      why: what is wrong, for checks that count.
      scaling: the factor by which the reference is nearest to that leaf; NaN if there is none.
    """

    mesh: str
    check: str
    leaf: str
    error: float
    noise: float | None = None
    threshold: float = 0.0
    why: str = ""
    scaling: float = math.nan

    @property
    def ok(self) -> bool:
        """Whether the error is within the threshold; NaN is not."""
        return self.error <= self.threshold

    def cells(self) -> tuple[str, ...]:
        """The row as text, by column: check, worst leaf, error, noise, threshold, verdict."""
        verdict = "ok" if self.ok else "FAILED"
        if self.noise is None:  # leaves or programs at fault are counted
            return self.check, self.leaf, f"{self.error:g}", "", f"{self.threshold:g}", verdict
        numbers = map(format_error, (self.error, self.noise, self.threshold))
        return self.check, self.leaf, *numbers, verdict


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """The result of `sk.verify`.

    Attributes:
      rows: every check on every mesh.
      title: what was run, in one line.
      causes: (mesh, likely kind of fault) of each mesh on which checks failed.
    """

    rows: tuple[ParityRow, ...]
    title: str
    causes: tuple[tuple[str, str], ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every row passed and there is at least one."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def failed(self) -> tuple[ParityRow, ...]:
        """The rows that did not pass."""
        return tuple(row for row in self.rows if not row.ok)

    def check(self) -> "ParityReport":
        """Returns the report itself if it is ok.

        Raises:
          VerificationError: with every row that failed.
        """
        if self.ok:
            return self
        problems = [
            Problem(f"{row.mesh} {row.check}", _explain_failure(row), _FIXES[row.check])
            for row in self.failed
        ]
        n = len({row.mesh for row in self.failed})
        headline = f"{count(len(problems), 'check')} failed on {n} of {self._mesh_count} meshes."
        problems = [*(Problem(mesh, f"likely: {why}") for mesh, why in self.causes), *problems]
        raise VerificationError(format_problems(headline, problems))

    @property
    def _mesh_count(self) -> int:
        return len({row.mesh for row in self.rows})

    def __repr__(self) -> str:
        passed = len(self.rows) - len(self.failed)
        meshes = count(self._mesh_count, "mesh")
        return f"ParityReport({passed} of {len(self.rows)} checks passed on {meshes})"

    def _repr_html_(self) -> str:
        return text_html(str(self))

    def __str__(self) -> str:
        """A table of at most 100 columns, one block of rows per mesh."""
        rows: list[tuple[str, ...] | str] = []
        for mesh, mesh_rows in itertools.groupby(self.rows, key=lambda row: row.mesh):
            rows += [mesh, *(row.cells() for row in mesh_rows)]
        table = Table(["check", "worst leaf", *_NUMBERS, ""], rows, indent=2)
        lines = [self.title, table.to_text(text_width())]
        passed = len(self.rows) - len(self.failed)
        verdict = "every mesh equals one device" if self.ok else "NOT equal to one device"
        lines += [f"{mesh} likely: {why}" for mesh, why in self.causes]
        lines.append(f"{passed} of {len(self.rows)} checks passed: {verdict}.")
        return "\n".join(lines)


def format_error(x: float) -> str:
    """Formats a relative error as `1.2e-07`; as `0` if nothing differs.

    >>> format_error(1.0), format_error(0.99999), format_error(0.0)
    ('1.0e+00', '1.0e+00', '0')
    """
    return f"{x:.1e}" if x else "0"


def _explain_failure(row: ParityRow) -> str:
    if row.why:
        return f"{row.leaf}: {row.why}" if row.leaf else row.why
    noise = "" if row.noise is None else f", {format_error(row.noise)} between correct runs"
    threshold = format_error(row.threshold)
    factor = f"; {row.scaling:.3g} times that of one device" if abs(row.scaling - 1) > 1e-3 else ""
    return f"{row.leaf} is off by {format_error(row.error)}; at most {threshold}{noise}{factor}"


_GRADIENTS = "compare step.gradients(state, batch)[1] of the mesh with that of one device"
_WEIGHTS = "return sk.Mean(total, weight) if rows have different weights"
_NOISE = "draw noise from the key argument of the loss, not from a constant key"
_FIXES = {
    "layout": "print(sk.explain_rules(strategy.params, step.abstract_state.params, mesh))",
    "copies": "no shard_map(check_vma=False) in the loss, or a psum over each axis it splits",
    "init": "draw every parameter from the key argument of init: no device count, no axis_index",
    "loss": _WEIGHTS,
    "gradients": _GRADIENTS,
    "grad_norm": _GRADIENTS,
    "metrics": "return each metric as sk.Mean(total, weight)",
    "evaluate": _WEIGHTS,
    "sgd update": "compute norms of the global gradients: no clipping inside shard_map",
    "k-step loss": _NOISE,
    "k-step metrics": "return metrics of this step alone, each as sk.Mean(total, weight)",
    "k-step state": _NOISE,
    "k-step evaluate": "evaluate the state that the last step returned",
    "counters": "leave step, halted and key of the state as the step returned them",
    "compiles once": "return optimizer state with the shapes and dtypes of its input",
}
