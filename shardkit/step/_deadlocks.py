"""Detects collective-permutes that would deadlock, in the executable before it runs.

On CPU devices a permute waits for every device of the program, not only those that it moves data
between. The stages of a pipeline run different operations at a time, so a permute that the
partitioner inserts into one stage, as for `jnp.roll` along a split dim, deadlocks or is matched
with the permute of another stage.
"""

import jax
from jax.sharding import Mesh

from .._core.errors import Problem, StepError, raise_all
from .._core.scope_markers import is_divergent
from ..report import LedgerRow, read_ledger
from ..rules import format_mesh


def check_deadlocks(compiled: jax.stages.Compiled, mesh: Mesh) -> None:
    """Raises StepError, with scope and operation, for permutes whose devices would wait forever."""
    if mesh.devices.flat[0].platform != "cpu" or not is_divergent(text := compiled.as_text() or ""):
        return
    ledger = read_ledger(text, tuple(mesh.shape.items()))
    stuck = [row for row in ledger.where(kind="collective-permute") if is_divergent(row.op_name)]
    problems = list(dict.fromkeys(map(_problem, stuck)))
    headline = f"A pipeline stage would deadlock on mesh {format_mesh(mesh.shape)}."
    fix = (
        "replicate the dim that the operation reads along, before and after it: "
        'y = f(sk.nn.constrain(x, "batch", None, ...)); '
        'y = sk.nn.constrain(y, "batch", None, ...); or do not split the dim'
    )
    raise_all(StepError, headline, problems, fix)


def _problem(row: LedgerRow) -> Problem:
    operation = "/".join(row.op_name.split("/")[-2:])
    over = ", ".join(map(repr, row.axes))
    why = (
        f"moves {', '.join(row.operands)} over {over} by a permute, inside one pipeline stage; "
        "on cpu devices it waits for all stages, which run other operations"
    )
    return Problem(f"{row.scope}: {operation}", why)
