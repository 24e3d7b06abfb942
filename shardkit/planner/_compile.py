"""Compiles the best layouts of a plan with the target's own compiler, in child processes."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._core.errors import ShardkitError
from ..report import Report
from ..targets import StepSource, compile_for
from ._candidate import Candidate
from ._result import Plan

_CONFIG = '''"""One layout of a plan."""

import dataclasses

import shardkit as sk
from shardkit.config import Config, load_config


def config() -> Config:
    base = load_config({name!r}, {overrides!r})
{declaration}
    strategy = dataclasses.replace(
        strategy,
        accumulate=accumulate,
        remat=remat,
        precision={precision!r} or base.strategy.precision,
    )
    data = dataclasses.replace(base.data, batch_size={rows} or base.data.batch_size)
    return dataclasses.replace(base, mesh=mesh, strategy=strategy, data=data)
'''


def compile_best(
    plan: Plan,
    source: StepSource,
    number: int,
    *,
    global_batch: int | None = None,
    timeout: float = 1800.0,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Compiles the first layouts of a plan and ranks them first, by their compiled time.

    Args:
      plan: the plan.
      source: the config file that it was made for.
      number: how many layouts to compile.
      global_batch: rows that the plan was made for, if they are not the config's.
      timeout: seconds for each.
      progress: called with a line of text before each compile.

    Returns:
      The plan with the compiled figures. A layout that does not compile has its reason in
      `failed`, and one that does not fit after all goes to `tight`.
    """
    done = []
    for candidate in plan.rows[:number]:
        progress(f"compiling {candidate}")
        options = {"global_batch": global_batch, "timeout": timeout}
        done.append(_compile_candidate(candidate, source, plan.target, **options))
    figures = [(c, c.compiled) for c in done if c.compiled]
    fit = [pair for pair in figures if pair[1]["margin"] >= 0]
    fit.sort(key=lambda pair: pair[1]["seconds"])
    over = [c for c, compiled in figures if compiled["margin"] < 0]
    failed = [c for c in done if c.failed]
    rows = (*(c for c, _ in fit), *plan.rows[number:], *failed)
    return dataclasses.replace(plan, rows=rows, tight=(*over, *plan.tight))


def _compile_candidate(
    candidate: Candidate, source: StepSource, target: str, **options: Any
) -> Candidate:
    """A layout with the figures of the target's compiler, or the reason why it has none."""
    try:
        report = compile_layout(candidate.declaration, source, target, **options)
    except (ShardkitError, RuntimeError) as error:
        lines = str(error).splitlines()
        return dataclasses.replace(candidate, failed=" ".join(lines[:2]))
    return dataclasses.replace(candidate, compiled=_summarize(report))


def compile_layout(
    code: str,
    source: StepSource,
    target: str,
    *,
    global_batch: int | None = None,
    timeout: float = 1800.0,
    precision: str = "",
) -> Report:
    """Compiles a config under a layout, `Candidate.declaration`, for a target.

    Rows and named dtype policy are the config's unless given; the timeout is in seconds. Raises
    ShardkitError if the layout is not legal, or was not compiled.
    """
    text = _CONFIG.format(
        name=str(Path(source.name).resolve()) if source.name else None,
        overrides=list(source.overrides),
        declaration="\n".join(f"    {line}" for line in code.splitlines()),
        rows=global_batch,
        precision=precision,
    )
    with tempfile.TemporaryDirectory(prefix="shardkit-plan-") as folder:
        path = Path(folder, "layout.py")
        path.write_text(text)
        return compile_for(StepSource(str(path)), target, timeout=timeout)


def _summarize(report: Report) -> dict[str, Any]:
    memory, timeline = report.memory, report.timeline
    wire: dict[str, int] = {}
    for row in report.ledger:
        axes = ", ".join(row.axes)
        wire[axes] = wire.get(axes, 0) + row.wire_bytes
    return {
        "total": memory.total or 0,
        "state": memory.params + memory.opt_state + memory.model_state + memory.rest,
        "temp": memory.temp or 0,
        "margin": memory.margin or 0,
        "seconds": timeline.high if timeline else 0.0,
        "wire": wire,
    }
