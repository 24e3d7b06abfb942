"""Detects values that jump above the level of the values before them."""

import collections
import dataclasses
import itertools
import math
import statistics

# Standard deviation of normal noise, per median absolute difference of neighbors.
_SIGMA = 1.4826 / math.sqrt(2)
# Values whose median is the level of a rising curve; for a falling one the window's median is.
_RECENT = 5


@dataclasses.dataclass(frozen=True)
class Spike:
    """A value far above those before it."""

    value: float  # the value
    expected: float  # the level of the values before it
    limit: float  # the smallest value that is not a spike


class SpikeDetector:
    """Tracks level and noise of the last values, and detects values far above.

    The level is the median of the window or of its last five values, whichever is higher. So one
    spike does not hide the next, and a curve that falls, however fast, or rises slowly has none.
    The noise is that of differences between neighbors, which a trend does not widen. Of several
    values in a row above the limit only the first is returned, and none changes the level:

        1.0 1.1 0.9 … 1.0 | 7.0     6.0   1.1 … 1.0 | 5.0
                            spike   -     -           spike
    """

    def __init__(
        self, window: int = 64, least: int = 16, sigmas: float = 8.0, ratio: float = 0.05
    ) -> None:
        """Level and noise come from the last `window` values, of which there must be `least`.

        A spike is `sigmas` standard deviations of the noise and `ratio` of the level above the
        level.
        """
        self._past: collections.deque[float] = collections.deque(maxlen=window)
        self._least, self._sigmas, self._ratio = least, sigmas, ratio
        self._above = 0

    def update(self, value: float) -> Spike | None:
        """Takes the next finite value; returns a spike if one starts here."""
        if len(self._past) < self._least:
            self._past.append(value)
            return None
        past = list(self._past)
        expected = max(statistics.median(past), statistics.median(past[-_RECENT:]))
        noise = _SIGMA * statistics.median(abs(x - y) for x, y in itertools.pairwise(past))
        limit = expected + max(self._sigmas * noise, self._ratio * abs(expected))
        if value <= limit:
            self._past.append(value)
            self._above = 0
            return None
        self._above += 1
        if self._above >= self._least:
            # Too long for a spike: this is the new level.
            self._past.clear()
            self._above = 0
        return Spike(value, expected, limit) if self._above == 1 else None
