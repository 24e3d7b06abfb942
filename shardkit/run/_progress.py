"""How a run is told of: a line that changes on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from ._rate import Rate
from ._source import Describe
from ._units import duration, remaining
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

    def __init__(self, console: Console, log_every: int, describe: Describe, rate: Rate) -> None:
        """Declares what is shown; nothing is before the run begins.

        Args:
          console: where.
          log_every: updates between two lines where the output is no terminal.
          describe: says what an update's or an evaluation's metrics are.
          rate: says how fast updates of so many seconds are.
        """
        self._console, self._log_every = console, log_every
        self._describe, self._rate = describe, rate
        self._lines = _TwoLines(console)
        self._asked: list[tuple[int, float]] = []
        self._is_saved: Callable[[int], bool] = lambda step: False

    def begin(self, run: Run, state: Any) -> None:
        """Starts the line."""
        self._is_saved = run.is_saved
        self._lines.begin(run.start, run.steps)

    def read(self, numbers: Numbers) -> None:
        """Tells of an update."""
        done, steps = numbers.step, numbers.step + numbers.left
        said, speed, left = self._describe(numbers.values), self._speed(numbers), ""
        if numbers.each is not None:
            left = f"ETA {remaining(numbers.each * numbers.left)}"
        self._lines.tell(done, f"{said}  {left}", speed)
        due = done == 1 or done % self._log_every == 0 or done == steps
        if due and not self._console.is_terminal:
            parts = (f"step {done:>{len(str(steps))}}/{steps}", said, speed, left)
            self._print("  ".join(filter(None, parts)))

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Tells of an evaluation."""
        self._print(f"step {step}: {self._describe(values)}")

    def saved(self, step: int) -> None:
        """Remembers when: the older the state that is on the disk, the more a kill costs."""
        self._asked.append((step, time.monotonic()))

    def finished(self, state: Any) -> None:
        """Leaves the last lines as they are."""
        self._lines.stop()

    def end(self, error: BaseException | None) -> None:
        """Leaves the last lines as they are."""
        self._lines.stop()

    def _speed(self, numbers: Numbers) -> str:
        if numbers.each is None or numbers.data_each is None:
            return ""
        took = f"{duration(numbers.each)}/step (data {duration(numbers.data_each)})"
        return "  ".join(filter(None, (self._rate.text(numbers.each), took, self._age())))

    def _age(self) -> str:
        """Which step is on the disk, whole; what is still being written does not count."""
        for i, (step, then) in reversed(list(enumerate(self._asked))):
            if self._is_saved(step):
                del self._asked[:i]
                ago = round(time.monotonic() - then)
                return f"saved {step}, {duration(ago) if ago > 59 else f'{ago} s'} ago"
        return ""

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


class _TwoLines(Progress):
    """How far on the first line, how fast on the second; nothing where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._speed = ""
        super().__init__(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=16),
            TextColumn("{task.description}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self.add_task("compiled, warming up")

    def begin(self, done: int, steps: int) -> None:
        """Shows where the run begins."""
        self.update(self._task, total=steps, completed=done)
        self.start()

    def tell(self, done: int, said: str, speed: str) -> None:
        """Shows an update."""
        self._speed = speed
        self.update(self._task, completed=done, description=said)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Both lines; the second never wraps."""
        yield from super().get_renderables()
        if self._speed:
            yield Text(f"  {self._speed}", no_wrap=True, overflow="ellipsis", style="dim")
