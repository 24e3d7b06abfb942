"""Refuses executables that would hang, fail or compute wrong numbers, before they run."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._core.errors import Problem, StepError, raise_all
from .._core.scope_markers import is_divergent
from .._core.tree import list_leaves
from .._core.types import PyTree
from ..report import LedgerRow, PlacedLeaf, read_ledger, read_miscompiled
from ..report.hlo._hlo import Instruction, parse
from ..report.hlo._source_lines import Sources
from ..rules import format_mesh

OnMiscompiled = Literal["error", "report"]
_LAYOUT = re.compile(r"\{([\d,]+)")


def check_miscompiled(
    compiled: jax.stages.Compiled, args: tuple[PyTree, ...], results: PyTree, mesh: Mesh
) -> None:
    """Raises StepError if the partitioner lost the order of devices in an executable.

    It names each operation with the shape and the dim that it gets wrong.
    """
    sizes = tuple(mesh.shape.items())
    if sum(size > 1 for _, size in sizes) < 2:  # a single axis has a single order
        return
    shardings = compiled.input_shardings[0], compiled.output_shardings
    leaves, returned = (
        _place(tree, placed) for tree, placed in zip((args, results), shardings, strict=True)
    )
    found = read_miscompiled(compiled.as_text() or "", leaves, returned, sizes)
    problems = [Problem(finding.scope or "the step", finding.why, finding.fix) for finding in found]
    headline = f"XLA computes wrong numbers on mesh {format_mesh(mesh.shape)}."
    fix = 'another order of axes as above; on_miscompiled="report" runs the program as it is'
    raise_all(StepError, headline, problems, fix)


def _place(tree: PyTree, shardings: PyTree) -> Sequence[PlacedLeaf]:
    def spec(sharding: Any) -> PartitionSpec:
        return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()

    placed = jax.tree.leaves(shardings)
    return [
        PlacedLeaf("the arguments", leaf, spec(sharding))
        for leaf, sharding in zip(list_leaves(tree), placed, strict=True)
    ]


def check_deadlocks(compiled: jax.stages.Compiled, mesh: Mesh) -> None:
    """Raises StepError, with scope and operation, for permutes whose devices would wait forever.

    On CPU devices a permute waits for every device of the program, not only those that it moves
    data between. The stages of a pipeline run different operations at a time, so a permute that the
    partitioner inserts into one stage, as for `jnp.roll` along a split dim, deadlocks or is matched
    with the permute of another stage.
    """
    if mesh.devices.flat[0].platform != "cpu" or not is_divergent(text := compiled.as_text() or ""):
        return
    ledger = read_ledger(text, tuple(mesh.shape.items()))
    stuck = [row for row in ledger.where(kind="collective-permute") if is_divergent(row.op_name)]
    problems = list(dict.fromkeys(map(_describe_permute, stuck)))
    headline = f"A pipeline stage would deadlock on mesh {format_mesh(mesh.shape)}."
    fix = (
        "replicate the dim that the operation reads along, before and after it: "
        'y = f(sk.nn.constrain(x, "batch", None, ...)); '
        'y = sk.nn.constrain(y, "batch", None, ...); or do not split the dim'
    )
    raise_all(StepError, headline, problems, fix)


def _describe_permute(row: LedgerRow) -> Problem:
    operation = "/".join(row.op_name.split("/")[-2:])
    over = ", ".join(map(repr, row.axes))
    why = (
        f"moves {', '.join(row.operands)} over {over} by a permute, inside one pipeline stage; "
        "on cpu devices it waits for all stages, which run other operations"
    )
    return Problem(f"{row.scope}: {operation}", why)


def check_transforms(compiled: jax.stages.Compiled, mesh: Mesh) -> None:
    """Raises StepError, with the user's lines, for Fourier transforms that devices would fail on.

    XLA's CPU backend runs them on arrays in the order of their dims alone. Its layout pass gives
    some another order, as here in the gradient of a transform whose product is split, and the run
    then ends with an internal error that names no line:

        %fft.27 = c64[2,8,16]{1,0,2} fft(%copy.6), fft_type=IFFT     runs only as {2,1,0}
    """
    if mesh.devices.flat[0].platform != "cpu" or " fft(" not in (text := compiled.as_text() or ""):
        return
    module = parse(text)
    sources = Sources(text, module)
    problems = [
        Problem(
            f"fft at {source}" if (source := sources.of(one, computation)) else one.op_name,
            f"is laid out as {one.type}, which XLA runs on no CPU device",
        )
        for computation in module.computations.values()
        for one in computation.instructions.values()
        if one.opcode == "fft" and not _is_in_order(one)
    ]
    headline = f"A Fourier transform cannot run on mesh {format_mesh(mesh.shape)}."
    # XLA lays a transform out like the product that reads it.
    fix = "rules that leave the parameters of products beside the transform whole"
    raise_all(StepError, headline, list(dict.fromkeys(problems)), fix)


def _is_in_order(transform: Instruction) -> bool:
    layout = _LAYOUT.search(transform.type)
    dims = [int(dim) for dim in layout[1].split(",")] if layout else []
    return dims == sorted(dims, reverse=True)
