"""A run's folder while it is open: metrics, checkpoints, and the state that it begins with."""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.text import Text

from ..checkpoint import Checkpointer, Keep
from ..processes import Peers
from ..step import CompiledStep
from ._config import TrainConfig
from ._folder import MetricsFile
from ._peers import agree_on_step, decided, leaving, made_folder, metrics_file
from ._resume import Beginning, Terms, checkpoints_of, choose_beginning
from ._rows import noted, summed, write_beginning
from ._saver import Saver
from ._source import Source


@dataclasses.dataclass
class Session:
    """What a run needs of its folder.

    Attributes:
      file: metrics.
      state: that the run begins with.
      start: updates that it has behind it.
      say: tells the user a line.
      peers: this process among those that run together.
      saver: keeps checkpoints; None where the run makes none.
    """

    file: MetricsFile
    state: Any
    start: int
    say: Callable[[str], None]
    peers: Peers
    saver: Saver | None = None

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.file.path.parent

    def is_saved(self, step: int) -> bool:
        """Whether a step is on the disk, whole."""
        return self.saver is not None and self.saver.holds(step)


@dataclasses.dataclass(frozen=True)
class Opening:
    """How a folder is opened.

    Attributes:
      config: what is kept, and what follows from damage.
      keep: which checkpoints stay; None for what the config says.
      record: settings, for the metrics and the checkpoints.
      decides: which of them may not change when a run goes on; None for all.
      data: whose position is saved.
      console: where the user is told.
      peers: this process among those that run together.
    """

    config: TrainConfig
    keep: Keep | None
    record: Mapping[str, Any]
    decides: Sequence[str] | None
    data: Source
    console: Console
    peers: Peers

    def choose(self, wanted: Path) -> Beginning:
        """Finds the run that is to go on, if any, and says what is to be known of the choice.

        Raises:
          CheckpointError: `config.resume` names a run that cannot go on.
        """
        terms = Terms(self.record, self.decides, self.data)
        beginning = decided(self.peers, lambda: choose_beginning(wanted, self.config, terms))
        for note in beginning.notes:
            self.console.print(Text(note), style="yellow", soft_wrap=True)
        return beginning

    @contextlib.contextmanager
    def open(
        self, beginning: Beginning, step: CompiledStep, began: float, seconds: Mapping[str, float]
    ) -> Iterator[Session]:
        """Opens the folder of a run; what the body raises is noted in its metrics.

        Args:
          beginning: new, or which one goes on.
          step: whose state it is.
          began: when this life of the run did, in seconds since 1970.
          seconds: what the time before was spent on.

        Raises:
          CheckpointError: there is no usable checkpoint to go on with, or the last save was lost.
          ProcessError: other processes have another step.
        """
        agree_on_step(self.peers, step)
        resumed, folder = beginning.resumed, made_folder(self.peers, beginning)
        checkpoints = self._checkpointer(folder, step)
        opened = time.perf_counter()
        with leaving(self.peers), contextlib.ExitStack() as inside:
            if self.config.checkpoint_every:
                inside.enter_context(checkpoints)
            if resumed:
                state, start = self._restored(checkpoints, step)
            else:
                state, start = step.init(jax.random.key(self.config.seed)), 0
            spent = {**seconds, "restore" if resumed else "init": time.perf_counter() - opened}
            after = start if resumed else None
            say = _plainly(self.console)
            told = say if self.config.on_save_error == "go_on" else None
            file = inside.enter_context(metrics_file(self.peers, folder, after, told))
            if file.broken:
                say(f"{file.path}: {_lines(file.broken)} no rows of a run, and left out")
            write_beginning(file, step.mesh, after, self.record, began, spent)
            session = Session(file, state, start, say, self.peers)
            if self.config.checkpoint_every:
                session.saver = Saver(checkpoints, self.config, self.data, file, say, start)
            with summed(file, self.console), noted(file):
                yield session
                waiting = time.perf_counter()
                if session.saver is not None:
                    session.saver.finish()
                file.write("finished", seconds=time.perf_counter() - waiting)

    def _checkpointer(self, folder: Path, step: CompiledStep) -> Checkpointer:
        axes = {
            f"params/{path}" if path else "params": names
            for path, names in step.layout.axes.items()
        }
        config, record = self.config, dict(self.record)
        keep = Keep(last=config.keep, every=config.keep_every)
        if config.keep_best:
            keep = dataclasses.replace(keep, best="bits_per_byte", best_count=config.keep_best)
        return Checkpointer(
            checkpoints_of(folder), keep=self.keep or keep, axes=axes, config=record
        )

    def _restored(self, checkpoints: Checkpointer, step: CompiledStep) -> tuple[Any, int]:
        damage, say = self.config.on_damage, self.console.print
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged step is told on the console instead
            back = checkpoints.restore(step.abstract_state, step.shardings, on_damage=damage)
        for why in back.damaged.values():
            say(Text(f"{why}\nGoing on from the step before it."), style="yellow")
        made = " × ".join(f"{axis}={size}" for axis, size in back.manifest.mesh.items())
        told = f"{checkpoints.folder.parent} at step {back.step} of {self.config.steps}, "
        told += f"saved {back.manifest.time} on mesh {made}"
        say(Text.assemble(("resumed", "bold"), f" {told}"), soft_wrap=True)
        return back.state, back.step


def _lines(numbers: Sequence[int]) -> str:
    """`line 3 is` or `lines 3, 7 are`, as a subject."""
    said = ", ".join(map(str, numbers[:4])) + (", …" if len(numbers) > 4 else "")
    return f"lines {said} are" if len(numbers) > 1 else f"line {said} is"


def _plainly(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(Text(line), soft_wrap=True)
