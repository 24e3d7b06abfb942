"""Why an array is transferred: the line at fault, and the declaration that is at odds with others.

What is next to a collective in the program is often not its cause. A partitioner carries layouts
through operations that nothing is wrong with, so that it moves arrays far from the constraint or
the rule which brings in an axis.
"""

import dataclasses
from typing import TYPE_CHECKING

from ..._core.source import Source
from .._placed_leaf import PlacedLeaf
from ..hlo._hlo import parse_shapes
from ..hlo._scope import last_name
from ._entries import EXPLICIT, PRODUCTS, find_entry, splits_matrix
from ._governing import OddDeclaration, find_governing
from ._ledger import LedgerRow
from ._line_graph import LineGraph
from ._reductions import REDUCING

if TYPE_CHECKING:
    from .._program import Program

_MOVED = ("all-to-all", "collective-permute")
_COMPUTED = ("forward", "backward", "recompute")


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of the traced program: the last name of its JAX path, its phase and its line."""

    name: str
    phase: str
    source: Source | None

    def __str__(self) -> str:
        """Returns `dot_general at model.py:42 in attend`."""
        if self.source is None:
            return f"{self.name} of the update" if self.phase == "update" else self.name
        return f"{self.name} at {self.source}"


@dataclasses.dataclass(frozen=True)
class Transfer:
    """The transfer of one array by a row of the ledger.

    Attributes:
      row: of the ledger.
      own: the line that the compiler gives it.
      leaf: the argument of the step that the array is another form of; None if it is computed.
      made, wanted: the operations that computed it, and that need it in another layout.
    """

    row: LedgerRow
    own: Source | None
    leaf: PlacedLeaf | None
    made: Operation | None
    wanted: Operation | None


class Causes:
    """What the declarations of a step say about its transfers.

    Attributes:
      weights: the parameters that the products of each line multiply with.
      constraint_lines: those of constraints.
    """

    def __init__(self, program: "Program") -> None:
        self._program = program
        kinds = program.declared.kinds
        stored = {"weights", "optimizer_state"}
        self._gathered = {kind.axis for kind in kinds if stored & kind.splits}
        self._entries: dict[tuple[str, ...], Source | None] = {}
        leaves = (axis for leaf in program.leaves for axis in leaf.axes())
        dims = (dim for one in program.declared.governing for dim in one.dims)
        # What nothing is declared over, a partitioner uses where it has to move something else.
        self._unused = {*program.sizes} - {*leaves} - {axis for dim in dims for axis in dim}
        self._lines = program.jaxpr and LineGraph(program.jaxpr.jaxpr)
        self.weights = program.weights
        self.constraint_lines = {one.source for one in program.declared.governing}

    def find(self, sent: Transfer) -> tuple[Source | None, str]:
        """The line that causes a transfer, and the declaration that is at odds; "" if none is."""
        odd = self._odd(sent)
        source = self._line(sent, odd)
        if odd is None:
            return source, ""
        if sent.row.kind in REDUCING:
            caused = sent.own is not None and self._sums(odd, sent.row, sent.own)
        else:
            caused = source == odd.source
        return source, odd.declared_by if caused else ""

    def _line(self, sent: Transfer, odd: OddDeclaration | None) -> Source | None:
        """The line that causes a transfer.

        For a gather that the compiler inserts that is the operation which wants the result, or the
        constraint which forces that one's layout. Compilers name either side of it. A gradient that
        is gathered for the update is split since an axis comes in elsewhere.
        """
        row, own, made, wanted = sent.row, sent.own, sent.made, sent.wanted
        if last_name(row.op_name) in EXPLICIT:
            return own
        if row.kind in REDUCING:
            if odd is None or own is None or not self._sums(odd, row, own):
                return own
            read = self.weights.get((own.file, own.line), ())
            return own if {*read} & {*odd.leaves} else odd.source
        if odd is not None and not odd.either:
            return odd.source
        near = wanted.source if wanted and wanted.source else own
        if made and made.phase in _COMPUTED and wanted:
            near = self._entry(row.axes, wanted) or near
        if near is None or set(row.axes) <= self._gathered:
            return near
        governing, batch_axes = self._program.declared.governing, self._program.batch_axes
        of_param = (
            sent.leaf is not None and sent.leaf.part == "params" and not batch_axes & set(row.axes)
        )
        found = find_governing(near, row.axes, governing, batch_axes, any_split=of_param)
        for_loss = row.kind == "all-gather" and (not wanted or wanted.phase in _COMPUTED)
        if found is None and made and made.source and for_loss:
            found = find_governing(made.source, row.axes, governing, batch_axes)
        # Nothing takes the whole of a dim: where one constraint alone splits it, that is the cause.
        if found is None and made and made.phase in _COMPUTED and row.kind in _MOVED:
            only = self._only_entry(row.axes)
            found = only if only in self.constraint_lines else None
        return found or (odd.source if odd else near)

    def _odd(self, sent: Transfer) -> OddDeclaration | None:
        """The declaration that all others disagree with over axes of a row, if there is one.

        Of several it is the one whose line the row has, or the nearest one; of several leaves that
        one rule is wrong for, the first. One of what is multiplied only if it is alone.
        """
        row = sent.row
        if row.phase == "update" and self._program.own_layouts(row.axes):
            return None  # moments are laid out unlike their parameter
        declared = self._program.declared.odd
        over = [one for one in declared if one.axes & {*row.axes} or self._unused & {*row.axes}]
        odd = [one for one in over if not one.either] or over
        if odd and odd[0].either and len({one.source for one in odd}) > 1:
            return None
        lines = {(line.file, line.line) for line in row.sources if line}
        own = [one for one in odd if (one.source.file, one.source.line) in lines]
        if not own and self._lines and len({one.source for one in odd}) > 1:
            ends = [one.source for one in (sent.wanted, sent.made) if one and one.source]
            nearest = self._lines.nearest(ends or row.sources, (one.source for one in odd))
            own = [one for one in odd if one.source == nearest]
        return next(iter(own or odd), None)

    def _sums(self, odd: OddDeclaration, row: LedgerRow, own: Source) -> bool:
        """Whether a row reduces what a declaration alone makes a sum over devices."""
        if odd.either:
            return False
        operands = [shape.dims for text in row.operands for shape in parse_shapes(text)]
        return odd.makes_sum(own, operands, row.axes, self._program.sizes)

    def _entry(self, axes: tuple[str, ...], wanted: Operation) -> Source | None:
        """The line where axes come in, if what is sent over them is of no declaration at its ends.

        That is so for gradients that the update takes whole, and for operands of a product where no
        matrix is split over the axes.
        """
        product = wanted.name in PRODUCTS and not splits_matrix(self._program, axes)
        if not product and wanted.phase != "update":
            return None
        entry = self._only_entry(axes)
        # What needs the whole of an array that a constraint splits is at odds with the constraint.
        return None if product and entry in self.constraint_lines else entry

    def _only_entry(self, axes: tuple[str, ...]) -> Source | None:
        if axes not in self._entries:
            self._entries[axes] = find_entry(self._program, axes)
        return self._entries[axes]
