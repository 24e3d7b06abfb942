"""Searches for activations, and for optimizer state, that all-to-alls bring to another layout."""

import math
from collections.abc import Collection, Iterator, Sequence

from .._program import Program
from ..communication._ledger import LedgerRow
from ..hlo._hlo import parse_shapes
from ._finding import SMALL, Finding, about_rows
from ._messages import format_spec
from ._row_axes import COMPUTING, row_axes
from ._spec_mismatches import format_leaf


def resharding(program: Program, claimed: Collection[int]) -> Iterator[Finding]:
    """Activations that all-to-alls reshard from one dim to another, by line of code."""
    groups: dict[tuple[tuple[str, ...], str, str], list[LedgerRow]] = {}
    declared, own = program.declared, row_axes(program)
    for number, row in enumerate(program.ledger):
        if row.kind != "all-to-all" or number in claimed or row.by_optimizer:
            continue
        if "all_to_all" in row.op_name or row.payload_bytes <= SMALL:
            continue
        if row.axes and all("all-to-all" in declared.explains(axis) for axis in row.axes):
            continue  # expert parallelism routes tokens by constraints
        specs = _resharded_constraints(row, program)
        if not specs and row.phase in COMPUTING and own & set(row.axes):
            continue  # the rows of an activation are moved
        groups.setdefault((row.axes, str(row.source or row.scope), specs), []).append(row)
    for (axes, _, specs), rows in groups.items():
        times = f"{len(rows)} × " if len(rows) > 1 else ""
        yield Finding(
            "resharding",
            scope=rows[0].scope,
            axes=axes,
            bytes=sum(row.wire_bytes for row in rows),
            **about_rows(program.ledger, rows),
            why=f"{times}{rows[0].operands[0]} is resharded from one dim to another over "
            f"{', '.join(axes)}: "
            + (specs or "its producer and its consumer are split differently")
            + _declarations(rows),
            fix=_suggest_layout_of_param(rows, program)
            or "constrain both to one spec: sk.nn.constrain(x, ...) right after it is computed",
        )


def _declarations(rows: Sequence[LedgerRow]) -> str:
    declared = {end.declared_by: None for row in rows for end in row.ends if end.declared_by}
    return f", declared by {' and '.join(declared)}" if declared else ""


def _suggest_layout_of_param(rows: Sequence[LedgerRow], program: Program) -> str:
    """The rule that lays moments out like their parameters, where theirs is why the update moves.

    "" for rows of other phases, and where no optimizer state has a layout of its own.
    """
    if any(row.phase != "update" for row in rows):
        return ""
    axes = {axis for row in rows for axis in row.axes}
    specs = {
        leaf.leaf.path: format_spec(program.moments[leaf].dims())
        for leaf in program.own_layouts(axes)
    }
    listed = ", ".join(f'"{path}": {spec}' for path, spec in specs.items())
    rule = f"sk.first_match(sk.PathRules({{{listed}}}), strategy.opt_state)"
    return f"opt_state={rule}, the layout of their parameters" if listed else ""


def _resharded_constraints(row: LedgerRow, program: Program) -> str:
    """The two constraints that an all-to-all connects; "" if they are unknown."""
    constraints = program.declared.constraints
    sent = sum(math.prod(shape.dims) for text in row.operands for shape in parse_shapes(text))
    for source in constraints:
        for target in constraints:
            same = source.leaf.shape == target.leaf.shape and source.dims() != target.dims()
            moved = set(row.axes) <= set(source.axes()) & set(target.axes())
            if same and moved and math.prod(source.shard(program.sizes)) == sent:
                return f"{format_leaf(source)} meets {format_leaf(target)}"
    return ""
