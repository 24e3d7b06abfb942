"""Searches for activations, and for optimizer state, that all-to-alls bring to another layout."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from .._placed_leaf import PlacedLeaf
from .._program import Program
from ..communication._ledger import LedgerRow
from ..hlo._hlo import parse_shapes
from ._finding import FOLLOW, SMALL, Finding, about_rows
from ._messages import format_spec
from ._row_axes import COMPUTING, row_axes
from ._spec_mismatches import format_leaf

_MOVED = {"all-to-all": "resharded from one dim to another", "all-gather": "gathered whole"}


def resharding(program: Program, claimed: Collection[int]) -> Iterator[Finding]:
    """Activations that all-to-alls reshard from one dim to another, by line of code."""
    groups: dict[tuple[tuple[str, ...], str, str], list[LedgerRow]] = {}
    declared, own = program.declared, row_axes(program)
    for number, row in enumerate(program.ledger):
        moved = row.kind == "all-to-all" or _gathers_for_moments(row, program)
        if not moved or number in claimed or row.by_optimizer:
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
        # What the update alone moves is in a moment's layout, of its own rule, on one side.
        of_update = all(row.phase == "update" for row in rows)
        moments = program.own_layouts(axes) if of_update else {}
        times = f"{len(rows)} × " if len(rows) > 1 else ""
        yield Finding(
            "resharding",
            scope=rows[0].scope,
            axes=axes,
            bytes=sum(row.wire_bytes for row in rows),
            **about_rows(program.ledger, rows),
            why=f"{times}{rows[0].operands[0]} is {_MOVED[rows[0].kind]} over "
            f"{', '.join(axes)}: "
            + (specs or "its producer and its consumer are split differently")
            + _declarations(rows),
            fix=f"opt_state={_followed(moments)}, the layout of their parameters"
            if moments
            else "constrain both to one spec: sk.nn.constrain(x, ...) right after it is computed",
            alternatives=(FOLLOW,) if moments else (),
        )


def _gathers_for_moments(row: LedgerRow, program: Program) -> bool:
    """Whether the update gathers what the parameters are split over and their moments are not."""
    if row.kind != "all-gather" or row.phase != "update":
        return False
    return any({*row.axes} <= {*own.axes()} for own in program.own_layouts(row.axes).values())


def _declarations(rows: Sequence[LedgerRow]) -> str:
    declared = {end.declared_by: None for row in rows for end in row.ends if end.declared_by}
    return f", declared by {' and '.join(declared)}" if declared else ""


def _followed(moments: Mapping[PlacedLeaf, PlacedLeaf]) -> str:
    """The rule that lays moments out like their parameters."""
    specs = (f'"{leaf.leaf.path}": {format_spec(own.dims())}' for leaf, own in moments.items())
    return f"sk.first_match(sk.PathRules({{{', '.join(specs)}}}), strategy.opt_state)"


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
