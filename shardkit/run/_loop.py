"""The loop itself: dispatch an update, then read the metrics of the one before."""

import contextlib
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from .._core.errors import DataError, Problem, StepError, format_problems
from ..processes import ProcessGroup
from ..step import CompiledStep
from ._clock import Clock
from ._folder import RunFolder
from ._source import Evaluate, to_host_arrays
from ._state_metrics import add_state_metrics, find_state_metrics
from ._stop import StopRequest
from ._throughput import Throughput
from .callbacks._callback import Callback, RunContext

# Columns of a metrics row that are not metrics of the step.
_RESERVED = frozenset(
    "kind step time seconds data_seconds mfu rows_per_second tokens_per_second".split()
)


def state_metric_problems(declared: Mapping[str, str]) -> list[Problem]:
    """What is wrong with `Trainer.metrics` whatever the state: names that other columns have."""
    taken = {*_RESERVED, "loss", "grad_norm"} & declared.keys()
    fix = 'metrics={"lr": "opt_state/**/learning_rate"}'
    why = "is already a column of metrics.jsonl"
    return [Problem(f"metrics[{name!r}]", why, fix) for name in sorted(taken)]


class Loop:
    """Makes the updates of a run, and calls its callbacks."""

    def __init__(
        self,
        step: CompiledStep,
        folder: RunFolder,
        callbacks: Sequence[Callback],
        *,
        evaluate: Evaluate | None = None,
        tokens: int | None = None,
        metrics: Mapping[str, str] = MappingProxyType({}),
        process_group: ProcessGroup,
    ) -> None:
        """Starts the clock of the first update.

        `tokens` of one batch give the speed; None counts rows. `metrics` names a glob of one scalar
        of the state for each column that rows get besides. Raises ConfigError if a glob matches
        none, or several.
        """
        self._state_metrics = find_state_metrics(metrics, step.abstract_state) if metrics else {}
        self._step, self._folder, self._callbacks = step, folder, callbacks
        self._config, self._write = folder.config, folder.metrics.write
        self._evaluate_state = evaluate
        self._throughput = Throughput.of(step, tokens)
        self._several = process_group.count > 1
        self._clock, self._stop = Clock(self._config.steps), StopRequest(self._several)
        self._process_group = process_group

    def run(self, state: Any) -> Any:
        """Makes all updates after `folder.start`, between the callbacks' first and last event."""
        folder, context = self._folder, self._make_context()
        with contextlib.ExitStack() as stack:
            for callback in self._callbacks:
                callback.on_start(context, state)
                # Only callbacks that were started are told of the end, the last one first.
                stack.push(lambda kind, error, trace, call=callback.on_exit: call(error))
            with self._stop:
                if not folder.scored and self._is_eval_due(folder.start):
                    self._evaluate(folder.start, state)  # which an interrupt has left out
                with _close_generator(folder.source.batches(folder.start)) as batches:
                    state = self._make_updates(state, batches)
                # A signal behind the last update ends the run before it is scored.
                self._stop.is_requested()
                self._stop.raise_for_signal(folder.finish_saving)
                if not self._several:
                    with self._stop.raise_at_once(folder.finish_saving):
                        self._finish(state)
            if self._several:  # a signal now ends each process on its own, so the save comes first
                folder.finish_saving()
                self._finish(state)
        return state

    def _finish(self, state: Any) -> None:
        for callback in self._callbacks:
            callback.on_finish(state)

    def _make_context(self) -> RunContext:
        folder = self._folder

        def stop(why: str) -> None:
            self._write("ended", why=why)
            self._stop.request(why)

        return RunContext(
            folder=folder.path,
            step=self._step,
            throughput=self._throughput,
            start=folder.start,
            steps=self._config.steps,
            record=folder.record,
            write=self._write,
            say=folder.say,
            stop=stop,
            is_saved=folder.is_saved,
        )

    def _make_updates(self, state: Any, batches: Iterator[Any]) -> Any:
        """Makes updates `start + 1` to `config.steps` and returns the last state.

        The metrics of an update are read when the next one has been dispatched, so that devices
        never wait for the host:

            dispatch 1 · dispatch 2, read 1 · dispatch 3, read 2, read 3, evaluate, save · …

        An evaluation and a save wait for their update, since the metrics file must hold every
        update of a checkpoint. A signal leaves an evaluation out; the run makes it when it resumes.
        """
        pending: tuple[int, Mapping[str, Any]] | None = None
        for done in range(self._folder.start + 1, self._config.steps + 1):
            with self._clock.time_data():
                batch = self._step.shard_batch(self._next_batch(batches, done))
            # Those of the first update may compile for long: a check of its gradient.
            first = done == self._folder.start + 1
            finish = self._folder.finish_saving
            with self._stop.raise_at_once(finish) if first else contextlib.nullcontext():
                with self._clock.exclude():
                    for callback in self._callbacks:
                        callback.on_batch(done, state, batch)
            state, metrics = self._step(state, batch)
            metrics = add_state_metrics(metrics, self._state_metrics, state)
            for callback in self._callbacks:
                callback.on_dispatch(done, state, batch)
            if pending is not None:
                self._report_step(*pending)
            pending = (done, metrics)
            stopping = self._is_stopping(done)
            saving = self._folder.is_save_due(done) or (stopping and self._folder.can_save)
            scoring = self._is_eval_due(done) and self._stop.signal is None
            if not (scoring or saving or stopping):
                continue
            self._report_step(*pending)
            pending = None
            scores = self._evaluate(done, state) if scoring else {}
            if saving:
                self._save(done, state, scores)
            if stopping:
                self._stop.raise_for_signal(self._folder.finish_saving)
                return state
        if pending is not None:
            self._report_step(*pending)
        return state

    def _is_stopping(self, done: int) -> bool:
        """Whether to stop after this update; a process whose callbacks do not stop it is named."""
        stopping = self._stop.is_requested()
        if self._stop.why is not None:
            self._process_group.gather(f"the stop after update {done}", None)
        return stopping

    def _is_eval_due(self, done: int) -> bool:
        every = self._config.eval_every if self._evaluate_state else 0
        return bool(every) and (done % every == 0 or done == self._config.steps)

    def _next_batch(self, batches: Iterator[Any], done: int) -> Any:
        try:
            return to_host_arrays(next(batches))
        except StopIteration:
            why = f"gave {done - 1} batches for a run of {self._config.steps} updates"
            fix = f"TrainConfig(steps={done - 1}), or data that repeats"
            fix = fix if done > 1 else "data that yields a batch each time it is iterated"
            raise DataError.of("The data ended too early.", "the data", why, fix) from None

    def _report_step(self, done: int, metrics: Mapping[str, Any]) -> None:
        finished = self._clock.finish_step(done, {name: float(x) for name, x in metrics.items()})
        speed = self._throughput.columns(finished.seconds)
        times = {"seconds": finished.seconds, "data_seconds": finished.data_seconds}
        columns = _make_columns(finished.values, "loss")
        self._write("step", step=done, **columns, **times, **speed)
        for callback in self._callbacks:
            callback.on_step(finished)

    def _evaluate(self, done: int, state: Any) -> Mapping[str, float]:
        assert self._evaluate_state is not None

        def save() -> str:
            if self._folder.can_save and done > self._folder.start:
                self._save(done, state, {})
            return self._folder.finish_saving()

        with self._clock.exclude() as spent, self._stop.raise_at_once(save):
            scores = self._evaluate_state(self._step, state)
            if not isinstance(scores, Mapping):
                why = f"returns a {type(scores).__name__}, not a dict of scalars"
                headline, fix = "The evaluation cannot be recorded.", "return {name: scalar}"
                raise StepError.of(headline, "evaluate", why, fix)
            values = {name: float(x) for name, x in scores.items()}
        self._write("eval", step=done, **_make_columns(values, "evaluation"), **spent)
        for callback in self._callbacks:
            callback.on_eval(done, values)
        return values

    def _save(self, done: int, state: Any, scores: Mapping[str, float]) -> None:
        with self._clock.exclude() as spent:
            self._folder.save(done, state, scores)
        self._write("save", step=done, **spent)
        for callback in self._callbacks:
            callback.on_save(done)


def _make_columns(values: Mapping[str, float], of: str) -> dict[str, float | None]:
    """Returns metrics as columns; what is NaN or infinite is None, as JSON requires."""
    if reserved := _RESERVED & values.keys():
        why = "is already a column of metrics.jsonl"
        problems = [Problem(name, why) for name in sorted(reserved)]
        fix = f'another name in the metrics that the {of} returns: {{"my_seconds": ...}}'
        raise StepError(format_problems(f"The {of} returns reserved names.", problems, fix))
    return {name: x if math.isfinite(x) else None for name, x in values.items()}


@contextlib.contextmanager
def _close_generator(batches: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """Closes a generator behind the block, and with it what it holds, such as a thread."""
    try:
        yield batches
    finally:
        if isinstance(batches, Generator):
            batches.close()
