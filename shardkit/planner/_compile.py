"""Stage two: the best layouts, compiled by the target's own compiler in child processes."""

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
    """Compiles the first layouts of a plan; what is compiled stands first, by its own time.

    Args:
      plan: the plan.
      source: the config file that it was made for.
      number: how many layouts are compiled.
      global_batch: as the plan was asked.
      timeout: seconds for each.
      progress: is told of each compile.

    Returns:
      The plan, whose first rows say what the compiler made of them. A layout that does not compile
      says why, and one that does not fit after all goes to `tight`.
    """
    done = []
    for one in plan.rows[:number]:
        progress(f"compiling {one}")
        done.append(compile_candidate(one, source, plan.target, global_batch, timeout))
    fit = [c for c in done if c.compiled and c.compiled["margin"] >= 0]
    failed = [c for c in done if c.failed]
    over = [c for c in done if c.compiled and c.compiled["margin"] < 0]
    fit.sort(key=lambda c: c.compiled["seconds"] if c.compiled else 0.0)
    rest = plan.rows[number:]
    return dataclasses.replace(plan, rows=(*fit, *rest, *failed), tight=(*over, *plan.tight))


def compile_candidate(
    one: Candidate,
    source: StepSource,
    target: str,
    global_batch: int | None,
    timeout: float = 1800.0,
    precision: str = "",
) -> Candidate:
    """A layout with what the target's compiler says of it, or why it says nothing.

    Args:
      one: the layout.
      source: the config file that it is of.
      target: the devices.
      global_batch: rows, if they are not the config's.
      timeout: seconds.
      precision: named dtype policy, if it is not the config's.
    """
    try:
        report = compile_layout(one.declaration, source, target, global_batch, timeout, precision)
    except (ShardkitError, RuntimeError) as error:
        lines = str(error).splitlines()
        return dataclasses.replace(one, failed=" ".join(lines[:2]))
    return dataclasses.replace(one, compiled=_summary(report))


def compile_layout(
    code: str,
    source: StepSource,
    target: str,
    global_batch: int | None = None,
    timeout: float = 1800.0,
    precision: str = "",
) -> Report:
    """What the target's compiler makes of a config under a layout; the rest as `compile_candidate`.

    Args:
      code: `Candidate.declaration`.
      source: the config file.
      target: the devices.
      global_batch: rows, if they are not the config's.
      timeout: seconds.
      precision: named dtype policy, if it is not the config's.

    Raises:
      ShardkitError: the layout is not legal, or was not compiled.
    """
    name = str(Path(source.name).resolve()) if source.name else None
    text = _CONFIG.format(
        name=name,
        overrides=list(source.overrides),
        declaration="\n".join(f"    {line}" for line in code.splitlines()),
        rows=global_batch,
        precision=precision,
    )
    with tempfile.TemporaryDirectory(prefix="shardkit-plan-") as folder:
        path = Path(folder, "layout.py")
        path.write_text(text)
        return compile_for(StepSource(str(path)), target, timeout=timeout)


def _summary(report: Report) -> dict[str, Any]:
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
