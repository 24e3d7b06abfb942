"""The wall time of a loop: updates, the wait for their batches, and what is no update."""

import collections
import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping

from ._watch import Numbers

_RECENT = 20


class Clock:
    """Counts updates. The first one is timed, but says nothing of those to come: it warms up."""

    def __init__(self, steps: int) -> None:
        """Starts now; `steps` is the number of the last update."""
        self._steps = steps
        self._mark, self._waited, self._warm = time.perf_counter(), 0.0, False
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=_RECENT)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The loop waits for a batch."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextlib.contextmanager
    def apart(self) -> Iterator[dict[str, float]]:
        """Something else than updates goes on; `{"seconds": ...}` is filled in at its end."""
        spent: dict[str, float] = {}
        began = time.perf_counter()
        yield spent
        spent["seconds"] = time.perf_counter() - began
        self._mark += spent["seconds"]

    def tick(self, step: int, values: Mapping[str, float]) -> Numbers:
        """Tells what one more finished update took."""
        now = time.perf_counter()
        seconds, waited = now - self._mark, self._waited
        self._mark, self._waited = now, 0.0
        if self._warm:
            self._recent.append((seconds, waited))
        self._warm = True
        each = tuple(map(statistics.fmean, zip(*self._recent, strict=True))) or (None, None)
        return Numbers(step, values, seconds, waited, *each, left=self._steps - step)
