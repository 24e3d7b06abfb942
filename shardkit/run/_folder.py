"""`RunFolder`: the open folder of a run, with its metrics, its checkpoints and its first state."""

import contextlib
import dataclasses
import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.text import Text

from .._core.errors import CheckpointError, ConfigError, Problem, format_problems
from .._core.io._console import show_task
from .._core.tree import join_path
from ..checkpoint import Checkpointer, RetentionPolicy
from ..processes import ProcessGroup
from ..step import CompiledStep
from ._config import TrainConfig
from ._facts import agree_on_given, agree_on_state
from ._metrics_file import MetricsFile
from ._metrics_rows import log_exception, write_goodput, write_start
from ._resume import FACTS, ResumeDecision, checkpoints_folder
from ._source import DataSource
from ._stop import Stopped


def create_shared_folder(process_group: ProcessGroup, decision: ResumeDecision) -> Path:
    """Returns the folder of the run; process 0 creates that of a new one."""
    path = None
    if process_group.index == 0:
        path = str(decision.folder if decision.resumed else create_folder(decision.folder))
    return Path(process_group.gather("folder", path)[0])


@contextlib.contextmanager
def leave_together(process_group: ProcessGroup) -> Iterator[None]:
    """Ends a block that all processes leave after the same update, because of a signal."""
    try:
        yield
    except Stopped:
        process_group.leave()
        raise


def create_folder(folder: Path) -> Path:
    """Creates a folder that did not exist: `folder`, or `folder-2`, `folder-3`, ….

    `mkdir` is atomic, so two runs that start together never share one. Raises ConfigError if it
    fails.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
    except OSError as error:
        why = f"{error.strerror}."
        fix = "--set train.out=FOLDER"
        raise ConfigError.of("The run folder cannot be created.", str(folder), why, fix) from error
    raise AssertionError("unreachable")


@dataclasses.dataclass
class RunFolder:
    """Metrics and checkpoints of a run that is under way."""

    metrics: MetricsFile  # the metrics file
    config: TrainConfig  # when to save, and what to do when a save fails
    source: DataSource  # batches; their position goes into each checkpoint
    record: Mapping[str, Any]  # settings as plain values
    say: Callable[[str], None]  # prints one line for the user
    start: int = 0  # updates already made; 0 for a new run
    # whether the metrics hold an evaluation of the state that a resumed run starts from
    scored: bool = True
    # inside its `with` block; None for a run that makes no checkpoints
    checkpoints: Checkpointer | None = None

    def __post_init__(self) -> None:
        """The state that a run starts from needs no save."""
        self._newest = self.start

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.metrics.path.parent

    def is_saved(self, step: int) -> bool:
        """Whether the checkpoint of a step is complete on the disk."""
        return self.checkpoints is not None and step in self.checkpoints.steps()

    @property
    def can_save(self) -> bool:
        """Whether the run makes checkpoints."""
        return self.checkpoints is not None

    def is_save_due(self, done: int) -> bool:
        """Whether to save after `done` updates: every `checkpoint_every`, and after the last."""
        every = self.config.checkpoint_every
        return self.can_save and (done % every == 0 or done == self.config.steps)

    def save(self, done: int, state: Any, scores: Mapping[str, float]) -> None:
        """Starts saving a state in the background, unless it is saved already.

        The scores rank the best checkpoints; one that is not finite ranks none. Raises
        CheckpointError if this save or the one before fails and `on_save_error` is `stop`.
        """
        checkpoints = self.checkpoints
        if checkpoints is None or done == self._newest:
            return
        self.metrics.sync()
        self._handle_save_error(checkpoints.wait)
        self._newest, data = done, self.source.state(done)
        finite = {name: score for name, score in scores.items() if math.isfinite(score)}
        self._handle_save_error(lambda: checkpoints.save(done, state, data=data, metrics=finite))

    def finish_saving(self) -> str:
        """Waits for the last save; returns what is on disk, as text, or raises its error."""
        if self.checkpoints is None or not self._newest:
            return "No checkpoint was saved. Rerun the same command to start anew."
        self._handle_save_error(self.checkpoints.wait)
        if not self.is_saved(self._newest):
            problem = Problem(f"step {self._newest}", f"is not in {self.checkpoints.folder}")
            fix = "free disk space; then rerun the same command to resume"
            raise CheckpointError(format_problems("The last save failed.", [problem], fix))
        return f"Step {self._newest} is saved. Rerun the same command to resume."

    def _handle_save_error(self, call: Callable[[], None]) -> None:
        try:
            call()
        except CheckpointError as error:
            if self.config.on_save_error == "stop":
                raise
            self.metrics.write("save_failed", why=str(error))
            self.say(f"{error}\nTraining continues (train.on_save_error=continue).")


@contextlib.contextmanager
def open_run_folder(
    decision: ResumeDecision,
    step: CompiledStep,
    *,
    config: TrainConfig,
    retention: RetentionPolicy | None,
    record: Mapping[str, Any],
    facts: Mapping[str, Any],
    source: DataSource,
    console: Console,
    process_group: ProcessGroup,
    began: float,
    seconds: Mapping[str, float],
    given: Callable[[], Mapping[str, Any]],
) -> Iterator[tuple[RunFolder, Any]]:
    """Opens the folder of a run and yields it with the state that the run starts from.

    An exception of the body is logged in the metrics, behind which goodput is written in any case.
    This process began the run in seconds since 1970; `seconds` is what the time since then was
    spent on. `given` makes the keywords of `step.init` for a new run. Raises CheckpointError if no
    checkpoint can be resumed from or the last save fails, ProcessError if other processes start
    from another state.
    """
    path, resumed = create_shared_folder(process_group, decision), decision.resumed
    checkpoints = Checkpointer(
        checkpoints_folder(path),
        retention=retention or config.retention,
        axes={join_path("params", name): names for name, names in step.layout.axes.items()},
        config={**record, FACTS: facts},
    )
    say = functools.partial(_say, console)
    opened = time.perf_counter()
    with leave_together(process_group), contextlib.ExitStack() as stack:
        if config.checkpoint_every:
            stack.enter_context(checkpoints)
        if resumed:
            state, start = _restore(checkpoints, step, config, console)
        else:
            with show_task(console, "creating the state"):
                state, start = _create(step, config.seed, given(), process_group), 0
        agree_on_state(process_group, state)
        spent = {**seconds, "restore" if resumed else "init": time.perf_counter() - opened}
        after = start if resumed else None
        metrics = MetricsFile(
            path,
            after,
            report_error=say if config.on_save_error == "continue" else None,
            enabled=process_group.index == 0,
        )
        stack.enter_context(metrics)
        if metrics.broken_lines:
            say(f"{metrics.path}: skipped {_describe_lines(metrics.broken_lines)}: not rows")
        write_start(metrics, step.mesh, after, record=record, began=began, seconds=spent)
        folder = RunFolder(
            metrics=metrics,
            config=config,
            source=source,
            record=record,
            say=say,
            start=start,
            scored=not resumed or process_group.gather("scored", _is_scored(metrics, start))[0],
            checkpoints=checkpoints if config.checkpoint_every else None,
        )
        with write_goodput(metrics, console), log_exception(metrics):
            yield folder, state
            waiting = time.perf_counter()
            folder.finish_saving()
            metrics.write("finished", seconds=time.perf_counter() - waiting)


def _create(
    step: CompiledStep, seed: int, given: Mapping[str, Any], process_group: ProcessGroup
) -> Any:
    state = step.init(jax.random.key(seed), **given)
    agree_on_given(process_group, given)
    return state


def _is_scored(metrics: MetricsFile, step: int) -> bool:
    return any(row["kind"] == "eval" and row.get("step") == step for row in metrics.kept_rows)


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)


def _restore(
    checkpoints: Checkpointer, step: CompiledStep, config: TrainConfig, console: Console
) -> tuple[Any, int]:
    """Returns the newest usable state, and its step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a damaged step is reported on the console instead
        restored = checkpoints.restore(
            step.abstract_state, step.shardings, on_damage=config.on_damage
        )
    for why in restored.damaged.values():
        console.print(Text(f"{why}\nResuming from the step before it."), style="yellow")
    mesh = " × ".join(f"{axis}={size}" for axis, size in restored.manifest.mesh.items())
    where = f"{checkpoints.folder.parent} at step {restored.step} of {config.steps}"
    where += f", saved {restored.manifest.time} on mesh {mesh}"
    console.print(Text.assemble(("resumed", "bold"), f" {where}"), soft_wrap=True)
    return restored.state, restored.step


def _describe_lines(numbers: Sequence[int]) -> str:
    """Returns `line 3` or `lines 3, 7`; from the fifth on, `…`."""
    text = ", ".join(map(str, numbers[:4])) + (", …" if len(numbers) > 4 else "")
    return f"lines {text}" if len(numbers) > 1 else f"line {text}"
