"""A run of several processes: one decides and writes, each tells the others how far it is."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .._tree import leaves_by_path, short_type
from ..processes import Peers
from ..step import CompiledStep
from ._folder import METRICS, MetricsFile, new_folder
from ._resume import Beginning
from ._stop import Stopped
from ._watch import Numbers, Run, Watcher


class TellPeers(Watcher):
    """Passes the events of a run on to the watch that processes keep over each other."""

    def __init__(self, peers: Peers) -> None:
        """Takes this process among the others."""
        self._peers = peers

    def begin(self, run: Run, state: Any) -> None:
        """From here on, something has to happen within the step timeout."""
        self._peers.began(run.start)

    def dispatched(self, step: int, state: Any, batch: Any) -> None:
        """An update was begun."""
        self._peers.began(step)

    def read(self, numbers: Numbers) -> None:
        """An update was finished."""
        self._peers.moved()

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """An evaluation was finished."""
        self._peers.moved()

    def saved(self, step: int) -> None:
        """A save was begun."""
        self._peers.moved()

    def finished(self, state: Any) -> None:
        """What comes now may take as long as it wants."""
        self._peers.rest()

    def end(self, error: BaseException | None) -> None:
        """Tells of an error at once: what is still to be closed may wait for the others."""
        if error is not None and not isinstance(error, Stopped):
            self._peers.fail(error)


class Unwritten(MetricsFile):
    """The metrics of a process that leaves the writing to process 0."""

    def __init__(self, folder: Path) -> None:
        """Opens nothing."""
        self.path = folder / METRICS
        self.before, self.void, self.broken = [], [], []

    def sync(self) -> None:
        """Does nothing."""

    def write(self, kind: str, **values: Any) -> None:
        """Does nothing."""

    def __exit__(self, *error: object) -> None:
        """Closes nothing."""


def metrics_file(
    peers: Peers, folder: Path, after: int | None, told: Callable[[str], None] | None
) -> MetricsFile:
    """The metrics of a run, which one process writes."""
    return MetricsFile(folder, after, told) if peers.index == 0 else Unwritten(folder)


def decided(peers: Peers, choose: Callable[[], Beginning]) -> Beginning:
    """What process 0 chooses, in all processes.

    Raises:
      ShardkitError: it could not; in process 0 alone, whose end the others hear of.
    """
    told: dict[str, Any] | None = None
    if peers.index == 0:
        beginning = choose()
        told = {"wanted": str(beginning.wanted), "resumed": beginning.resumed}
        told |= {"step": beginning.step, "notes": list(beginning.notes)}
    first = peers.gather("beginning", told)[0]
    return Beginning(Path(first["wanted"]), first["resumed"], first["step"], tuple(first["notes"]))


def made_folder(peers: Peers, beginning: Beginning) -> Path:
    """The folder of a run, which process 0 makes for a new one."""
    made = None
    if peers.index == 0:
        made = str(beginning.wanted if beginning.resumed else new_folder(beginning.wanted))
    return Path(peers.gather("folder", made)[0])


@contextlib.contextmanager
def leaving(peers: Peers) -> Iterator[None]:
    """Ends a block that all processes leave after the same update, because they were told to."""
    try:
        yield
    except Stopped:
        peers.leave()
        raise


def agree_on_step(peers: Peers, step: CompiledStep) -> None:
    """Stops all processes before the first update unless they compiled one and the same program.

    Raises:
      ProcessError: with each difference.
    """
    batch = leaves_by_path(step.layout.batch)
    types = {path: short_type(x.shape, x.dtype) for path, x in batch.items()}
    peers.agree("step", batch=types, mesh=dict(step.mesh.shape), program=step.program.digest)
