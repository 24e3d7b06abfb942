"""Holds a gradient to difference quotients of the loss, and finds the leaf that is off.

    L(p + v) - L(p - v)  =  ⟨g, (p + v) - (p - v)⟩  +  truncation  +  rounding

along one direction v in which every leaf has its part: all elements of a leaf move by the same
amount, up or down at random, and the amounts are such that each leaf's part of the difference is
about the same. One number then holds for all leaves: a leaf that is wrong by a fraction ε shows as
about ε / √L of the scale, the square root of the sum of the squared parts of L leaves.

The noise is measured. The truncation error grows with the cube of the step, a wrong gradient with
the step itself; so of the residuals e(h) and e(2h) of two steps, each over its step,

    r = (4 e(h) - e(2h)) / 3     is the error of the gradient,
    n = |e(h) - e(2h)| / 3       the truncation in e(h), and what rounding is left in it.

r passes below `floor` times the scale, or below n / 4 and the rounding where that is larger, but
never above `most` times the scale: then the check is too noisy and says so.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from ._result import Check

_CANDIDATES = 4
_TOO_NOISY = "the loss is too rough along this direction; floats of more bits would tell"


@dataclasses.dataclass(frozen=True)
class Limits:
    """Thresholds of a compute dtype, relative to the scale. See `docs/self_check.md`.

    Attributes:
      loss: two programs of one loss.
      floor: gradient gap that passes whatever the noise.
      most: gradient gap that no noise excuses.
      rounding: of the loss, relative: what one evaluation may be off by.
      update: of one update, relative to the change.
      least: gradients below this part of the largest one are not held to an update.
    """

    loss: float
    floor: float
    most: float
    rounding: float
    update: float
    least: float

    @classmethod
    def of(cls, dtype: str, *, lossy: bool) -> "Limits":
        """Limits of a compute dtype; `lossy` gradients are compressed, to a percent or so."""
        if jnp.finfo(dtype).eps < 1e-6 and not lossy:
            return cls(1e-5, 2e-3, 0.05, 1.2e-7, 1e-2, 1e-5)
        return cls(2e-2 if jnp.finfo(dtype).eps > 1e-6 else 1e-5, 0.1, 0.3, 1e-4, 0.3, 1e-2)


@dataclasses.dataclass
class Direction:
    """A direction in the space of all parameters.

    Attributes:
      seeds: u32[L], of the signs of each leaf.
      amounts: f32[L], how far the elements of each leaf move at step 1.
      norms: f32[L], of the gradient of each leaf.
      slopes: f32[L], ⟨g, signs⟩ of each leaf.
    """

    seeds: np.ndarray
    amounts: np.ndarray
    norms: np.ndarray
    slopes: np.ndarray

    def scale(self, step: float, leaves: Sequence[int] | slice = slice(None)) -> float:
        """What the leaves are expected to contribute to L(p+v) - L(p-v), root of squares."""
        parts = 2 * step * self.amounts[leaves] * self.norms[leaves]
        return float(np.sqrt(np.sum(np.square(parts.astype(np.float64)))))


def choose_direction(
    measure: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator, n: int
) -> Direction:
    """Chooses signs and amounts for every leaf.

    Args:
      measure: u32[L] seeds → f32[3, L]: rms of the parameters, norm of the gradient, ⟨g, signs⟩.
      rng: draws the seeds.
      n: number of leaves L.
    """
    seeds = rng.integers(0, 2**32, (_CANDIDATES, n), dtype=np.uint32)
    measured = np.stack([np.asarray(measure(row), np.float64) for row in seeds])
    rms, norms = measured[0, 0], measured[0, 1]
    # Of each leaf the candidate with the largest part, turned uphill: what is wrong by a factor
    # shows whatever the other leaves do, and never by chance as nothing.
    best = np.argmax(np.abs(measured[:, 2]), axis=0)
    dots = np.take_along_axis(measured[:, 2], best[None], 0)[0]
    signs = np.where(dots < 0, -1.0, 1.0)
    # A leaf that starts at zero moves as far as a small one of the others.
    usual = np.median(rms[rms > 0]) if (rms > 0).any() else 1.0
    reach = np.maximum(rms, 0.1 * usual)
    # Leaves with large parts move less, so that the small ones are not drowned: of parts
    # (8, 2, 1, 0.5) the first becomes 3, twice the median.
    parts = reach * norms
    cap = 2 * np.median(parts[parts > 0]) if (parts > 0).any() else 0.0
    factor = np.minimum(1.0, np.divide(cap, parts, out=np.ones_like(parts), where=parts > 0))
    chosen = np.take_along_axis(seeds, best[None], 0)[0]
    return Direction(chosen, (signs * reach * factor).astype(np.float32), norms, dots)


@dataclasses.dataclass
class GradientTest:
    """Difference quotients of one loss, one gradient and one direction.

    Attributes:
      direction: along which.
      loss: `amounts → L(p + v)`, one evaluation.
      predict: `amounts → f32[L]`, what each leaf adds to L(p+v) - L(p-v) by its gradient.
      limits: of the compute dtype.
      level: |L|, which the rounding of an evaluation is relative to.
    """

    direction: Direction
    loss: Callable[[np.ndarray], float]
    predict: Callable[[np.ndarray], np.ndarray]
    limits: Limits
    level: float

    def run(self) -> tuple[Check, float]:
        """Makes the check; returns it with the step that it took.

        Four evaluations; four more with another step where the noise of the first is too large.
        """
        # Textbook: the error of a difference quotient is least where rounding / h equals h²,
        # h in units of the parameters' size. Half of it: truncation is the larger for networks.
        unit = self.direction.scale(0.5)
        best = 0.5 * np.cbrt(self.limits.rounding * self.level / unit) if unit else 0.01
        step = float(np.clip(best, 1e-3, 0.1))
        check, truncated = self._attempt(step)
        if check.verdict == "too noisy":
            step = step / 4 if truncated else min(4 * step, 0.25)
            check, _ = self._attempt(step)
        return check, step

    def _attempt(self, step: float) -> tuple[Check, bool]:
        """The check with steps h and 2h, and whether truncation is most of its noise."""
        near, far = self._residual(step), self._residual(2 * step) / 2
        rounding = 4 * self.limits.rounding * self.level
        noise = abs(near - far) / 3
        scale = self.direction.scale(step) or max(abs(near), rounding)
        gap = abs(4 * near - far) / 3 / scale
        # r is free of the truncation that n measures; what is left of it is h² times smaller.
        needed = max(self.limits.floor, (noise / 4 + rounding) / scale)
        threshold = min(needed, self.limits.most)
        check = Check.of("gradient", gap, threshold)
        if not gap > needed and needed > self.limits.most:
            return dataclasses.replace(check, why=_TOO_NOISY, verdict="too noisy"), noise > rounding
        return check, noise > rounding

    def _residual(self, step: float, leaves: np.ndarray | None = None) -> float:
        amounts = step * self.direction.amounts
        if leaves is not None:
            amounts = np.where(leaves, amounts, 0).astype(np.float32)
        amounts = amounts.astype(np.float32)
        difference = self.loss(amounts) - self.loss(-amounts)
        return difference - float(np.sum(self.predict(amounts), dtype=np.float64))

    def worst_leaf(self, step: float, threshold: float) -> tuple[int | None, float]:
        """Bisects over the leaves; returns the one that is most off, and its own gap.

        Each half costs two evaluations: 2 log2(L) halves for one wrong leaf. Of several wrong
        ones the half that is further off is followed.
        """
        n = len(self.direction.amounts)
        held, gap = np.ones(n, bool), np.inf
        while held.sum() > 1:
            members = np.flatnonzero(held)
            halves = []
            for part in np.array_split(members, 2):
                mask = np.zeros(n, bool)
                mask[part] = True
                halves.append((abs(self._residual(step, mask)), mask))
            error, held = max(halves, key=lambda half: half[0])
            if not error > threshold * self.direction.scale(step):
                return None, error
        index = int(np.flatnonzero(held)[0])
        own = self.direction.scale(step, [index])
        error = abs(self._residual(step, held))
        gap = error / own if own else np.inf
        return index, gap
