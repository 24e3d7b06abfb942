"""Permutes that would wait for ever, found in the executable before it runs.

On CPU devices a permute waits for every device of the program, whichever of them it moves data
between. The stages of a pipeline do different things at a time, so a permute that the partitioner
puts into one of them, as for `jnp.roll` along a split dim, would never end, or meet another one.
"""

from typing import Any

from jax.sharding import Mesh

from .._core.errors import Problem, StepError, raise_all
from .._core.scope_markers import is_divergent
from ..report import Row, read_ledger
from ..rules import format_mesh


def check_waits(compiled: Any, mesh: Mesh) -> None:
    """Refuses an executable of which some devices would wait for all others without end.

    Args:
      compiled: the `jax.stages.Compiled`.
      mesh: the device mesh.

    Raises:
      StepError: naming the scope and the operation of each such permute.
    """
    if mesh.devices.flat[0].platform != "cpu" or not is_divergent(text := compiled.as_text()):
        return
    ledger = read_ledger(text, tuple(mesh.shape.items()))
    stuck = [row for row in ledger.where(kind="collective-permute") if is_divergent(row.op_name)]
    problems = list(dict.fromkeys(map(_problem, stuck)))
    headline = f"A stage would wait for the others without end on mesh {format_mesh(mesh.shape)}."
    fix = (
        "make the dim whole that the operation looks along, before it and behind it: "
        'y = f(sk.nn.constrain(x, "batch", None, ...)); y = sk.nn.constrain(y, "batch", None, ...), '
        "which gathers within the stage; or leave the dim unsplit"
    )
    raise_all(StepError, headline, problems, fix)


def _problem(row: Row) -> Problem:
    operation = "/".join(row.op_name.split("/")[-2:])
    over = ", ".join(map(repr, row.axes))
    why = (
        f"moves {', '.join(row.operands)} over {over} by a permute, inside one pipeline stage; "
        "on cpu devices it waits for all stages, which do something else"
    )
    return Problem(f"{row.scope}: {operation}", why)
