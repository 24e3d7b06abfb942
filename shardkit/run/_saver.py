"""When a run saves, and what it does when it cannot."""

from collections.abc import Callable, Mapping
from typing import Any

from .._errors import CheckpointError, Problem, format_problems
from ..checkpoint import Checkpointer
from ._config import TrainConfig
from ._folder import MetricsFile
from ._source import Source


class Saver:
    """Saves as a `TrainConfig` declares."""

    def __init__(
        self,
        checkpoints: Checkpointer,
        loop: TrainConfig,
        data: Source,
        file: MetricsFile,
        say: Callable[[str], None],
        at: int = 0,
    ) -> None:
        """Takes a checkpointer inside its `with` block.

        Args:
          checkpoints: where to.
          loop: when, and what follows from an error.
          data: whose position is saved.
          file: metrics, on the disk before the checkpoint that they belong to.
          say: tells the user.
          at: step that the run starts from, saved already; 0 for a new run.
        """
        self._checkpoints, self._loop, self._data = checkpoints, loop, data
        self._file, self._say = file, say
        self._asked = at

    def due(self, done: int) -> bool:
        """Whether a step is to be saved."""
        every = self._loop.checkpoint_every
        return bool(every) and (done % every == 0 or done == self._loop.steps)

    def holds(self, step: int) -> bool:
        """Whether a step is on the disk, whole."""
        return step in self._checkpoints.steps()

    def save(self, done: int, state: Any, metrics: Mapping[str, float]) -> None:
        """Saves a state in the background, unless it is saved already.

        Raises:
          CheckpointError: this save or the one before cannot be made, and the run is to stop.
        """
        if done == self._asked:
            return
        self._file.sync()
        self._guarded(self._checkpoints.wait)
        self._asked = done
        data = self._data.position(done)
        self._guarded(lambda: self._checkpoints.save(done, state, data=data, metrics=metrics))

    def finish(self) -> str:
        """Waits for the last save and says, for the user, what is on the disk.

        Raises:
          CheckpointError: the last save was lost.
        """
        self._guarded(self._checkpoints.wait)
        if not self.holds(self._asked):
            problem = Problem(f"step {self._asked}", f"is not in {self._checkpoints.folder}")
            fix = "room on the disk; the same command then goes on from the newest checkpoint"
            raise CheckpointError(format_problems("The last save was lost.", [problem], fix))
        return f"Step {self._asked} is saved; the same command goes on from it."

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except CheckpointError as error:
            if self._loop.on_save_error == "stop":
                raise
            self._file.write("save_failed", why=str(error))
            self._say(f"{error}\nThe run goes on (train.on_save_error=go_on).")
