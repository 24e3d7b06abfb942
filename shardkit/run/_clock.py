"""Wall time of the loop: per update, waiting for batches, and everything that is not an update."""

import collections
import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping

from .callbacks._callback import StepMetrics

_RECENT = 20


class Clock:
    """Times updates. The first one includes warm-up and is left out of the means."""

    def __init__(self, steps: int) -> None:
        """Starts now; `steps` is the number of the last update."""
        self._steps = steps
        self._mark, self._waited, self._warm = time.perf_counter(), 0.0, False
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=_RECENT)

    @contextlib.contextmanager
    def time_data(self) -> Iterator[None]:
        """Counts the block as waiting for a batch."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextlib.contextmanager
    def exclude(self) -> Iterator[dict[str, float]]:
        """Leaves the block out of update times; `{"seconds": ...}` is filled in at its end."""
        spent: dict[str, float] = {}
        began = time.perf_counter()
        yield spent
        spent["seconds"] = time.perf_counter() - began
        self._mark += spent["seconds"]

    def finish_step(self, step: int, values: Mapping[str, float]) -> StepMetrics:
        """Returns the metrics and the times of an update whose values were just read."""
        now = time.perf_counter()
        seconds, waited = now - self._mark, self._waited
        self._mark, self._waited = now, 0.0
        if self._warm:
            self._recent.append((seconds, waited))
        self._warm = True
        means = tuple(map(statistics.fmean, zip(*self._recent, strict=True)))
        mean, mean_waited = means or (None, None)
        return StepMetrics(
            step=step,
            values=values,
            seconds=seconds,
            data_seconds=waited,
            mean_seconds=mean,
            mean_data_seconds=mean_waited,
            remaining=self._steps - step,
        )
