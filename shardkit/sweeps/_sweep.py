"""`sweep`: every mesh × accumulation × remat of a step, compiled, proved, timed, written down."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._core.errors import Problem, SweepError, count, format_problems, raise_all
from ..mesh import Target
from ._attempt import CaseRunner
from ._case import SweepCase, enumerate_cases
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
from ._row import ILLEGAL, SweepRow
from ._run import OnRow, SweepRun
from ._spec_factory import plain_axes

if TYPE_CHECKING:
    from ..step import StepSpec


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
    batches: Sequence[Any] | None = None,
    repeats: int = 5,
    steps_per_repeat: int = 3,
    timeout: float = 1800.0,
    record: Mapping[str, Any] | None = None,
    estimate: Callable[[SweepCase], float] | None = None,
    on_row: OnRow = lambda row, done, total: None,
) -> Sweep:
    """Tries every mesh of some axes × accumulation × remat, and writes down what becomes of each.

    A case that is illegal, fails or runs out of memory is a row with its reason. Rows are written
    to `out/rows.jsonl` as they are made; called again, the sweep goes on where it was ended, and
    tries again what failed.

    Args:
      spec: the step, or the path of a config file; its strategy, where it is made of ready ones,
        is joined with `sk.strategies.fsdp()` and its like for axes that it has none for. Or
        `factory(mesh, *, accumulate, remat)`, which returns a `CompiledStep` or a `StepSpec` of
        just these, or its name, `"module:function"`.
      out: folder, new or of this sweep; by default a new one for temporary files. The rows of a
        spec are told from those of others by the name of its loss, its batch, mode, precision and
        kinds of parallelism: where anything else changes, say it in `record` or give a new folder.
      axes: mesh axes, in mesh order; those that the spec's strategy names or of the config's mesh,
        or those of the ready strategies that lay out any model.
      devices: number of devices, or several; all of the process by default.
      accumulate: micro-batches per step; by default the spec's own, else 1.
      remat: names of checkpoint policies; by default the spec's own, else `"none"`.
      target: `"tpu:v5p:4x4x4"` and its like: each case is compiled in a child process for
        devices that need not be here. That takes a config, or a factory at the top of a module,
        which is given a `MeshSpec` and returns a `StepSpec`.
      verify: also compare every legal case with one device, as `sk.verify` does.
      time: also time the updates, in turns; by default where devices are real. On simulated
        ones the times say so, and are no speed claim.
      batches: host batches for proof and timing; made up from the declared shapes by default.
      repeats: how often each case has its turn.
      steps_per_repeat: timed updates of a turn, behind one that warms up.
      timeout: seconds for one compile in a child process.
      record: plain values that tell this sweep from others, beside its name: rows of
        another one are refused.
      estimate: case → bytes per device by a model of yours, to be drawn beside the compiled ones;
        by default the model of `sk.plan`.
      on_row: called with each row that is made, the number done and the number of all; again
        with each that is timed, the number of these and of all to be timed.

    Returns:
      The rows, ranked; `print` it.

    Raises:
      SweepError: there is nothing to try, no case is legal, `out` holds something else or another
        sweep is writing to it, it cannot be written, or the devices are not there.
      ConfigError: the config cannot be used, or has none of the axes; or there is no such factory.

    >>> import jax, jax.numpy as jnp, optax, tempfile
    >>> from shardkit.parallel import strategies
    >>> from shardkit.step import StepSpec
    >>> spec = StepSpec(
    ...     loss_fn=lambda params, batch, key: jnp.mean((batch @ params["w"]) ** 2),
    ...     optimizer=optax.sgd(0.1), init=lambda key: {"w": jax.random.normal(key, (4, 2))},
    ...     batch=jnp.ones((4, 4)), strategy=strategies.data())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = sweep(spec, out=folder, devices=(1, 2), accumulate=(1, 4))
    >>> [(row.case.key, row.status) for row in found.rows][-1]
    ('data=2 accumulate=4 remat=none', 'illegal')
    >>> found.by, len(found.ranked)
    ('compiled wire bytes', 3)
    """
    of = make_factory(spec)
    counts = _device_counts(devices, target)
    micro, policy = default_options(of)
    accumulate = (micro,) if accumulate is None else accumulate
    remat = (policy,) if remat is None else remat
    wanted = _enumerate(of, axes, counts, accumulate, remat)
    _check_request(
        target, verify=verify, time=time, repeats=repeats, steps_per_repeat=steps_per_repeat
    )
    compiler = _make_compiler(of, target, counts, wanted, timeout)
    timed = target is None and compiler.on["platform"] != "cpu" if time is None else time
    attempts = CaseRunner(compiler, verify, batches, estimate)
    folder = Path(tempfile.mkdtemp(prefix="shardkit-sweep-") if out is None else out)
    with Journal(folder, _identity(of, compiler, record)) as journal:
        run = SweepRun(journal, attempts, wanted, on_row)
        with _note_resume(journal, len(wanted)):
            steps = run.compile(verify=verify, timed=timed)
            run.time(steps, batches, repeats, steps_per_repeat)
        rows = tuple(journal.rows[case.key] for case in wanted)
        found = Sweep(rows, folder, _title(of, compiler))
        found.write_csv()
    _check_some_legal(found)
    return found


@contextlib.contextmanager
def _note_resume(journal: Journal, wanted: int) -> Iterator[None]:
    """Says of a sweep that the user ends what is kept of it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        rows = count(len(journal.rows), "row")
        stop.add_note(
            f"{rows} of {wanted} in {journal.folder}; called again, it goes on from there."
        )
        raise


def _device_counts(devices: int | Sequence[int] | None, target: str | None) -> list[int]:
    """Numbers of devices: those asked for, or all that the target or the process has."""
    there = Target.parse(target).n_devices if target else None
    if devices is None:
        return [there or len(present_devices(()))]
    counts = [devices] if isinstance(devices, int) else list(devices)
    if there and counts != [there]:
        why = f"target {target} has {count(there, 'device')}"
        fix = f"leave devices out, or another target for {counts[0]}"
        problem = Problem(f"devices={counts}", why, fix)
        raise SweepError(format_problems("Devices and target do not agree.", [problem]))
    return counts


def _enumerate(
    of: Steps,
    axes: Sequence[str],
    counts: Sequence[int],
    accumulate: Sequence[int],
    remat: Sequence[str],
) -> list[SweepCase]:
    if not isinstance(of, Declared):
        return enumerate_cases(counts, axes or plain_axes(), accumulate, remat)
    named = of.axes(axes)
    idle = tuple((axis, 1) for axis in of.idle(named))
    made = enumerate_cases(counts, named, accumulate, remat)
    return [dataclasses.replace(case, mesh=idle + case.mesh) for case in made]


def _check_request(
    target: str | None, *, verify: bool, time: bool | None, repeats: int, steps_per_repeat: int
) -> None:
    problems = []
    if target is not None:
        why = f"needs devices that run; {target} is compiled for in another process"
        fix = "leave it out, or run on the target's own machine without target="
        asked = {"verify": verify, "time": bool(time)}
        problems += [Problem(name, why, fix) for name, is_asked in asked.items() if is_asked]
    if min(repeats, steps_per_repeat) < 1 or repeats * steps_per_repeat < 2:
        why = "a median and its spread need two timed updates at least"
        problems.append(
            Problem(
                f"repeats={repeats}, steps_per_repeat={steps_per_repeat}",
                why,
                "repeats=5, steps_per_repeat=3",
            )
        )
    raise_all(SweepError, "The sweep cannot do what it is asked.", problems)


def _make_compiler(
    of: Steps,
    target: str | None,
    counts: Sequence[int],
    wanted: Sequence[SweepCase],
    timeout: float,
) -> CaseCompiler:
    if target is None:
        return LocalCompiler(of, present_devices(counts))
    make_child_source(
        of, wanted[0]
    )  # a factory without a name is refused before anything is written
    return TargetCompiler(of, lambda case: make_child_source(of, case), target, timeout)


def _identity(
    of: Steps, compiler: CaseCompiler, record: Mapping[str, Any] | None
) -> dict[str, Any]:
    own = of.record() if isinstance(of, Declared) else {"factory": display_name(of)}
    try:
        json.dumps(record or {})
    except (TypeError, ValueError) as error:
        problem = Problem(f"record={record!r}", str(error), 'record={"data": "v2", "width": 512}')
        headline = "What tells sweeps apart must be plain values."
        raise SweepError(format_problems(headline, [problem])) from None
    return {**own, **(record or {}), "on": dict(compiler.on)}


def _title(of: Steps, compiler: CaseCompiler) -> str:
    where = compiler.on.get("device_kind") or compiler.on["target"]
    return f"Sweep of {display_name(of)} on {where}."


def _check_some_legal(found: Sweep) -> None:
    """Refuses a sweep in which nothing was legal, with every different reason.

    Raises:
      SweepError: no case is; the rows are written all the same.
    """
    if any(row.status != ILLEGAL for row in found.rows):
        return
    first: dict[str, SweepRow] = {}
    for row in found.rows:
        first.setdefault(row.reason, row)
    problems = [
        Problem(row.case.key, why, _first_fix(row.error)) for why, row in list(first.items())[:8]
    ]
    headline = f"None of {count(len(found.rows), 'case')} is legal; see {found.folder}."
    raise SweepError(format_problems(headline, problems))


def _first_fix(message: str) -> str:
    """The first fix that a message names."""
    _, _, fixes = message.partition("\nFix:")
    return fixes.strip().removeprefix("- ").partition("\n")[0]
