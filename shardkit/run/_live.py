"""The loop with what surrounds it: who is told, who may end it, what is closed behind it."""

import contextlib
import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from ..step import CompiledStep
from ._clock import Clock
from ._config import TrainConfig
from ._loop import Loop
from ._rate import Rate
from ._session import Session
from ._source import Describe, Evaluate, Source
from ._standing import check_standing, standing
from ._stop import StopRequest
from ._watch import Run, Watcher, Watchers


@dataclasses.dataclass(frozen=True)
class Live:
    """What a run declares of its loop.

    Attributes:
      config: how long, and what happens when.
      record: settings, as plain values.
      source: batches.
      evaluate: scores a state; None for never.
      watchers: are told after those that every run has.
      tokens: of one batch; None to count its rows.
      describe: says what metrics are.
      console: where the user is told.
    """

    config: TrainConfig
    record: Mapping[str, Any]
    source: Source
    evaluate: Evaluate | None
    watchers: Sequence[Watcher]
    tokens: int | None
    describe: Describe
    console: Console

    def check(self, start: int) -> None:
        """Refuses what a run from a step on cannot do, before anything is compiled."""
        check_standing(self.config, start)

    def run(self, session: Session, step: CompiledStep) -> Any:
        """Trains from where a session begins and returns the last state."""
        config, write, start = self.config, session.file.write, session.start
        rate, stop, clock = (
            Rate.of(step, self.tokens),
            StopRequest(session.peers.count > 1),
            Clock(config.steps),
        )
        always = standing(config, rate, self.describe, self.console, session.peers)
        watch = Watchers([*always, *self.watchers])

        def end(why: str) -> None:
            write("ended", why=why)
            stop.ask(why)

        folder, record = session.folder, self.record
        run = Run(
            folder, step, start, config.steps, record, write, session.say, end, session.is_saved
        )
        loop = Loop(
            step, config, clock, watch, write, rate.columns, stop, self.evaluate, session.saver
        )
        with watch.told(run, session.state):
            with stop, _closing(self.source.batches(start)) as batches:
                state = loop.run(session.state, batches, start)
            watch.finished(state)
        return state


@contextlib.contextmanager
def _closing(batches: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """Ends a generator with the block, so that what it holds, a thread perhaps, ends too."""
    try:
        yield batches
    finally:
        if isinstance(batches, Generator):
            batches.close()
