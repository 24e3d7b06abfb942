"""The loop with what surrounds it: who shows it, who keeps its states, who may end it."""

from typing import Any

from rich.console import Console

from ..data import Text
from ._config import TrainConfig
from ._console import LiveShow
from ._loop import Step, run_steps
from ._session import Session
from ._stop import StopRequest


def run_live(
    session: Session, step: Step, text: Text, loop: TrainConfig, console: Console, simulated: bool
) -> Any:
    """Trains from where a session begins and returns the last state.

    Raises:
      StepError: the loss is not finite.
      CheckpointError: a save was lost, and the run is to stop then.
      KeyboardInterrupt: after Ctrl-C, with the state saved.
      Stopped: after SIGTERM, with the state saved.
    """
    live = LiveShow(console, loop.steps, loop.log_every, simulated)
    with StopRequest() as stop, live:
        return run_steps(
            step,
            session.state,
            text,
            loop,
            session.file,
            live,
            start=session.start,
            saver=session.saver,
            stop=stop,
        )
