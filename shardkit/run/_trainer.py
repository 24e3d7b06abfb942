"""`Trainer`: a compiled step and its data as a run that can be interrupted at any time."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console
from rich.text import Text

from .._core.errors import ConfigError, Problem, raise_all
from .._core.interrupts import guard_script
from .._core.io._console import show_task
from .._core.io._files import local_path
from .._core.options import check_arguments, copy_plain
from .._core.signatures import call_problem
from .._core.types import Params, PyTree
from ..processes import ProcessGroup
from ..step import CompiledStep, StepSpec, check_mesh_given
from ._config import RetentionPolicy, TrainConfig
from ._console import label_text, show_layout, standard_output
from ._facts import agree_on_run, agree_on_step
from ._folder import open_run_folder
from ._loop import Loop, state_metric_problems
from ._resume import FACTS, ResumeDecision, decide_resume
from ._source import BatchSource, Data, DataSource, Evaluate, as_source
from .callbacks import Callback, Describe, check_callbacks, default_callbacks, describe_metrics


@dataclasses.dataclass(frozen=True)
class Trainer:
    """One training run: it trains, evaluates, reports, saves and resumes.

        trainer = sk.Trainer(step, batch_of, folder="runs/mine", config=sk.TrainConfig(steps=500))
        state = trainer.run()

    Run the same program again to resume an interrupted run, on the same mesh or on another one.

    Attributes:
      step: from `sk.compile_step`; or an `sk.StepSpec`, or a function that compiles one, compiled
        once everything else has been checked.
      data: `i -> batch` for update `i`, counted from 0; or an iterable that yields the same
        batches each time, of which a resumed run skips the first ones (not a generator); or what
        can start anywhere: an `sk.data.Arrays`, or any other `sk.data.BatchSource`. Batches are as
        `step` takes them.
      folder: of the run. An existing folder is never written to unless its run resumes: a new
        run gets `folder-2`, `folder-3`, ….
      config: how long the run is, what it reports, and what it keeps.
      mesh: that a spec is compiled for; only with one.
      evaluate: `(step, state) -> metrics` of validation data, every `config.eval_every` updates
        and after the last one.
      callbacks: called in this order, after those that every run has.
      record: settings as plain values, written to the metrics and the checkpoints.
      decides: names or groups of the record that must be the same to resume; None for all.
      retention: which checkpoints to keep; by default as `config` says, the best ones by
        `bits_per_byte`.
      metrics: `{name: glob}` of scalars of the state that each row of an update gets besides, such
        as `{"lr": "opt_state/**/learning_rate"}` with `optax.inject_hyperparams`.
      tokens: of one batch, for the speed; None to count rows instead.
      describe: formats metrics for the progress line.
      console: where the run is shown; standard output by default.
      params: pretrained parameters that a new run starts from, as for `step.init`.
      model_state: the same for the model state.
      load_params: `(step) -> params`, called for a new run in place of `params`, once its step is
        compiled and fits; a run that resumes reads no weights.
      process_group: from `sk.distributed`, if several processes make the updates together.
        Process 0 decides, shows and writes; all processes end together.
    """

    step: CompiledStep | StepSpec | Callable[[], CompiledStep]
    data: Data
    folder: str | os.PathLike[str]
    config: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    _: dataclasses.KW_ONLY
    mesh: Mesh | None = None
    evaluate: Evaluate | None = None
    callbacks: Sequence[Callback] = ()
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decides: Sequence[str] | None = None
    retention: RetentionPolicy | None = None
    metrics: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tokens: int | None = None
    describe: Describe = describe_metrics
    console: Console = dataclasses.field(default_factory=standard_output)
    params: Params | None = None
    model_state: PyTree | None = None
    load_params: Callable[[CompiledStep], Params] | None = None
    process_group: ProcessGroup = dataclasses.field(default_factory=ProcessGroup)

    def __post_init__(self) -> None:
        """Checks that a spec has its mesh; silences every process but the first.

        Raises:
          ConfigError: an option is of another type, the folder is a URL, the record is not plain,
            or a name of record or metrics is reserved.
          StepError: a spec without a mesh, or a mesh for a step that has its own.
        """
        headline = "The run is declared wrongly."
        check_arguments(
            ConfigError,
            headline,
            step=(self.step, StepSpec | Callable[..., Any]),
            data=(self.data, Data),
            folder=(self.folder, str | os.PathLike[str]),
            config=(self.config, TrainConfig),
            evaluate=(self.evaluate, Callable[..., Any] | None),
            callbacks=(self.callbacks, Sequence[Any]),
            record=(self.record, Mapping[str, Any]),
            metrics=(self.metrics, Mapping[str, str]),
            decides=(self.decides, Sequence[str] | None),
            retention=(self.retention, RetentionPolicy | None),
            tokens=(self.tokens, int | None),
            describe=(self.describe, Callable[..., Any]),
            load_params=(self.load_params, Callable[..., Any] | None),
        )
        folder = local_path(self.folder, ConfigError, "A run is kept in files.")
        record = copy_plain(ConfigError, headline, record=self.record)["record"]
        problems = [*state_metric_problems(self.metrics), *self._call_problems()]
        if self.params is not None and self.load_params is not None:
            problems.append(Problem("params", "are given, and load_params= too", "one of them"))
        if FACTS in record:
            why = "is where checkpoints keep what decides the numbers besides the record"
            problems.append(Problem(f"record[{FACTS!r}]", why, 'record={"my_run": ...}'))
        raise_all(ConfigError, headline, problems)
        object.__setattr__(self, "folder", folder)
        object.__setattr__(self, "record", record)
        check_mesh_given(self.step, self.mesh)
        if self.process_group.index:
            config = dataclasses.replace(self.config, loggers=(), profile=None)
            mute: dict[str, Any] = {"console": Console(quiet=True), "config": config}
            for name, value in mute.items():
                object.__setattr__(self, name, value)

    def _call_problems(self) -> Iterator[Problem]:
        """Functions that cannot be called as a run calls them."""
        functions: dict[str, tuple[Any, tuple[str, ...]]] = {
            "evaluate": (self.evaluate, ("step", "state")),
            "load_params": (self.load_params, ("step",)),
        }
        if not isinstance(self.data, BatchSource | DataSource):
            functions["data"] = (self.data if callable(self.data) else None, ("i",))
        for name, (function, arguments) in functions.items():
            if function is not None and (why := call_problem(function, arguments)):
                yield Problem(name, why, f"{name}=lambda {', '.join(arguments)}: ...")

    def run(self) -> Any:
        """Trains from the start, or from the newest checkpoint, and returns the last state.

        Raises:
          ShardkitError: the declaration or the data cannot be used, the loss diverges, or a
            checkpoint cannot be read or written.
          KeyboardInterrupt: after Ctrl-C, with notes that say what is saved and where metrics are.
            While a script compiles, Ctrl-C ends its process with code 130.
          Stopped: the same after SIGTERM.
          ProcessError: the processes do not run the same program.
        """
        with guard_script():
            return self._run()

    def _run(self) -> Any:
        began, source, config, process_group = (
            time.time(),
            as_source(
                self.data, lambda: step.batch_shardings, resumable=self.config.checkpoint_every > 0
            ),
            self.config,
            self.process_group,
        )
        process_group.begin()
        shared: dict[str, Any] = {"record": self.record, "process_group": process_group}
        declared = {"record": self.record, "evaluates": self.evaluate is not None}
        facts = agree_on_run(process_group, config, data=source.state(0), **declared)

        def decide(told: Sequence[str] = ()) -> ResumeDecision:
            decision = decide_resume(
                Path(self.folder), config, source, decides=self.decides, facts=facts, **shared
            )
            for note in decision.notes:
                if note not in told:
                    self.console.print(Text(note), style="yellow", soft_wrap=True)
            check_callbacks(config, decision.step)
            return decision

        decision = decide()
        step, seconds = self._compile()
        facts = {**facts, **agree_on_step(process_group, step, decision.facts)}
        if decision.resumed:  # loss and optimizer are known only now
            decision = decide(decision.notes)
        step.check_memory()
        with open_run_folder(
            decision,
            step,
            config=config,
            retention=self.retention,
            source=source,
            console=self.console,
            facts=facts,
            began=began,
            seconds=seconds,
            given=functools.partial(self._given, step),
            **shared,
        ) as (folder, state):
            process_group.begin(folder.start)
            show_layout(self.console, state)
            path = label_text("metrics", f" {folder.metrics.path}\n")
            self.console.print(path, soft_wrap=True)
            callbacks = default_callbacks(config, self.describe, self.console, process_group)
            loop = Loop(
                step,
                folder,
                [*callbacks, *self.callbacks],
                evaluate=self.evaluate,
                tokens=self.tokens,
                metrics=self.metrics,
                process_group=process_group,
            )
            return loop.run(state)

    def _given(self, step: CompiledStep) -> Mapping[str, Any]:
        """Keywords of `step.init` for a new run."""
        params = self.params if self.load_params is None else self.load_params(step)
        return {"params": params, "model_state": self.model_state}

    def __repr__(self) -> str:
        return f"Trainer({str(self.folder)!r}, {self.config.steps} updates)"

    def _compile(self) -> tuple[CompiledStep, dict[str, float]]:
        """Returns the step, and the seconds that compiling it took by cause."""
        if isinstance(self.step, CompiledStep):
            return self.step, {}
        began = time.perf_counter()
        with show_task(self.console, "compiling"):
            if isinstance(self.step, StepSpec):
                assert self.mesh is not None, "a spec is given with its mesh"
                step = self.step.compile(self.mesh)
            else:
                step = self.step()
        seconds = time.perf_counter() - began
        self.console.print(label_text("compiled", f" in {seconds:.1f} s"))
        return step, {"compile": seconds}
