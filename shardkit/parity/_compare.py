"""Compares the record of a mesh with the reference: errors by leaf, and their thresholds.

The error of a leaf is normwise: its largest difference over its largest magnitude. A leaf that is
zero up to rounding has no scale of its own, so the scale of a leaf is at least a hundredth of the
largest magnitude in its tree. Metrics are each a tree of their own.

A metric that counts rows, as an accuracy does, moves by whole rows: a row near a tie of its logits
flips in one program and in none of a few nudges. So metrics may be as far from the reference as
nudges of `MARGIN` roundings bring them, which is `MARGIN` times the noise of one that is smooth.

A gradient that a nudge changes by more than half of its size is zero up to rounding, as that of a
bias in front of a BatchNorm. Its noise is its own: it neither widens the thresholds of the other
leaves, nor is held to theirs. Adam divides it by its size, so what the steps make of its parameter
is held to the noise alone. So is a leaf of a later state that a nudge changes by more than half, as
in bf16 an adapter that starts at zero: after one update each element is plus or minus the rate.

Where rounding is coarse (bf16), that error cannot tell a gradient from one a tenth larger. So the
projection of each leaf on the reference is compared too: in it the rounding of elements averages
out.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .._core.errors import count
from ._observe import Observation
from ._parity_report import ParityRow
from ._record import (
    AFTER_STEPS,
    COUNTERS,
    GRADIENTS,
    INIT,
    NO_GRADIENTS,
    NUMBERS,
    SCALARS,
    Leaves,
    Record,
)

# Measured on the reference decoder: correct meshes stay within 2 times the noise of a nudge.
MARGIN = 8
_MIN_SCALE = 1e-2
# Largest deviation of a projection from 1. Measured in bf16, 6e-3 between correct meshes.
_MAX_SCALING = 0.08
# A leaf whose projection a nudge changes by this much is zero up to rounding.
_ROUNDING = 0.5


@dataclasses.dataclass(frozen=True)
class ErrorLimits:
    """The range of thresholds, in multiples of one rounding of the compute dtype (f32: 1.2e-7)."""

    min_threshold: float  # where no noise was measured: 8 roundings
    max_threshold: float  # however large the noise: 84 roundings, 1e-5 in f32
    max_with_gradients: (
        float  # the same of what gradients decide, which have roundings of their own
    )
    # the same after steps of the declared optimizer, and for a scalar (a metric, an evaluation)
    # whose noise is above 1 %. Adam divides a gradient by its own magnitude, so an element that is
    # zero up to rounding moves by the whole learning rate.
    max_after_steps: float

    @classmethod
    def of(cls, dtype: DTypeLike, reduce_dtype: DTypeLike | None = None) -> "ErrorLimits":
        """Limits of a compute dtype, and of the one that gradients are summed in, if it is another.

        Never so wide that a gradient of half the size passes.
        """
        eps, reduced = (float(jnp.finfo(d).eps) for d in (dtype, reduce_dtype or dtype))
        return cls(8 * eps, min(84 * eps, 0.25), min(84 * max(eps, reduced), 0.25), 0.25)

    def threshold(self, check: str, noise: float, *, vanishing: bool = False) -> float:
        """`MARGIN` times the noise, clamped to the range of the check.

        What is zero up to rounding has no upper limit: a scalar, and after steps a leaf whose
        gradient is `vanishing`; that gradient itself has the limit of what is after steps.
        In f32 (eps 1.2e-7), for gradients: noise 0 gives 9.5e-7, noise 5e-7 gives 4e-6, and
        noise 1 gives 1e-5.
        """
        after = check in AFTER_STEPS
        own = self.max_threshold if check in NO_GRADIENTS else self.max_with_gradients
        limit = self.max_after_steps if after or vanishing else own
        if after and vanishing and noise < np.inf:
            limit = np.inf
        if check in SCALARS and _MIN_SCALE < noise < np.inf:
            # Above `_ROUNDING` a scalar is zero up to rounding, and any value near zero is right.
            return (
                MARGIN * noise if noise > _ROUNDING else min(self.max_after_steps, MARGIN * noise)
            )
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
            gap = _max_abs(_to_wide(actual) - _to_wide(expected))
            scale = max(_max_abs(expected), _MIN_SCALE * largest)
            errors[path] = gap / scale if scale else gap
    return errors


def find_worst_leaf(leaves: Leaves, reference: Leaves) -> tuple[str, float]:
    """Returns the path of the leaf with the largest error, and that error."""
    errors = compute_errors(leaves, reference)
    path = max(errors, key=errors.__getitem__, default="")
    return path, errors.get(path, 0.0)


def compute_scaling(leaf: np.ndarray | None, reference: np.ndarray) -> float:
    """The factor by which the reference is nearest to a leaf; NaN if there is none.

    >>> import numpy as np
    >>> compute_scaling(np.array([2.0, 4.0, 0.1]), np.array([1.0, 2.0, 0.0]))
    2.0
    """
    if leaf is None or leaf.shape != reference.shape or not reference.any():
        return np.nan
    x, y = np.ravel(_to_wide(leaf)), np.ravel(_to_wide(reference))
    return float((np.vdot(y, x) / np.vdot(y, y)).real)


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
    *,
    wide_records: Sequence[Record] = (),
) -> list[ParityRow]:
    """Builds the rows of one mesh, named as text.

    The records are from one device: the reference, and some with every parameter nudged by one
    rounding, or by `MARGIN` of them for `wide_records`, which metrics may be as far away as.
    """
    record = observed.record
    unequal = find_unequal_leaves(record[INIT], reference[INIT])
    why = "differs in bits from one device"
    rows = [
        _count_row(mesh, "layout", observed.misplaced_leaves),
        _count_row(mesh, INIT, [(path, why) for path in unequal]),
    ]
    vanishing = find_vanishing_gradients(reference, noise_records)
    for check in NUMBERS:
        if check in record and reference.get(check):
            nudged = [noise_record[check] for noise_record in noise_records]
            pair = record[check], reference[check]
            if check in SCALARS:
                wide = [wide_record[check] for wide_record in wide_records]
                candidates = _compare_scalars(check, *pair, (nudged, wide), limits)
            else:
                candidates = _compare_leaves(check, *pair, nudged, limits, vanishing=vanishing)
            # A NaN has an infinite error, which must not stand behind what passes.
            worst = max(candidates, key=lambda row: (not row.ok, row.error / row.threshold))
            rows.append(dataclasses.replace(worst, mesh=mesh))
    if COUNTERS in record:
        rows.append(_count_row(mesh, COUNTERS, _miscounted(record, reference, noise_records)))
    rows.append(_count_row(mesh, "copies", observed.differing_copies))
    if observed.later_calls:
        programs = observed.later_compiles
        why = f"{count(observed.later_calls, 'later call')} compiled {count(programs, 'program')}"
        why = why if programs else ""
        rows.append(ParityRow(mesh, "compiles once", leaf="", error=programs, why=why))
    return rows


def find_vanishing_gradients(reference: Record, noise_records: Sequence[Record]) -> list[str]:
    """Returns the paths of the parameters whose gradient is zero up to rounding.

    >>> import numpy as np
    >>> reference = {GRADIENTS: {"w": np.array([1.0, 2.0]), "b": np.array([1e-9, -2e-9])}}
    >>> nudged = {GRADIENTS: {"w": np.array([1.0, 2.1]), "b": np.array([-1e-9, 1e-9])}}
    >>> find_vanishing_gradients(reference, [nudged])
    ['b']
    """
    return [
        path
        for path, expected in reference.get(GRADIENTS, {}).items()
        if any(
            _max_abs(_to_wide(x[GRADIENTS][path]) - _to_wide(expected))
            > _ROUNDING * _max_abs(expected)
            for x in noise_records
        )
    ]


def _compare_scalars(
    check: str,
    leaves: Leaves,
    reference: Leaves,
    nudged: tuple[Sequence[Leaves], Sequence[Leaves]],
    limits: ErrorLimits,
) -> Iterator[ParityRow]:
    """Yields a row of each, without its mesh; `nudged` are by one rounding, and by `MARGIN`."""
    for path in {**reference, **leaves}:
        actual, expected = ({p: x for p, x in t.items() if p == path} for t in (leaves, reference))

        def move(tree: Leaves, path: str = path, expected: Leaves = expected) -> float:
            return find_worst_leaf({p: x for p, x in tree.items() if p == path}, expected)[1]

        noise, reach = (max(map(move, trees), default=0.0) for trees in nudged)
        row = _number_row(check, path, actual, expected, noise=noise, limits=limits)
        reach = reach if reach < np.inf else 0.0
        yield dataclasses.replace(row, threshold=max(row.threshold, reach))


def _compare_leaves(
    check: str,
    leaves: Leaves,
    reference: Leaves,
    nudged: Sequence[Leaves],
    limits: ErrorLimits,
    *,
    vanishing: Sequence[str],
) -> Iterator[ParityRow]:
    """Yields rows without their mesh: of the worst leaf, and of each that is zero up to rounding.

    Each leaf has a row of its own where rounding is coarse. `vanishing` are paths of parameters;
    their leaves of a state end with these.
    """
    errors, noises = compute_errors(leaves, reference), {path: 0.0 for path in reference}
    for x in nudged:
        noises.update(
            {p: max(noises.get(p, 0.0), e) for p, e in compute_errors(x, reference).items()}
        )
    own = {
        path
        for path in reference
        if any(path == name or path.endswith(f"/{name}") for name in vanishing)
        or (check in AFTER_STEPS and _ROUNDING < noises[path] < np.inf)
    }
    noise = max((n for path, n in noises.items() if path not in own), default=0.0)
    common = {path: error for path, error in errors.items() if path not in own}
    if common:
        worst = max(common, key=common.__getitem__)
        yield _number_row(check, worst, leaves, reference, noise=noise, limits=limits)
    for path in own:
        yield _number_row(
            check,
            path,
            leaves,
            reference,
            noise=max(noise, noises[path]),
            limits=limits,
            vanishing=True,
        )
    if check == GRADIENTS and limits.threshold(check, noise) > _MAX_SCALING:
        for path, expected in reference.items():
            noise = max(abs(compute_scaling(x.get(path), expected) - 1) for x in nudged)
            scaling = compute_scaling(leaves.get(path), expected)
            if noise < _ROUNDING and not np.isnan(scaling):
                error = abs(scaling - 1)
                yield ParityRow(
                    "",
                    check,
                    path,
                    error=error,
                    noise=noise,
                    threshold=_MAX_SCALING,
                    scaling=scaling,
                )


def _number_row(
    check: str,
    path: str,
    leaves: Leaves,
    reference: Leaves,
    *,
    noise: float,
    limits: ErrorLimits,
    vanishing: bool = False,
) -> ParityRow:
    error = compute_errors(leaves, reference).get(path, 0.0)
    scaling = compute_scaling(leaves.get(path), reference[path]) if path in reference else np.nan
    threshold = limits.threshold(check, noise, vanishing=vanishing)
    return ParityRow(
        "", check, path, error=error, noise=noise, threshold=threshold, scaling=scaling
    )


def _miscounted(
    record: Record, reference: Record, noise_records: Sequence[Record]
) -> list[tuple[str, str]]:
    """The counters that differ, as (path, why), but for those that a nudge changes as well."""
    expected = reference[COUNTERS]
    exact = {
        path: x
        for path, x in expected.items()
        if all(np.array_equal(x, nudged[COUNTERS][path]) for nudged in noise_records)
    }
    return [
        (path, f"is {record[COUNTERS].get(path)} after the last step, {x} on one device")
        for path, x in exact.items()
        if not np.array_equal(x, record[COUNTERS].get(path, np.zeros(0)))
    ]


def _count_row(mesh: str, check: str, failures: Sequence[tuple[str, str]]) -> ParityRow:
    """The row of a check that counts leaves at fault, given as (path, why)."""
    leaf, why = failures[0] if failures else ("", "")
    others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return ParityRow(mesh, check, leaf, error=len(failures), why=why + others)


def _to_wide(x: np.ndarray) -> np.ndarray:
    """To f64; complex values to c128."""
    return x.astype(np.promote_types(x.dtype, np.float64))


def _is_finite(x: np.ndarray) -> bool:
    return bool(np.isfinite(_to_wide(x)).all())


def _max_abs(x: np.ndarray) -> float:
    return float(np.abs(_to_wide(x)).max()) if x.size else 0.0
