"""`ParityReport`: what was compared, how far apart it was, and how far apart it may be."""

import dataclasses
import itertools

from .._core.errors import Problem, VerificationError, count, format_problems
from .._core.io._table import Column, Table

_WIDTH = 100
_NUMBERS = [Column(name, right=True) for name in ("error", "noise", "threshold")]


@dataclasses.dataclass(frozen=True)
class Row:
    """One check on one mesh.

    Attributes:
      mesh: `(data=2, tensor=4)`.
      check: what was compared.
      leaf: path of the worst leaf; "" where no leaf is at fault.
      error: of that leaf, relative: largest difference over largest magnitude; for `layout`,
        `copies` and `compiles once` the number of leaves or programs at fault.
      noise: the same measure between two correct runs, None where none is allowed.
      threshold: largest error that passes.
      why: what is wrong in words, for checks that do not compare numbers.
    """

    mesh: str
    check: str
    leaf: str
    error: float
    noise: float | None
    threshold: float
    why: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within the threshold; an error that is no number is not."""
        return self.error <= self.threshold

    def cells(self) -> tuple[str, ...]:
        """The row as text: check, worst leaf, error, noise, threshold, verdict."""
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
    """

    rows: tuple[Row, ...]
    title: str

    @property
    def ok(self) -> bool:
        """Whether every row passed; without a row nothing was proved."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that did not pass."""
        return tuple(row for row in self.rows if not row.ok)

    def check(self) -> "ParityReport":
        """Returns the certificate itself if it is ok.

        Raises:
          VerificationError: with every row that failed.
        """
        if self.ok:
            return self
        problems = [Problem(f"{r.mesh} {r.check}", _why(r), _FIXES[r.check]) for r in self.failed]
        n = len({row.mesh for row in self.failed})
        headline = f"{count(len(problems), 'check')} failed on {n} of {self._meshes} meshes."
        raise VerificationError(format_problems(headline, problems))

    @property
    def _meshes(self) -> int:
        return len({row.mesh for row in self.rows})

    def __str__(self) -> str:
        """A table of at most 100 columns, one block of rows per mesh."""
        rows: list[tuple[str, ...] | str] = []
        for mesh, of_mesh in itertools.groupby(self.rows, key=lambda row: row.mesh):
            rows += [mesh, *(row.cells() for row in of_mesh)]
        table = Table(["check", "worst leaf", *_NUMBERS, ""], rows, indent=2)
        lines = [self.title, table.to_text(_WIDTH)]
        passed = len(self.rows) - len(self.failed)
        verdict = "every mesh equals one device" if self.ok else "NOT equal to one device"
        lines.append(f"{passed} of {len(self.rows)} checks passed: {verdict}.")
        return "\n".join(lines)


def format_error(x: float) -> str:
    """Returns `1.2e-07`, the one form of a relative error; `0` where nothing differs.

    >>> format_error(1.0), format_error(0.99999), format_error(0.0)
    ('1.0e+00', '1.0e+00', '0')
    """
    return f"{x:.1e}" if x else "0"


def _why(row: Row) -> str:
    if row.why:
        return f"{row.leaf}: {row.why}" if row.leaf else row.why
    noise = "" if row.noise is None else f", {format_error(row.noise)} between correct runs"
    most = format_error(row.threshold)
    return f"{row.leaf} is off by {format_error(row.error)}; at most {most}{noise}"


_GRADIENTS = "compare step.gradients(state, batch)[1] of the mesh with that of one device"
_FIXES = {
    "layout": "print(sk.explain_rules(strategy.params, step.abstract_state.params, mesh))",
    "copies": "no shard_map(check_vma=False) in the loss, or a psum over each axis it splits",
    "init": "draw every parameter from init's key alone: no device count, no axis_index",
    "loss": "return sk.Mean(total, weight) where rows weigh differently",
    "gradients": _GRADIENTS,
    "grad_norm": _GRADIENTS,
    "metrics": "return each metric as sk.Mean(total, weight)",
    "evaluate": "return sk.Mean(total, weight) where rows weigh differently",
    "sgd update": "take norms over whole gradients: no clipping inside shard_map",
    "k-step loss": "draw noise from the key that the loss is given, never from a constant one",
    "k-step state": "draw noise from the key that the loss is given, never from a constant one",
    "compiles once": "return a state from the optimizer with the shapes and dtypes it was given",
}
