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
never above `most` times the scale. What does not pass is measured again with another step: two
equal errors are a wrong gradient, two different ones are noise, and the check says so.

A loss with corners, as the hardest of a batch has where another row becomes the hardest, has a
slope on each side of one, and the gradient is the one at the point. With b(h) = L(p + v) + L(p - v)
- 2 L(p), which grows with h² where the loss is smooth and with h along a corner, 4 b(h) - b(2h) is
about what corners add to a difference. They excuse as much: that is noise too.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from ._result import Check, Verdict

_CANDIDATES = 4
# Two measurements of one wrong gradient are this close, relative to the larger.
_AGREE = 0.25
_TOO_NOISY = "the loss is too rough along this direction; floats of more bits would tell"


@dataclasses.dataclass(frozen=True)
class Limits:
    """Thresholds of a compute dtype, relative to the scale. See `docs/self_check.md`."""

    loss: float  # two programs of one loss
    floor: float  # gradient gap that passes whatever the noise
    most: float  # gradient gap that no noise excuses
    rounding: float  # of the loss, relative: what one evaluation may be off by
    update: float  # of one update, relative to the change
    least: float  # gradients below this part of the largest one are not held to an update

    @classmethod
    def of(
        cls, compute_dtype: str, loss_dtype: str, *, lossy: bool, reduce_dtype: str | None = None
    ) -> "Limits":
        """Limits of a step that computes in one dtype, by a loss program in another.

        Gradients are `lossy` if they are compressed, which costs a percent or so. `reduce_dtype` is
        that of the sum over gradient shards, if it is not that of the parameters.
        """
        # A bf16 loss is off by a bf16 rounding over the root of the number of its terms.
        rounding = 1.2e-7 if jnp.finfo(loss_dtype).bits >= 32 else 2e-4
        is_low = jnp.finfo(compute_dtype).bits < 32
        rough = is_low or lossy
        # A leaf of one number is rounded on each shard and in each sum: in bf16 by 3.9e-3 at most.
        summed = 2 * float(jnp.finfo(reduce_dtype).eps) if reduce_dtype else 0.0
        return cls(
            loss=2e-2 if is_low else 1e-5,
            floor=0.1 if rough else max(2e-3, summed),
            most=0.3 if rough else 0.05,
            rounding=rounding,
            update=0.3 if rough else 1e-2,
            least=1e-2 if rough else 1e-5,
        )


@dataclasses.dataclass
class Direction:
    """A direction in the space of all parameters."""

    seeds: np.ndarray  # u32[L], of the signs of each leaf
    amounts: np.ndarray  # f32[L], how far the elements of each leaf move at step 1
    norms: np.ndarray  # f32[L], of the gradient of each leaf
    slopes: np.ndarray  # f32[L], ⟨g, signs⟩ of each leaf

    def scale(self, step: float, leaves: Sequence[int] | slice = slice(None)) -> float:
        """What the leaves are expected to contribute to L(p+v) - L(p-v), root of squares."""
        parts = 2 * step * self.amounts[leaves] * self.norms[leaves]
        return float(np.sqrt(np.sum(np.square(parts.astype(np.float64)))))


def choose_direction(
    measure: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator, n: int
) -> Direction:
    """Chooses signs and amounts for each of `n` leaves.

    `measure` is u32[n] seeds → f32[3, n]: rms of the parameters, norm of the gradient, ⟨g, signs⟩.
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


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """What two difference quotients, of steps h and 2h, say about a gradient."""

    step: float  # h
    error: float  # r over the scale, with its sign; a number that is not finite passes nothing
    needed: float  # largest |r| that the noise explains, or the floor
    truncates: bool  # whether truncation is most of the noise

    def passes(self, most: float) -> bool:
        """Whether the gradient is as right as can be told, and that can be told."""
        return abs(self.error) <= self.needed <= most

    def check(self, verdict: Verdict, most: float) -> Check:
        """The attempt as a check."""
        why = _TOO_NOISY if verdict == "too noisy" else ""
        threshold = min(self.needed, most)
        return Check("gradient", abs(self.error), threshold, why=why, verdict=verdict)


@dataclasses.dataclass
class GradientTest:
    """Difference quotients of one loss, one gradient and one direction."""

    direction: Direction  # along which
    loss: Callable[[np.ndarray], float]  # `amounts → L(p + v)`, one evaluation
    # `amounts → f32[L]`, what each leaf adds to L(p+v) - L(p-v) by its gradient
    predict: Callable[[np.ndarray], np.ndarray]
    limits: Limits  # of the compute dtype
    level: float  # |L|, which the rounding of an evaluation is relative to

    def run(self) -> tuple[Check, float]:
        """Makes the check; returns it with the step that it took.

        Four evaluations pass a right gradient. Four more, with another step, are made where the
        first do not pass: a wrong gradient is off by the same at every step, noise is not.
        """
        # Textbook: the error of a difference quotient is least where rounding / h equals h²,
        # h in units of the parameters' size. Half of it: truncation is the larger for networks.
        unit = self.direction.scale(0.5)
        best = 0.5 * np.cbrt(self.limits.rounding * self.level / unit) if unit else 0.01
        first = self._attempt(float(np.clip(best, 1e-3, 0.1)))
        if first.passes(self.limits.most):
            return first.check("ok", self.limits.most), first.step
        other = first.step / 3 if first.truncates else min(4 * first.step, 0.25)
        better, worse = sorted([first, self._attempt(other)], key=lambda a: a.needed)
        if better.passes(self.limits.most):
            return better.check("ok", self.limits.most), better.step
        largest = max(abs(better.error), abs(worse.error))
        agree = not abs(better.error - worse.error) > _AGREE * largest
        wrong = not abs(better.error) <= min(better.needed, self.limits.most)
        off = abs(better.error) * self.direction.scale(better.step)
        failed = agree and wrong and not off <= self._corners(better.step)
        verdict = "FAILED" if failed else "too noisy"
        return better.check(verdict, self.limits.most), better.step

    def _attempt(self, step: float) -> "_Attempt":
        """Difference quotients with steps h and 2h."""
        near, far = self._residual(step), self._residual(2 * step) / 2
        rounding = 4 * self.limits.rounding * self.level
        noise = abs(near - far) / 3
        scale = self.direction.scale(step) or abs(near) or rounding or 1.0
        # r is free of the truncation that n measures; what is left of it is h² times smaller.
        needed = max(self.limits.floor, (noise / 4 + rounding) / scale)
        error = (4 * near - far) / 3 / scale
        return _Attempt(step, error, needed, truncates=noise > rounding)

    def _corners(self, step: float) -> float:
        """What corners of the loss add to a difference of this step; five evaluations."""
        amounts = step * self.direction.amounts
        middle = self.loss(np.zeros_like(self.direction.amounts))

        def bend(v: np.ndarray) -> float:
            return self.loss(v.astype(np.float32)) + self.loss(-v.astype(np.float32)) - 2 * middle

        return abs(4 * bend(amounts) - bend(2 * amounts))

    def _residual(self, step: float, leaves: np.ndarray | None = None) -> float:
        amounts = step * self.direction.amounts
        amounts = (amounts if leaves is None else np.where(leaves, amounts, 0)).astype(np.float32)
        difference = self.loss(amounts) - self.loss(-amounts)
        return difference - float(np.sum(self.predict(amounts), dtype=np.float64))

    def worst_leaf(self, step: float, threshold: float) -> tuple[int | None, float]:
        """Bisects over the leaves; returns the one that is most off, and its own gap.

        Each half costs two evaluations: 2 log2(L) halves for one wrong leaf. Of several wrong
        ones the half that is further off is followed.
        """
        n = len(self.direction.amounts)
        held = np.ones(n, bool)
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
        return index, error / own if own else np.inf
