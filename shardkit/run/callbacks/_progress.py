"""Progress of a run: two lines on a terminal, a bar in a notebook, plain lines elsewhere."""

import html
import importlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from .._durations import format_clock, format_duration
from ._callback import Callback, RunContext, StepMetrics

# Seconds between two drawings of a notebook's bar.
_BAR_SECONDS = 0.25
# Metrics as text for the progress line.
Describe = Callable[[Mapping[str, float]], str]


def describe_metrics(values: Mapping[str, float]) -> str:
    """Formats the loss, or every number of an evaluation that has none.

    >>> describe_metrics({"loss": 1.5, "grad_norm": 0.1})
    'loss 1.500'
    >>> describe_metrics({"accuracy": 0.25, "examples": 64.0})
    'accuracy 0.25  examples 64'
    """
    if "loss" in values:
        return f"loss {values['loss']:.3f}"
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


class ProgressDisplay(Callback):
    """Shows the user how far the run is and how fast it is."""

    def __init__(self, console: Console, log_every: int, describe: Describe) -> None:
        """Without a terminal a line comes every `log_every` updates; `describe` formats metrics."""
        self._console, self._log_every, self._describe = console, log_every, describe
        self._lines = _NotebookBar() if console.is_jupyter else _TwoLines(console)
        self._saves: list[tuple[int, float]] = []  # (step, monotonic seconds), oldest first

    def on_start(self, run: RunContext, state: Any) -> None:
        self._run = run
        self._lines.begin(run.start, run.steps)

    def on_step(self, metrics: StepMetrics) -> None:
        done, steps = metrics.step, metrics.step + metrics.remaining
        values, speed, eta = self._describe(metrics.values), self._describe_speed(metrics), ""
        if metrics.mean_seconds is not None:
            eta = f"ETA {format_clock(metrics.mean_seconds * metrics.remaining)}"
        self._lines.show_step(done, f"{values}  {eta}", speed)
        is_due = done == 1 or done % self._log_every == 0 or done == steps
        if is_due and not (self._console.is_terminal or self._console.is_jupyter):
            texts = (f"step {done:>{len(str(steps))}}/{steps}", values, speed, eta)
            self._print("  ".join(filter(None, texts)))

    def on_eval(self, step: int, values: Mapping[str, float]) -> None:
        self._print(f"step {step}: {self._describe(values)}")

    def on_save(self, step: int) -> None:
        """Remembers when the save started, to show how much a crash would lose."""
        self._saves.append((step, time.monotonic()))

    def on_finish(self, state: Any) -> None:
        self._lines.stop()

    def on_exit(self, error: BaseException | None) -> None:
        self._lines.stop()

    def _describe_speed(self, metrics: StepMetrics) -> str:
        if metrics.mean_seconds is None or metrics.mean_data_seconds is None:
            return ""
        each, data = map(format_duration, (metrics.mean_seconds, metrics.mean_data_seconds))
        speed = self._run.throughput.text(metrics.mean_seconds)
        return "  ".join(filter(None, (speed, f"{each}/step (data {data})", self._describe_save())))

    def _describe_save(self) -> str:
        """Returns the newest complete checkpoint and its age; unfinished saves do not count."""
        for i, (step, then) in reversed(list(enumerate(self._saves))):
            if self._run.is_saved(step):
                del self._saves[:i]
                age = round(time.monotonic() - then)
                return f"saved {step}, {format_duration(age) if age > 59 else f'{age} s'} ago"
        return ""

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


class _TwoLines(Progress):
    """Position and metrics on the first line, speed on the second; nothing without a terminal."""

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
        self.update(self._task, total=steps, completed=done)
        self.start()

    def show_step(self, done: int, description: str, speed: str) -> None:
        self._speed = speed
        self.update(self._task, completed=done, description=description)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yields both lines; the second one never wraps."""
        yield from super().get_renderables()
        if self._speed:
            yield Text(f"  {self._speed}", no_wrap=True, overflow="ellipsis", style="dim")


class _NotebookBar:
    """A bar below a notebook's cell, replaced a few times a second; IPython draws it."""

    def __init__(self) -> None:
        self._steps, self._drawn, self._text = 0, 0.0, ""
        self._handle: Any = None

    def begin(self, done: int, steps: int) -> None:
        self._steps = steps
        self._text = self._render(done, "compiled, warming up", "")
        display = importlib.import_module("IPython.display")
        self._handle = display.display(display.HTML(self._text), display_id=True)

    def show_step(self, done: int, description: str, speed: str) -> None:
        self._text = self._render(done, description, speed)
        if time.monotonic() - self._drawn >= _BAR_SECONDS:
            self._draw()

    def stop(self) -> None:
        """Shows the last state of a bar that has begun."""
        if self._handle is not None:
            self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._handle.update(importlib.import_module("IPython.display").HTML(self._text))

    def _render(self, done: int, description: str, speed: str) -> str:
        bar = f'<progress value="{done}" max="{self._steps}" style="width:16em"></progress>'
        texts = f"step {done}/{self._steps}  {description}", speed
        lines = "<br>".join(html.escape(text) for text in texts if text)
        style = "font:13px/1.45 system-ui,sans-serif;white-space:pre-wrap"
        return f'<div style="{style}">{bar} {lines}</div>'
