"""A run's folder while it is open: metrics, checkpoints, and the state that it begins with."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from .._errors import CheckpointError
from ..checkpoint import Checkpointer, Keep
from ..data import Text
from ..step import CompiledStep
from ._config import TrainConfig
from ._environment import environment
from ._folder import MetricsFile, new_folder
from ._resume import Beginning, checkpoints_of
from ._saver import Saver
from ._stop import Stopped


@dataclasses.dataclass
class Session:
    """What a run needs of its folder.

    Attributes:
      file: metrics.
      state: that the run begins with.
      start: updates that it has behind it.
      saver: keeps checkpoints; None where the run makes none.
    """

    file: MetricsFile
    state: Any
    start: int
    saver: Saver | None = None


@contextlib.contextmanager
def open_session(
    beginning: Beginning,
    step: CompiledStep,
    text: Text,
    loop: TrainConfig,
    record: Mapping[str, Any],
    console: Console,
    seconds: Mapping[str, float],
) -> Iterator[Session]:
    """Opens the folder of a run; what the body raises is noted in its metrics.

    Raises:
      CheckpointError: there is no usable checkpoint to go on with, or the last save was lost.
    """
    folder = beginning.wanted if beginning.resumed else new_folder(beginning.wanted)
    checkpoints = _checkpointer(folder, step, loop, record)
    with contextlib.ExitStack() as inside:
        if loop.checkpoint_every:
            inside.enter_context(checkpoints)
        if beginning.resumed:
            state, start = _restored(checkpoints, step, loop, console)
        else:
            state, start = step.init(jax.random.key(loop.seed)), 0
        file = inside.enter_context(MetricsFile(folder, start if beginning.resumed else None))
        if beginning.resumed:
            file.write("resumed", step=start, **environment(step.mesh))
        else:
            file.write("start", config=record, **environment(step.mesh), seconds=seconds)
        session = Session(file, state, start)
        if loop.checkpoint_every:
            session.saver = Saver(checkpoints, loop, text, file, console.print, start)
        with _noted(file):
            yield session
            if session.saver is not None:
                session.saver.finish()


@contextlib.contextmanager
def _noted(file: MetricsFile) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, Stopped, CheckpointError) as error:
        why = {KeyboardInterrupt: "interrupted", Stopped: "told to stop"}
        file.write("stopped", why=why.get(type(error), str(error)))
        error.add_note(f"Metrics so far are in {file.path}.")
        raise


def _checkpointer(
    folder: Path, step: CompiledStep, loop: TrainConfig, record: Mapping[str, Any]
) -> Checkpointer:
    axes = {f"params/{path}": names for path, names in step.layout.axes.items()}
    keep = Keep(last=loop.keep, every=loop.keep_every)
    if loop.keep_best:
        keep = dataclasses.replace(keep, best="bits_per_byte", best_count=loop.keep_best)
    return Checkpointer(checkpoints_of(folder), keep=keep, axes=axes, config=dict(record))


def _restored(
    checkpoints: Checkpointer, step: CompiledStep, loop: TrainConfig, console: Console
) -> tuple[Any, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a damaged step is told on the console instead
        back = checkpoints.restore(step.abstract_state, step.shardings, on_damage=loop.on_damage)
    for why in back.damaged.values():
        console.print(f"{why}\nGoing on from the step before it.", style="yellow", markup=False)
    made = " × ".join(f"{axis}={size}" for axis, size in back.manifest.mesh.items())
    console.print(
        f"[bold]resumed[/] {checkpoints.folder.parent} at step {back.step} of {loop.steps}, "
        f"saved {back.manifest.time} on mesh {made}",
        highlight=False,
        soft_wrap=True,
    )
    return back.state, back.step
