"""`sk.sweep`: compiles, verifies and times every mesh × accumulation × remat of a step."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._core.errors import Problem, SweepError, count, format_problems, raise_all
from .._core.io._files import local_path
from .._core.options import check_arguments
from .._core.types import Batch
from ..mesh import Target
from ._case import SweepCase, enumerate_cases
from ._case_runner import CaseRunner, is_done
from ._compilers import CaseCompiler, Factory, LocalCompiler, TargetCompiler, present_devices
from ._factories import (
    Declared,
    Steps,
    default_options,
    display_name,
    make_child_source,
    make_factory,
)
from ._journal import Journal
from ._result import Sweep
from ._row import ILLEGAL, OK, SweepRow
from ._spec_factory import plain_axes
from ._timing import time_rows

if TYPE_CHECKING:
    from ..step import CompiledStep, StepSpec

OnRow = Callable[[SweepRow, int, int], None]

_FILES = "The rows of a sweep are kept in a file."


def sweep(
    spec: "StepSpec | Factory | str | Path",
    *,
    out: str | Path | None = None,
    axes: Sequence[str] = (),
    devices: int | Sequence[int] | None = None,
    accumulate: Sequence[int] | None = None,
    remat: Sequence[str] | None = None,
    target: str | None = None,
    verify: bool = False,
    time: bool | None = None,
    batches: Sequence[Batch] | None = None,
    repeats: int = 5,
    steps_per_repeat: int = 3,
    timeout: float = 1800.0,
    record: Mapping[str, Any] | None = None,
    estimate: Callable[[SweepCase], float] | None = None,
    on_row: OnRow = lambda row, done, total: None,
) -> Sweep:
    """Compiles, and if asked verifies and times, every mesh × accumulation × remat of a step.

    A case that is illegal, fails or runs out of memory is a row with its reason. Rows are appended
    to `out/rows.jsonl` as they are made. The same call resumes an interrupted sweep, and runs
    failed cases again.

    Args:
      spec: the step, or the path of a config file. Axes that its strategy does not split get
        built-in strategies such as `sk.strategies.fsdp()`, if the strategy is made of built-in
        ones. Or `factory(mesh, *, accumulate, remat)`, which returns a `CompiledStep` or a
        `StepSpec` with exactly these options, or its name, `"module:function"`.
      out: folder, new or of this sweep; by default a new temporary one. The rows of a spec are
        distinguished from those of others by the name of its loss, its batch, mode, precision and
        kinds of parallelism. If anything else changes, put it into `record` or use a new folder.
      axes: mesh axes, in mesh order; by default those of the spec's strategy or the config's
        mesh, or those whose built-in strategies work with any model.
      devices: number of devices, or several; by default all of the process.
      accumulate: micro-batches per step; by default the spec's own, else 1.
      remat: names of checkpoint policies; by default the spec's own, else `"none"`.
      target: such as `"tpu:v5p:4x4x4"`: each case is compiled in a child process for devices that
        need not be present. This takes a config, or a factory at the top of a module, which is
        called with a `MeshSpec` and returns a `StepSpec`.
      verify: also compare every legal case with one device, as `sk.verify` does.
      time: also time the updates, interleaved; by default if the devices are real. Times on
        simulated devices are marked as such, and are not a speed claim.
      batches: host batches for verifying and timing; by default generated from the declared
        shapes.
      repeats: number of times that each case is timed.
      steps_per_repeat: timed updates of one repeat, after one that warms up.
      timeout: seconds for one compile in a child process.
      record: plain values that distinguish this sweep from others: rows of another one are
        refused.
      estimate: case → bytes per device by a model of yours, drawn beside the compiled bytes; by
        default the model of `sk.plan`.
      on_row: called with each new row, the number of rows done and of all rows; again with each
        timed row, the number timed and of all to be timed.

    Returns:
      The rows, ranked; `print` it.

    Raises:
      SweepError: there is no case, or no legal one; `out` holds something else, another sweep
        writes to it, or it cannot be written; or the devices are not available.
      ConfigError: the config is not valid or has none of the axes, or the factory does not exist.

    >>> import jax, jax.numpy as jnp, optax, tempfile
    >>> from shardkit.parallel import strategies
    >>> from shardkit.step import StepSpec
    >>> spec = StepSpec(
    ...     loss_fn=lambda params, batch, key: jnp.mean((batch @ params["w"]) ** 2),
    ...     optimizer=optax.sgd(0.1), init=lambda key: {"w": jax.random.normal(key, (4, 2))},
    ...     batch=jnp.ones((4, 4)), strategy=strategies.data())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     swept = sweep(spec, out=folder, devices=(1, 2), accumulate=(1, 4))
    >>> [(row.case.key, row.status) for row in swept.rows][-1]
    ('data=2 accumulate=4 remat=none', 'illegal')
    >>> swept.ranked_by, len(swept.ranked)
    ('compiled wire bytes', 3)
    """
    check_arguments(
        SweepError,
        "The sweep is declared wrongly.",
        out=(out, str | Path | None),
        axes=(axes, Sequence[str]),
        devices=(devices, int | Sequence[int] | None),
        accumulate=(accumulate, Sequence[int] | None),
        remat=(remat, Sequence[str] | None),
        target=(target, str | None),
        verify=(verify, bool),
        time=(time, bool | None),
        batches=(batches, Sequence[Any] | None),
        repeats=(repeats, int),
        steps_per_repeat=(steps_per_repeat, int),
        timeout=(timeout, float),
    )
    folder = None if out is None else local_path(out, SweepError, _FILES)
    factory = make_factory(spec)
    counts = _device_counts(devices, target)
    micro, policy = default_options(factory)
    accumulate = (micro,) if accumulate is None else accumulate
    remat = (policy,) if remat is None else remat
    planned = _enumerate(factory, axes, counts, accumulate, remat)
    _check_request(
        target, verify=verify, time=time, repeats=repeats, steps_per_repeat=steps_per_repeat
    )
    compiler = _make_compiler(factory, target, counts, planned, timeout)
    on_real = target is None and compiler.device_info["platform"] != "cpu"
    timed = on_real if time is None else time
    runner = CaseRunner(compiler, verify, batches, estimate)
    folder = folder or Path(tempfile.mkdtemp(prefix="shardkit-sweep-"))
    with Journal(folder, _identity(factory, compiler, record)) as journal:
        run = SweepRun(journal, runner, planned, on_row)
        with _note_resume(journal, len(planned)):
            steps = run.compile(verify=verify, timed=timed)
            run.time(steps, batches, repeats, steps_per_repeat)
        rows = tuple(journal.rows[case.key] for case in planned)
        swept = Sweep(rows, folder, _title(factory, compiler))
        swept.write_csv()
    _check_some_legal(swept)
    return swept


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """A sweep under way."""

    journal: Journal  # the rows, those of earlier runs included
    runner: CaseRunner  # runs single cases
    cases: Sequence[SweepCase]  # all cases of the sweep
    on_row: OnRow  # called with each new row

    def compile(self, *, verify: bool, timed: bool) -> dict[str, "CompiledStep"]:
        """Runs the cases that have no complete row; returns the steps to be timed."""
        rows, steps, total = self.journal.rows, {}, len(self.cases)
        todo = [c for c in self.cases if not is_done(rows.get(c.key), prove=verify, timed=timed)]
        for done, case in enumerate(todo, total - len(todo) + 1):
            row, step = self.runner.run_case(case, rows.get(case.key))
            self.journal.add(row)
            self.on_row(row, done, total)
            if timed and step is not None and row.status == OK:
                steps[case.key] = step
        return steps

    def time(
        self,
        steps: Mapping[str, "CompiledStep"],
        batches: Sequence[Batch] | None,
        repeats: int,
        steps_per_repeat: int,
    ) -> None:
        """Times steps interleaved."""
        rows = {key: self.journal.rows[key] for key in steps}
        for done, row in enumerate(time_rows(rows, steps, batches, repeats, steps_per_repeat), 1):
            self.journal.add(row)
            self.on_row(row, done, len(steps))


@contextlib.contextmanager
def _note_resume(journal: Journal, total: int) -> Iterator[None]:
    """Adds to a KeyboardInterrupt what is kept."""
    try:
        yield
    except KeyboardInterrupt as stop:
        rows = count(len(journal.rows), "row")
        stop.add_note(f"{rows} of {total} in {journal.folder}; the same call resumes the sweep.")
        raise


def _device_counts(devices: int | Sequence[int] | None, target: str | None) -> list[int]:
    """Numbers of devices: `devices`, or all of the target or the process."""
    available = Target.parse(target).n_devices if target else None
    if devices is None:
        return [available or len(present_devices(()))]
    counts = [devices] if isinstance(devices, int) else list(devices)
    if available and counts != [available]:
        why = f"target {target} has {count(available, 'device')}"
        fix = f"leave devices out, or another target for {counts[0]}"
        raise SweepError.of("Devices and target do not agree.", f"devices={counts}", why, fix)
    return counts


def _enumerate(
    factory: Steps,
    axes: Sequence[str],
    counts: Sequence[int],
    accumulate: Sequence[int],
    remat: Sequence[str],
) -> list[SweepCase]:
    if not isinstance(factory, Declared):
        return enumerate_cases(counts, axes or plain_axes(), accumulate, remat)
    selected = factory.select_axes(axes)
    units = tuple((axis, 1) for axis in factory.unit_axes(selected))
    planned = enumerate_cases(counts, selected, accumulate, remat)
    return [dataclasses.replace(case, mesh=units + case.mesh) for case in planned]


def _check_request(
    target: str | None, *, verify: bool, time: bool | None, repeats: int, steps_per_repeat: int
) -> None:
    problems = []
    if target is not None:
        why = f"needs devices that run; cases for {target} are only compiled"
        fix = "leave it out, or run on the target's own machine without target="
        options = {"verify": verify, "time": bool(time)}
        problems += [Problem(name, why, fix) for name, is_set in options.items() if is_set]
    if min(repeats, steps_per_repeat) < 1 or repeats * steps_per_repeat < 2:
        given = f"repeats={repeats}, steps_per_repeat={steps_per_repeat}"
        why, fix = "a median needs at least two timed updates", "repeats=5, steps_per_repeat=3"
        problems.append(Problem(given, why, fix))
    raise_all(SweepError, "The options of the sweep contradict each other.", problems)


def _make_compiler(
    factory: Steps,
    target: str | None,
    counts: Sequence[int],
    planned: Sequence[SweepCase],
    timeout: float,
) -> CaseCompiler:
    if target is None:
        return LocalCompiler(factory, present_devices(counts))
    make_child_source(factory, planned[0])  # refuses a factory without a name before it writes
    return TargetCompiler(factory, lambda case: make_child_source(factory, case), target, timeout)


def _identity(
    factory: Steps, compiler: CaseCompiler, record: Mapping[str, Any] | None
) -> dict[str, Any]:
    own = factory.record() if isinstance(factory, Declared) else {"factory": display_name(factory)}
    try:
        json.dumps(record or {})
    except (TypeError, ValueError) as error:
        problem = Problem(f"record={record!r}", str(error), 'record={"data": "v2", "width": 512}')
        headline = "The record of a sweep must be plain values."
        raise SweepError(format_problems(headline, [problem])) from None
    return {**own, **(record or {}), "on": dict(compiler.device_info)}


def _title(factory: Steps, compiler: CaseCompiler) -> str:
    where = compiler.device_info.get("device_kind") or compiler.device_info["target"]
    return f"Sweep of {display_name(factory)} on {where}."


def _check_some_legal(swept: Sweep) -> None:
    """Raises SweepError with every distinct reason if no case was legal; the rows are written."""
    if any(row.status != ILLEGAL for row in swept.rows):
        return
    first: dict[str, SweepRow] = {}
    for row in swept.rows:
        first.setdefault(row.reason, row)
    problems = [
        Problem(row.case.key, why, _first_fix(row.error)) for why, row in list(first.items())[:8]
    ]
    headline = f"None of {count(len(swept.rows), 'case')} is legal; see {swept.folder}."
    raise SweepError(format_problems(headline, problems))


def _first_fix(message: str) -> str:
    """The first fix of an error message."""
    _, _, fixes = message.partition("\nFix:")
    return fixes.strip().removeprefix("- ").partition("\n")[0]
