"""`Trainer`: a compiled step and its data become a run that nothing breaks."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from ..checkpoint import Keep
from ..processes import Peers
from ..step import CompiledStep, StepSpec, check_mesh_given
from ._config import TrainConfig
from ._console import labelled, show_layout, standard_output
from ._live import Live
from ._progress import describe_metrics
from ._session import Opening
from ._source import Data, Describe, Evaluate, Source, as_source
from ._watch import Watcher


@dataclasses.dataclass(frozen=True)
class Trainer:
    """One training run: it resumes, saves, evaluates, tells, and ends in order.

        trainer = sk.Trainer(step, batch_of, folder="runs/mine", config=sk.TrainConfig(steps=500))
        state = trainer.run()

    A run that was ended, at any instant and by anything, goes on when `run` is called again with
    the same declaration, in the same process or another one, on the same mesh or another one.

    Attributes:
      step: from `sk.compile_step`; or an `sk.StepSpec`, or a function that compiles one, which
        `run` compiles when everything else has been found right.
      data: `i -> batch` for update `i`, counted from 0; or an iterable that gives the same
        batches whenever it is begun, of which a run that goes on drops what it had read; or a
        `Source`, which knows its place. Batches are as `step` takes them.
      folder: of the run. One that exists is never written to, unless its run goes on: a new run
        gets the next free number behind the name.
      config: how long, what is said on the way, and what is kept.
      mesh: that a spec is compiled for; only with one.
      evaluate: `(step, state) -> metrics` of held-out data, every `config.eval_every` updates.
      watchers: who else is told of the run, in this order.
      record: settings as plain values; they are written to the metrics and the checkpoints.
      decides: names or groups of the record that must be the same when a run goes on; None for
        all of them.
      keep: which checkpoints stay; by default as `config` says, the best ones by their
        `bits_per_byte`.
      tokens: of one batch, for the speed; None to count its rows instead.
      describe: says what metrics are, for the progress line.
      console: where the run is shown; standard output by default.
      peers: from `sk.distributed`, where several processes make the updates together: process 0
        decides, shows and writes, and none goes on without the others.
    """

    step: CompiledStep | StepSpec | Callable[[], CompiledStep]
    data: Data
    folder: str | os.PathLike[str]
    config: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    _: dataclasses.KW_ONLY
    mesh: Mesh | None = None
    evaluate: Evaluate | None = None
    watchers: Sequence[Watcher] = ()
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decides: Sequence[str] | None = None
    keep: Keep | None = None
    tokens: int | None = None
    describe: Describe = describe_metrics
    console: Console = dataclasses.field(default_factory=standard_output)
    peers: Peers = dataclasses.field(default_factory=Peers)

    def __post_init__(self) -> None:
        """Checks that a spec has its mesh; silences every process but the first.

        Raises:
          StepError: a spec without a mesh, or a mesh for a step that has its own.
        """
        check_mesh_given(self.step, self.mesh)
        if self.peers.index:
            config = dataclasses.replace(self.config, sinks=(), profile=None)
            mute: dict[str, Any] = {"console": Console(quiet=True), "config": config}
            for name, value in mute.items():
                object.__setattr__(self, name, value)

    def run(self) -> Any:
        """Trains from wherever the run is to its end; returns the last state.

        Raises:
          ShardkitError: the declaration or the data cannot be used, the loss diverges, or a
            checkpoint cannot be read or written.
          KeyboardInterrupt: with notes that say what is saved and where the metrics are.
          Stopped: the same after SIGTERM.
          ProcessError: the processes do not run one and the same program.
        """
        began, source = time.time(), as_source(self.data)
        self.peers.agree("run", record=self.record, data=source.position(0))
        opening, live = self._opening(source), self._live(source)
        beginning = opening.choose(Path(self.folder))
        live.check(beginning.step)
        step, seconds = self._compiled()
        step.check_room()
        with opening.open(beginning, step, began, seconds) as session:
            show_layout(self.console, session.state)
            where = labelled("metrics", f" {session.file.path}\n")
            self.console.print(where, soft_wrap=True)
            return live.run(session, step)

    def _compiled(self) -> tuple[CompiledStep, dict[str, float]]:
        if isinstance(self.step, CompiledStep):
            return self.step, {}
        began = time.perf_counter()
        if isinstance(self.step, StepSpec):
            assert self.mesh is not None, "a spec is given with its mesh"
            step = self.step.compile(self.mesh)
        else:
            step = self.step()
        seconds = time.perf_counter() - began
        self.console.print(labelled("compiled", f" in {seconds:.1f} s"))
        return step, {"compile": seconds}

    def _opening(self, source: Source) -> Opening:
        return Opening(
            self.config, self.keep, self.record, self.decides, source, self.console, self.peers
        )

    def _live(self, source: Source) -> Live:
        return Live(
            self.config,
            self.record,
            source,
            self.evaluate,
            self.watchers,
            self.tokens,
            self.describe,
            self.console,
        )
