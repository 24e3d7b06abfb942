"""Explains what a program sends beyond the textbook minima: by its findings, and by its kinds."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from .._program import AxisKind, Program
from ..communication._ledger import LedgerRow
from ..communication._minimum import (
    Minimum,
    comparable_rows,
    divide_row,
    judging_kinds,
    weight_axes,
)
from ..communication._reductions import REDUCING
from ._finding import Finding, named_shares
from ._row_axes import COMPUTING, ParameterForms, is_moved, row_axes

# Traffic up to this many times a minimum needs no explanation.
_SPARE = 1.02
# Parts of the excess below this share of it are left out.
_WORTH = 0.01
_RECOMPUTED = "sent again by recomputation"
_NAMED = "in the findings"
_SUMS = "of sums over rows that the loss takes, as batch statistics are"
_MOVED = "of activations gathered or moved, as by a lookup in a split table"
_UPDATED = "of arrays that the optimizer moves"
_WINDOWED = "of products in windows, which move more blocks than a ring"
# What adds such a sum of a backward pass to others of it.
_ADDING = ("add_any", "add ", "sub ", "mul ", "neg ", "div ", "broadcast_in_dim")


def explain_excess(
    program: Program, minima: Sequence[Minimum], findings: Sequence[Finding]
) -> tuple[Minimum, ...]:
    """Returns the minima with what is sent beyond each, by reason, the most first."""
    named = named_shares(program.ledger, findings)
    kinds, forms = judging_kinds(program), ParameterForms(program)
    explained = []
    for least in minima:
        beyond = least.wire - least.bytes
        excess: dict[str, float] = {}
        if least.wire > _SPARE * least.bytes:
            for reason, size in _reasons(program, kinds[least.axis], named, forms):
                excess[reason] = excess.get(reason, 0.0) + size
        explained.append(dataclasses.replace(least, excess=_most_first(excess, beyond)))
    return tuple(explained)


def _most_first(excess: dict[str, float], beyond: float) -> tuple[tuple[str, int], ...]:
    """The reasons, of which findings come first where together they explain too much.

    A reason such as a missing reduce-scatter can be made good elsewhere, by a gather less.
    """
    parts, left = {}, beyond
    for name in sorted(excess, key=lambda name: (name != _NAMED, -excess[name])):
        parts[name] = min(excess[name], left)
        left -= parts[name]
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return tuple((name, round(size)) for name, size in ordered if size > _WORTH * beyond)


def _reasons(
    program: Program, kind: AxisKind, named: Sequence[float], forms: ParameterForms
) -> Iterator[tuple[str, float]]:
    """Reasons of the rows over an axis, with the bytes that they explain; no byte counts twice."""
    rows = comparable_rows(program.ledger, kind.axis)
    splitting = weight_axes(program.leaves)
    numbers = {id(row): number for number, row in enumerate(program.ledger)}
    for row in rows:
        sent = divide_row(row, program.sizes, splitting)[kind.axis]
        known = named[numbers[id(row)]]
        yield _NAMED, sent * known
        for reason, part in _reasons_of_row(program, kind, row, rows, forms):
            yield reason, sent * (1 - known) * part


def _reasons_of_row(
    program: Program,
    kind: AxisKind,
    row: LedgerRow,
    rows: Sequence[LedgerRow],
    forms: ParameterForms,
) -> Iterator[tuple[str, float]]:
    if row.phase == "recompute":
        yield _RECOMPUTED, 1.0
        return
    if row.phase == "update" and "optimizer_state" not in kind.splits:
        yield _UPDATED, 1.0
        return
    apart = spare = _spare_blocks(row, rows)
    yield _WINDOWED, spare
    if kind.axis in row_axes(program):
        share = (1 - spare) * _share(row, lambda index: _is_sum(row, index, forms))
        yield _SUMS, share
        apart += share
        moved = _share(row, lambda i: is_moved(row, i, program) and not forms.has(row, i))
        yield _MOVED, (1 - spare) * moved
        apart += (1 - spare) * moved
    for reason, part in kind.excess(row, rows, program):
        yield reason, part * (1 - apart)


def _spare_blocks(row: LedgerRow, rows: Sequence[LedgerRow]) -> float:
    """Share of a windowed product's permutes beyond the n - 1 blocks that a ring of n moves.

    In two directions at once XLA moves up to two more: over 4 devices 5 blocks where 3 would do.
    Products of one line share their names, so that 11 blocks are three products' and 2 more.
    """
    if not row.windowed or not row.runs or row.group < 2:
        return 0.0
    runs = [
        other.runs
        for other in rows
        if other.windowed
        and other.runs
        and (other.op_name, other.payload_bytes) == (row.op_name, row.payload_bytes)
    ]
    blocks, ring = sum(runs) / min(runs), row.group - 1
    return max(0.0, 1 - max(1, blocks // ring) * ring / blocks)


def _share(row: LedgerRow, wanted: Callable[[int], bool]) -> float:
    """Share of a row's bytes in the operands that are wanted."""
    sizes = row.operand_bytes
    parts = (size for i, size in enumerate(sizes) if row.ends and wanted(i))
    return sum(parts) / sum(sizes)


def _is_sum(row: LedgerRow, index: int, forms: ParameterForms) -> bool:
    """Whether an array is a sum that the loss goes on with, perhaps of a gradient's shape."""
    phase, end = row.phases[index], row.ends[index]
    if row.kind not in REDUCING:
        return False
    if phase not in COMPUTING or end.wanted_by.endswith("of the update"):
        return False
    if phase == "forward" and end.made_by.startswith("reduce_"):
        return True
    return end.wanted_by.startswith(_ADDING) or not forms.has(row, index)
