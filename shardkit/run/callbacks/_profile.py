"""A trace of some updates on the devices, made with `jax.profiler`."""

from pathlib import Path
from typing import Any

import jax

from ._callback import Callback, RunContext


class ProfileTrace(Callback):
    """Traces a range of updates into `profile` in the run's folder."""

    def __init__(self, first: int, last: int) -> None:
        """Takes the first and the last update to trace, counted from 1."""
        self._first, self._last, self._tracing = first, last, False

    def on_start(self, run: RunContext, state: Any) -> None:
        """Starts the trace if the first update of this process is in the range."""
        self._run = run
        self._start_or_stop(run.start, state)

    def on_dispatch(self, step: int, state: Any, batch: Any) -> None:
        self._start_or_stop(step, state)

    def on_exit(self, error: BaseException | None) -> None:
        """Ends a trace whose last update was not made."""
        if self._tracing:
            self._stop()

    def _start_or_stop(self, done: int, state: Any) -> None:
        if self._tracing and done == self._last:
            jax.block_until_ready(state)
            self._stop()
        if not self._tracing and self._first - 1 <= done < self._last:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._tracing = False
        self._run.say(f"trace of updates {self._first} to {self._last}: {self._folder}")

    @property
    def _folder(self) -> Path:
        return self._run.folder / "profile"
