"""How far two records are apart, and how far apart they may be.

The error of a leaf is normwise: its largest difference over its largest magnitude. A leaf that is
zero but for rounding has no magnitude of its own, so no leaf's is taken as less than a hundredth
of the largest one's of the same tree.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ._observe import Observed
from ._parity_report import Row
from ._record import INIT, LATER_LOSS, LATER_STATE, NUMBERS, Leaves, Record

# Measured on the reference decoder: correct meshes stay within 2 times the noise of a nudge.
MARGIN = 8
_LEAST_SCALE = 1e-2


@dataclasses.dataclass(frozen=True)
class Limits:
    """What decides a threshold, in units of one rounding of the compute dtype (f32: 1.2e-7).

    Attributes:
      least: threshold where no noise was measured: 8 roundings.
      most: no noise, however large, excuses more: 84 roundings, 1e-5 in f32.
      later: the same after steps of the declared optimizer. Adam divides a gradient by its own
        magnitude, so an element that is zero but for rounding moves by the whole learning rate.
    """

    least: float
    most: float
    later: float

    @classmethod
    def of(cls, dtype: Any) -> "Limits":
        """Limits of a compute dtype; never so wide that a gradient of half the size passes."""
        eps = float(jnp.finfo(dtype).eps)
        return cls(8 * eps, min(84 * eps, 0.25), 0.25)

    def threshold(self, check: str, noise: float) -> float:
        """`MARGIN` times the noise, within the limits of the check."""
        most = self.later if check in (LATER_LOSS, LATER_STATE) else self.most
        return min(most, max(self.least, MARGIN * noise))


def errors(found: Leaves, wanted: Leaves) -> dict[str, float]:
    """Error of each leaf; infinite where one is missing or is no number.

    >>> import numpy as np
    >>> errors({"w": np.array([1.0, 2.5])}, {"w": np.array([1.0, 2.0])})
    {'w': 0.25}
    """
    largest = max((_magnitude(x) for x in wanted.values()), default=0.0)
    out = {path: np.inf for path in found.keys() - wanted.keys()}
    for path, want in wanted.items():
        have = found.get(path)
        if have is None or have.shape != want.shape or not np.isfinite(_wide(have)).all():
            out[path] = np.inf
        elif want.size:
            gap = float(np.abs(_wide(have) - _wide(want)).max())
            scale = max(_magnitude(want), _LEAST_SCALE * largest)
            out[path] = gap / scale if scale else gap
    return out


def worst(found: Leaves, wanted: Leaves) -> tuple[str, float]:
    """The leaf with the largest error, and that error."""
    by_leaf = errors(found, wanted)
    path = max(by_leaf, key=by_leaf.__getitem__, default="")
    return path, by_leaf.get(path, 0.0)


def unequal(found: Leaves, wanted: Leaves) -> tuple[str, float]:
    """The first leaf that differs in any bit, and the number of such leaves."""
    bad = [p for p in wanted if p not in found or found[p].tobytes() != wanted[p].tobytes()]
    return (bad[0] if bad else ""), float(len(bad))


def compare(
    mesh: str, observed: Observed, reference: Record, noises: Sequence[Record], limits: Limits
) -> list[Row]:
    """Builds the rows of one mesh.

    Args:
      mesh: its axes and sizes.
      observed: what it told.
      reference: what one device told.
      noises: what one device told when its parameters were nudged by one rounding.
      limits: of the compute dtype.
    """
    record = observed.record
    first, differing = unequal(record[INIT], reference[INIT])
    why = f"differs in bits from one device's, as {number_of(differing)}" if differing else ""
    rows = [
        _counted(mesh, "layout", observed.misplaced),
        Row(mesh, INIT, first, differing, None, 0, why),
    ]
    for check in NUMBERS:
        if check not in record or not reference[check]:
            continue
        noise = max(worst(nudged[check], reference[check])[1] for nudged in noises)
        leaf, error = worst(record[check], reference[check])
        rows.append(Row(mesh, check, leaf, error, noise, limits.threshold(check, noise)))
    rows.append(_counted(mesh, "copies", observed.differing))
    if observed.calls:
        extra = observed.compiled
        why = f"{observed.calls} later calls compiled {extra} programs more" if extra else ""
        rows.append(Row(mesh, "compiles once", "", extra, None, 0, why))
    return rows


def number_of(n: float) -> str:
    """Returns `1 leaf does`, `2 leaves do`."""
    return "1 leaf does" if n == 1 else f"{int(n)} leaves do"


def _counted(mesh: str, check: str, found: Sequence[tuple[str, str]]) -> Row:
    leaf, why = found[0] if found else ("", "")
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return Row(mesh, check, leaf, len(found), None, 0, why + more)


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def _magnitude(x: np.ndarray) -> float:
    return float(np.abs(_wide(x)).max()) if x.size else 0.0
