"""A trace of some updates on the devices, made with `jax.profiler`."""

import re
from typing import Any

import jax

from .._errors import ConfigError, Problem, format_problems
from ._watch import Run, Watcher


def parse_profile(text: str, steps: int) -> tuple[int, int]:
    """Reads `first:last`, both of them updates that are traced.

    Raises:
      ConfigError: it is no range, or not one of updates that the run makes.

    >>> parse_profile("10:15", 400)
    (10, 15)
    """
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    why = None
    if match is None:
        why = "is no range of updates first:last."
    elif first < 1:
        why = "begins before the first update, which is 1."
    elif last < first:
        why = f"ends before it begins: {last} < {first}."
    elif last > steps:
        why = f"ends behind the last update, train.steps={steps}."
    if why is not None:
        first = min(10, steps)
        problem = Problem(f"profile={text}", why, f"--profile {first}:{min(first + 5, steps)}")
        raise ConfigError(format_problems("There is nothing to trace.", [problem]))
    return first, last


def check_profile(text: str | None, steps: int, start: int) -> None:
    """Refuses a range that a run which goes on has behind it.

    Raises:
      ConfigError: naming the update that the run goes on from.
    """
    if text is None or parse_profile(text, steps)[1] > start:
        return
    why = f"lies behind the run, which goes on from update {start}."
    fix = f"--profile {min(start + 10, steps)}:{min(start + 15, steps)}, or train.resume=never"
    problem = Problem(f"profile={text}", why, fix)
    raise ConfigError(format_problems("There is nothing to trace.", [problem]))


class Profile(Watcher):
    """Traces a range of updates into the run's folder, below `profile`."""

    def __init__(self, first: int, last: int) -> None:
        """Declares the range.

        Args:
          first: the first update that is traced.
          last: the last one.
        """
        self._first, self._last, self._tracing = first, last, False

    def begin(self, run: Run, state: Any) -> None:
        """Begins at once where the first update is the first of this life, or behind it."""
        self._run = run
        self._next(run.start, state)

    def dispatched(self, step: int, state: Any, batch: Any) -> None:
        """Begins or ends the trace between two updates."""
        self._next(step, state)

    def end(self, error: BaseException | None) -> None:
        """Ends a trace that the run did not come to the end of."""
        if self._tracing:
            self._stop()

    def _next(self, done: int, state: Any) -> None:
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
    def _folder(self) -> Any:
        return self._run.folder / "profile"
