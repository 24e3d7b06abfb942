"""Compares the record of a mesh with the reference: errors by leaf, and their thresholds.

The error of a leaf is normwise: its largest difference over its largest magnitude. A leaf that is
zero up to rounding has no scale of its own, so the scale of a leaf is at least a hundredth of the
largest magnitude in its tree.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .._core.errors import count
from ._observe import Observation
from ._parity_report import ParityRow
from ._record import INIT, LATER_LOSS, LATER_STATE, NUMBERS, Leaves, Record

# Measured on the reference decoder: correct meshes stay within 2 times the noise of a nudge.
MARGIN = 8
_MIN_SCALE = 1e-2


@dataclasses.dataclass(frozen=True)
class ErrorLimits:
    """The range of thresholds, in multiples of one rounding of the compute dtype (f32: 1.2e-7).

    Attributes:
      min_threshold: where no noise was measured: 8 roundings.
      max_threshold: however large the noise: 84 roundings, 1e-5 in f32.
      max_after_steps: the same after steps of the declared optimizer. Adam divides a gradient by
        its own magnitude, so an element that is zero up to rounding moves by the whole learning
        rate.
    """

    min_threshold: float
    max_threshold: float
    max_after_steps: float

    @classmethod
    def of(cls, dtype: DTypeLike) -> "ErrorLimits":
        """Limits of a compute dtype; never so wide that a gradient of half the size passes."""
        eps = float(jnp.finfo(dtype).eps)
        return cls(8 * eps, min(84 * eps, 0.25), 0.25)

    def threshold(self, check: str, noise: float) -> float:
        """`MARGIN` times the noise, clamped to the range of the check.

        In f32 (eps 1.2e-7), for gradients: noise 0 gives 9.5e-7, noise 5e-7 gives 4e-6, and
        noise 1 gives 1e-5.
        """
        after_steps = check in (LATER_LOSS, LATER_STATE)
        limit = self.max_after_steps if after_steps else self.max_threshold
        return min(limit, max(self.min_threshold, MARGIN * noise))


def compute_errors(leaves: Leaves, reference: Leaves) -> dict[str, float]:
    """Returns the error of each leaf: infinite if it is missing, misshapen or not finite.

    >>> import numpy as np
    >>> compute_errors({"w": np.array([1.0, 2.5])}, {"w": np.array([1.0, 2.0])})
    {'w': 0.25}
    """
    largest = max((_max_abs(x) for x in reference.values()), default=0.0)
    errors = {path: np.inf for path in leaves.keys() - reference.keys()}
    for path, expected in reference.items():
        actual = leaves.get(path)
        if actual is None or actual.shape != expected.shape or not _is_finite(actual):
            errors[path] = np.inf
        elif expected.size:
            gap = _max_abs(_to_f64(actual) - _to_f64(expected))
            scale = max(_max_abs(expected), _MIN_SCALE * largest)
            errors[path] = gap / scale if scale else gap
    return errors


def find_worst_leaf(leaves: Leaves, reference: Leaves) -> tuple[str, float]:
    """Returns the path of the leaf with the largest error, and that error."""
    errors = compute_errors(leaves, reference)
    path = max(errors, key=errors.__getitem__, default="")
    return path, errors.get(path, 0.0)


def find_unequal_leaves(leaves: Leaves, reference: Leaves) -> list[str]:
    """Returns the paths of the leaves that differ in any bit."""
    return [
        path
        for path, expected in reference.items()
        if path not in leaves or leaves[path].tobytes() != expected.tobytes()
    ]


def compare_with_reference(
    mesh: str,
    observed: Observation,
    reference: Record,
    noise_records: Sequence[Record],
    limits: ErrorLimits,
) -> list[ParityRow]:
    """Builds the rows of one mesh.

    Args:
      mesh: its axes and sizes, as text.
      observed: from the mesh.
      reference: from one device.
      noise_records: from one device, with every parameter nudged by one rounding.
      limits: of the compute dtype.
    """
    record = observed.record
    unequal = find_unequal_leaves(record[INIT], reference[INIT])
    why = "differs in bits from one device"
    rows = [
        _count_row(mesh, "layout", observed.misplaced_leaves),
        _count_row(mesh, INIT, [(path, why) for path in unequal]),
    ]
    for check in NUMBERS:
        if check not in record or not reference[check]:
            continue
        noise = max(find_worst_leaf(nudged[check], reference[check])[1] for nudged in noise_records)
        leaf, error = find_worst_leaf(record[check], reference[check])
        threshold = limits.threshold(check, noise)
        rows.append(ParityRow(mesh, check, leaf, error=error, noise=noise, threshold=threshold))
    rows.append(_count_row(mesh, "copies", observed.differing_copies))
    if observed.later_calls:
        programs = observed.later_compiles
        why = f"{count(observed.later_calls, 'later call')} compiled {count(programs, 'program')}"
        why = why if programs else ""
        rows.append(ParityRow(mesh, "compiles once", leaf="", error=programs, why=why))
    return rows


def _count_row(mesh: str, check: str, failures: Sequence[tuple[str, str]]) -> ParityRow:
    """The row of a check that counts leaves at fault, given as (path, why)."""
    leaf, why = failures[0] if failures else ("", "")
    others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return ParityRow(mesh, check, leaf, error=len(failures), why=why + others)


def _to_f64(x: np.ndarray) -> np.ndarray:
    """In f64, or in c128 where it is complex: a difference has an imaginary part too."""
    return x.astype(np.promote_types(x.dtype, np.float64))


def _is_finite(x: np.ndarray) -> bool:
    return bool(np.isfinite(_to_f64(x)).all())


def _max_abs(x: np.ndarray) -> float:
    return float(np.abs(_to_f64(x)).max()) if x.size else 0.0
