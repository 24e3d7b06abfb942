"""The callbacks that every run has, in the order in which they are called, and the small ones."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from ...processes import ProcessGroup
from .._config import TrainConfig, check_profile, parse_check, parse_profile
from .._stop import Stopped
from ..guards._spikes import SpikeDetector
from ._callback import Callback, RunContext, StepMetrics
from ._finite import FiniteCheck
from ._loggers import check_loggers, make_loggers
from ._progress import Describe, ProgressDisplay
from ._replica_check import BatchCheck, ReplicaCheck, SelfCheckCallback


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


class Heartbeat(Callback):
    """Reports the events of a run to the watchdog that processes keep over each other."""

    def __init__(self, process_group: ProcessGroup) -> None:
        """Takes this process among the others."""
        self._process_group = process_group

    def on_start(self, run: RunContext, state: Any) -> None:
        self._process_group.report_step(run.start)

    def on_dispatch(self, step: int, state: Any, batch: Any) -> None:
        self._process_group.report_step(step)

    def on_step(self, metrics: StepMetrics) -> None:
        self._process_group.report_progress()

    def on_eval(self, step: int, values: Mapping[str, float]) -> None:
        self._process_group.report_progress()

    def on_save(self, step: int) -> None:
        self._process_group.report_progress()

    def on_finish(self, state: Any) -> None:
        """Stops the step timeout: what follows may take any time."""
        self._process_group.stop_watching()

    def on_exit(self, error: BaseException | None) -> None:
        """Reports an error at once, since closing files and checkpoints may wait for the others."""
        if error is not None and not isinstance(error, Stopped):
            self._process_group.fail(error)


class SpikeLog(Callback):
    """Writes a row when the loss or the gradient norm jumps above its expected range.

    {"kind": "spike", "step": 41, "of": "loss", "expected": 2.1, "limit": 2.6,
     "loss": 7.0, "grad_norm": 3.0, ...}
    """

    def __init__(self) -> None:
        """Gradient norms scatter more than losses do, so they must triple to count."""
        self._detectors = {"loss": SpikeDetector(), "grad_norm": SpikeDetector(ratio=2.0)}

    def on_start(self, run: RunContext, state: Any) -> None:
        self._run = run

    def on_step(self, metrics: StepMetrics) -> None:
        for name, detector in self._detectors.items():
            value = metrics.values.get(name, math.nan)
            spike = detector.update(value) if math.isfinite(value) else None
            if spike is not None:
                both = {metric: metrics.values.get(metric) for metric in self._detectors}
                about = {"of": name, "expected": spike.expected, "limit": spike.limit}
                self._run.write("spike", step=metrics.step, **about, **both)
                numbers = f"{value:.4g}, expected {spike.expected:.4g}"
                self._run.say(f"step {metrics.step}: {name} spikes to {numbers}")


# Updates between comparisons of the batches that several processes read.
_BATCH_CHECK_EVERY = 100


def check_callbacks(config: TrainConfig, start: int) -> None:
    """Raises ConfigError, before a compile, if a callback cannot do what the config asks.

    That is a logger that is unknown or not installed, or updates to trace that are over.
    """
    check_loggers(config.loggers)
    check_profile(config.profile, config.steps, start)


def default_callbacks(
    config: TrainConfig, describe: Describe, console: Console, process_group: ProcessGroup
) -> list[Callback]:
    """Returns the callbacks of a config: those that may end the run first, the progress last."""
    callbacks: list[Callback] = [Heartbeat(process_group), FiniteCheck(config.skip_limit)]
    if process_group.count > 1:
        callbacks.append(BatchCheck(config.replica_check_every or _BATCH_CHECK_EVERY))
    if config.replica_check_every:
        callbacks.append(ReplicaCheck(config.replica_check_every, config.on_replica_mismatch))
    if every := parse_check(config.check):
        callbacks.append(SelfCheckCallback(every, process_group))
    callbacks += [SpikeLog(), *make_loggers(config.loggers)]
    if config.profile is not None:
        callbacks.append(ProfileTrace(*parse_profile(config.profile, config.steps)))
    return [*callbacks, ProgressDisplay(console, config.log_every, describe)]
