"""Tells the other processes of a run that this one is making progress."""

from collections.abc import Mapping
from typing import Any

from ...processes import ProcessGroup
from .._stop import Stopped
from ._callback import Callback, RunContext, StepMetrics


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
