"""How a run is told of: a line that changes on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ._source import Describe
from ._watch import Numbers, Run, Watcher


def describe_metrics(values: Mapping[str, float]) -> str:
    """Names the loss, or every number of an evaluation.

    >>> describe_metrics({"loss": 1.5, "grad_norm": 0.1})
    'loss 1.500'
    >>> describe_metrics({"accuracy": 0.25, "examples": 64.0})
    'accuracy 0.25  examples 64'
    """
    if "loss" in values:
        return f"loss {values['loss']:.3f}"
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


class ShowProgress(Watcher):
    """Tells the user how far the run is and how fast it goes."""

    def __init__(
        self,
        console: Console,
        log_every: int,
        describe: Describe,
        rate: Callable[[float], str],
    ) -> None:
        """Declares what is shown; nothing is before the run begins.

        Args:
          console: where.
          log_every: updates between two lines where the output is no terminal.
          describe: says what an update's or an evaluation's metrics are.
          rate: says how fast updates of so many seconds are.
        """
        self._console, self._log_every = console, log_every
        self._describe, self._rate = describe, rate
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("compiled, warming up")

    def begin(self, run: Run, state: Any) -> None:
        """Starts the line."""
        self._progress.update(self._task, total=run.steps, completed=run.start)
        self._progress.start()

    def read(self, numbers: Numbers) -> None:
        """Tells of an update."""
        done, steps = numbers.step, numbers.step + numbers.left
        said = self._describe(numbers.values)
        if numbers.each is not None:
            minutes, seconds = divmod(round(numbers.each * numbers.left), 60)
            said += f"  {self._rate(numbers.each)}  ETA {minutes}:{seconds:02d}"
        self._progress.update(self._task, completed=done, description=said)
        due = done == 1 or done % self._log_every == 0 or done == steps
        if due and not self._console.is_terminal:
            self.say(f"step {done:>{len(str(steps))}}/{steps}  {said}")

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Tells of an evaluation."""
        self.say(f"step {step}: {self._describe(values)}")

    def finished(self, state: Any) -> None:
        """Leaves the last line as it is."""
        self._progress.stop()

    def end(self, error: BaseException | None) -> None:
        """Leaves the last line as it is."""
        self._progress.stop()

    def say(self, line: str) -> None:
        """Tells of something that happened beside the updates."""
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
