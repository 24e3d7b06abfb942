"""`Callback`: what users attach to a run, and the values that it receives.

A callback receives values and never the loop itself, so neither its place among the others nor
anything it keeps can change what is computed. To end a run it raises, or calls `RunContext.stop`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ...step import CompiledStep
from .._throughput import Throughput


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Metrics and timings of one finished update.

    Attributes:
      step: updates made, this one included.
      values: the step's metrics, `loss` and `grad_norm` among them. They may be NaN or infinite.
      seconds: wall time since the metrics of the update before, without evaluations and saves.
      data_seconds: the part of `seconds` for which the loop waited for a batch.
      mean_seconds: mean of `seconds` over the last updates; None after the first update of a
        process, which includes warm-up.
      mean_data_seconds: mean of `data_seconds` over the same updates, or None.
      remaining: updates still to make.
    """

    step: int
    values: Mapping[str, float]
    seconds: float
    data_seconds: float
    mean_seconds: float | None
    mean_data_seconds: float | None
    remaining: int


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What a callback may know about a run, and do to it.

    Attributes:
      folder: of the run.
      step: the compiled step.
      throughput: tokens or rows per second, and MFU, from seconds per update.
      start: updates made before this process started; 0 for a new run.
      steps: updates at the end of the run.
      record: settings as plain values.
      write: `write("spike", step=7, loss=3.1)` appends a row to `metrics.jsonl`.
      say: prints one line for the user.
      stop: `stop("why")` ends the run cleanly after the next update, with a checkpoint;
        `Trainer.run` then returns as at the end. Of several processes, all must call it for the
        same update; one that does not is named after `start_timeout` seconds.
      is_saved: whether the checkpoint of a step is complete on the disk.
    """

    folder: Path
    step: CompiledStep
    throughput: Throughput
    start: int
    steps: int
    record: Mapping[str, Any]
    write: Callable[..., None]
    say: Callable[[str], None]
    stop: Callable[[str], None]
    is_saved: Callable[[int], bool]


class Callback(Protocol):
    """Receives the events of a run, in the order of these methods. Override what you need.

    A state that a method receives is valid until the next update is dispatched, which donates
    it; copy what you want to keep longer.
    """

    def on_start(self, run: RunContext, state: Any) -> None:
        """Called once before the first update, with the state that it starts from."""

    def on_batch(self, step: int, state: Any, batch: Any) -> None:
        """Called before update `step` is dispatched; its time counts to no update.

        Args:
          step: updates made when it is done.
          state: that it starts from.
          batch: its input, on the devices.
        """

    def on_dispatch(self, step: int, state: Any, batch: Any) -> None:
        """Called when update `step` runs on the devices; reading state or batch waits for it.

        Args:
          step: updates made, this one included.
          state: result of the update.
          batch: its input, on the devices.
        """

    def on_step(self, metrics: StepMetrics) -> None:
        """Called with the metrics of an update, usually while the next one runs."""

    def on_eval(self, step: int, values: Mapping[str, float]) -> None:
        """Called with the metrics of an evaluation."""

    def on_save(self, step: int) -> None:
        """Called when a save has started; the checkpoint is complete some time later."""

    def on_finish(self, state: Any) -> None:
        """Called after the last update, with the last state."""

    def on_exit(self, error: BaseException | None) -> None:
        """Called last, in any case, with the exception that ended the run, or None."""
