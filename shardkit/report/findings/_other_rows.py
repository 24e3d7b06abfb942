"""Searches for what the collectives cost that no other finding is about."""

from collections.abc import Callable, Collection, Iterator, Sequence

from .._program import Program
from ..communication._ledger import LedgerRow
from ._finding import SMALL, Finding, about_rows
from ._own_axes import dim_gathers, gradient_gathers, product_gathers, split_contractions
from ._resharding import resharding
from ._row_axes import (
    activation_gathers,
    activation_parts,
    is_moved,
    repeated_reductions,
    stored_contractions,
)

_OF_ANY_ROW = "upcast_collective"  # beside what else a row's finding says


def find_of_other_rows(program: Program, findings: Sequence[Finding]) -> list[Finding]:
    """Searches the collectives that none of the findings is about."""
    claimed = {row for one in findings if one.kind != _OF_ANY_ROW for row in one.rows}
    others: list[Finding] = []
    for search in _SEARCHES.values():
        found = list(search(program, claimed))
        claimed.update(row for one in found for row in one.rows)
        others += found
    judged = {row for one in others for row in one.rows}
    moved = activation_parts(program, claimed, is_moved)  # too little to be a finding
    judged |= {number for _, parts in moved for number, _, _ in parts}
    return [*others, *_unexplained_collective(program, judged)]


def _unexplained_collective(program: Program, judged: Collection[int]) -> Iterator[Finding]:
    declared = program.declared
    if not declared.kinds:
        return
    axes = {axis for row in program.ledger for axis in row.axes}
    explained = {axis: declared.explains(axis) for axis in axes}
    groups: dict[tuple[str, tuple[str, ...], str], list[LedgerRow]] = {}
    for number, row in enumerate(program.ledger):
        known = number in judged or all(
            row.kind in explained[axis] or _implements_explained(row, explained[axis], program)
            for axis in row.axes
        )
        if not known and row.payload_bytes > SMALL and not row.by_optimizer:
            groups.setdefault((row.kind, row.axes, row.scope), []).append(row)
    for (kind, axes, scope), rows in groups.items():
        yield Finding(
            "unexplained_collective",
            scope=scope,
            axes=axes,
            bytes=sum(row.wire_bytes for row in rows),
            **about_rows(program.ledger, rows),
            why=f"{len(rows)} × {kind} over {', '.join(axes)} of {', '.join(rows[0].operands[:3])}"
            " that the strategy does not explain",
            fix="sk.nn.constrain(x, ...) the inputs and outputs of this scope: two specs disagree"
            + _suggest_declaration(axes, kind, program),
        )


def _suggest_declaration(axes: Sequence[str], kind: str, program: Program) -> str:
    """How to declare the axes that no kind of the strategy is on."""
    unknown = [axis for axis in axes if not program.declared.kind_of(axis)]
    own = [f"strategies.own({axis!r}, sends=({kind!r},))" for axis in unknown]
    return f"; or | {' | '.join(own)} if the model sends it on purpose" if own else ""


def _implements_explained(row: LedgerRow, kinds: frozenset[str], program: Program) -> bool:
    """Whether the compiler uses this collective to implement one that the strategy explains.

    Windowed permutes implement a gather or a scatter. An all-reduce over slices becomes a
    reduce-scatter within each, an all-reduce between them, and an all-gather within each.
    """
    if row.kind in ("reduce-scatter", "all-gather") and set(row.axes) & set(dict(program.dcn)):
        return "all-reduce" in kinds
    return row.windowed and bool({"all-gather", "reduce-scatter", "all-reduce"} & kinds)


# Each searches the collectives that no finding before it is about.
_SEARCHES: dict[str, Callable[[Program, Collection[int]], Iterator[Finding]]] = {
    "resharding": resharding,
    "gradient_gather": gradient_gathers,
    "activation_gather": activation_gathers,
    "stored_contraction": stored_contractions,
    "product_gather": product_gathers,
    "dim_gather": dim_gathers,
    "split_contraction": split_contractions,
    "repeated_reduction": repeated_reductions,
}
OF_OTHER_ROWS = (*_SEARCHES, "unexplained_collective")
