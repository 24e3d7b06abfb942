"""Numbers that jump above what the run has led to expect."""

import collections
import dataclasses
import itertools
import math
import statistics

# Turns a median absolute difference of neighbours into the standard deviation of normal noise.
_SIGMA = 1.4826 / math.sqrt(2)
# Numbers that tell the level where it rises; over the whole window it tells where it falls.
_RECENT = 5


@dataclasses.dataclass(frozen=True)
class Spike:
    """A number far above the ones before it.

    Attributes:
      value: the number.
      expected: the level of the numbers before.
      limit: above which it counts.
    """

    value: float
    expected: float
    limit: float


class Spikes:
    """Level and noise of the last numbers, and the ones that stand out above.

    The level is a median, over the window or over its end, whichever is higher: one spike does
    not hide the next, a number that falls, however fast, is never one, and neither is one that
    creeps up. The noise is that of neighbours, which no trend widens. Of an excursion of many
    steps the first one is told, and the ones above the limit are not learned from.
    """

    def __init__(
        self, window: int = 64, least: int = 16, sigmas: float = 8.0, ratio: float = 0.05
    ) -> None:
        """Starts without a past.

        Args:
          window: how many numbers are looked back on.
          least: how many must be known before one can stand out.
          sigmas: standard deviations above the level that count.
          ratio: and at least so much above it, relative to the level.
        """
        self._past: collections.deque[float] = collections.deque(maxlen=window)
        self._least, self._sigmas, self._ratio = least, sigmas, ratio
        self._above = 0

    def look(self, value: float) -> Spike | None:
        """Takes the next finite number; returns a spike where one begins."""
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
            # Not an excursion: this is how the run goes now.
            self._past.clear()
            self._above = 0
        return Spike(value, expected, limit) if self._above == 1 else None
