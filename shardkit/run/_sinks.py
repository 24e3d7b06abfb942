"""Metrics to where people look at them besides `metrics.jsonl`: TensorBoard, Weights & Biases.

Each is a watcher that imports its package when the run begins, and an extra of that name.
"""

import abc
import importlib
import importlib.util
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .._errors import ConfigError, Problem, count, did_you_mean, raise_all
from ._watch import Numbers, Run, Watcher

# What a row of metrics says of the speed, from the seconds of an update.
Columns = Callable[[float], Mapping[str, float]]


def check_sinks(names: Sequence[str]) -> None:
    """Refuses sinks that are unknown or not installed, before anything is compiled.

    Raises:
      ConfigError: naming each, with the command that installs it.
    """
    problems = []
    for name in names:
        subject = f"train.sinks={name}"
        if name not in SINKS:
            why = f"is none of {', '.join(SINKS)}.{did_you_mean(name, SINKS)}"
            problems.append(Problem(subject, why, f"--set train.sinks={','.join(SINKS)}"))
        elif importlib.util.find_spec(SINKS[name].package) is None:
            why = f"needs the package {SINKS[name].package}, which is not installed."
            problems.append(Problem(subject, why, f"pip install 'shardkit[{name}]'"))
    headline = f"Metrics cannot go to {count(len(problems), 'sink')}."
    raise_all(ConfigError, headline, problems, "metrics.jsonl is written in any case")


def make_sinks(names: Sequence[str], columns: Columns) -> list[Watcher]:
    """Makes the watchers of sinks that `check_sinks` let pass."""
    return [SINKS[name](columns) for name in names]


class _Sink(Watcher):
    """What both have in common: every number of an update and of an evaluation, by name."""

    package: str

    def __init__(self, columns: Columns) -> None:
        """Declares a sink.

        Args:
          columns: says what an update of so many seconds means for the speed.
        """
        self._columns = columns

    def read(self, numbers: Numbers) -> None:
        """Writes an update's metrics, its time and its speed."""
        times = {"seconds": numbers.seconds, "data_seconds": numbers.data_seconds}
        values = {**numbers.values, **times, **self._columns(numbers.seconds)}
        self._write(numbers.step, {f"train/{name}": value for name, value in values.items()})

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Writes an evaluation's metrics."""
        self._write(step, {f"eval/{name}": value for name, value in values.items()})

    @abc.abstractmethod
    def _write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers by name."""


class TensorBoard(_Sink):
    """Event files in the run's folder, below `tensorboard`."""

    package = "tensorboardX"

    def begin(self, run: Run, state: Any) -> None:
        """Opens an event file; what an earlier life wrote of later updates is no longer shown."""
        module = importlib.import_module(self.package)
        folder = str(run.folder / "tensorboard")
        self._writer = module.SummaryWriter(folder, purge_step=run.start + 1)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def end(self, error: BaseException | None) -> None:
        """Puts everything on the disk."""
        self._writer.close()


class WandB(_Sink):
    """One run of Weights & Biases for all lives of a run; `WANDB_MODE=offline` needs no network."""

    package = "wandb"

    def begin(self, run: Run, state: Any) -> None:
        """Begins the run, or goes on with the one that the folder names."""
        wandb = importlib.import_module(self.package)
        named = run.folder / "wandb.id"
        if not named.exists():
            named.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            id=named.read_text(),
            resume="allow",
            name=run.folder.name,
            dir=str(run.folder),
            settings=wandb.Settings(console="off"),  # the terminal is the progress line's
        )
        # Updates that a kill made void are made again: the step is a number like others.
        self._run.define_metric("*", step_metric="step")

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._run.log({"step": step, **finite})

    def end(self, error: BaseException | None) -> None:
        """Ends the run there too, as failed if it has."""
        self._run.finish(exit_code=0 if error is None else 1)


SINKS: Mapping[str, type[_Sink]] = {"tensorboard": TensorBoard, "wandb": WandB}
