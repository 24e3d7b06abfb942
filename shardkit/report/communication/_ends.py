"""What each collective lies between: what made its array, what reads it, and who declared that.

A partitioner sends an array because one operation leaves it in one layout and the next one needs it
in another. Both are in the program, next to the collective:

    %w = f32[4,8] parameter(3)                    made by params/w
    %all-gather = f32[16,8] all-gather(%w)        declared by PathRules["**/w"] → P('fsdp', None)
    %dot = f32[2,8] dot(%x, %all-gather)          wanted by dot_general at model.py:42 in attend

Only what the program says is reported; what is not certain is left empty.
"""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..._core.source import Source
from ..hlo._arguments import find_argument
from ..hlo._hlo import Computation, Instruction
from ..hlo._neighbours import Onward, consumers, nearest, producers
from ..hlo._scope import phase_of, split_op_name
from ..hlo._source_lines import Sources, result_names
from ..hlo._sources import ComputedError
from ._governing import find_governing
from ._ledger import Ends, Ledger, LedgerRow
from ._reductions import REDUCING, gradient_reductions

if TYPE_CHECKING:
    from .._program import PlacedLeaf, Program

# Operations of JAX that carry a declared layout out, as their paths end.
_CONSTRAINT = "the constraint at "
# Collectives that the loss itself asks for.
_EXPLICIT = frozenset(
    """all_gather all_gather_invariant all_gather_reduced all_to_all ppermute pbroadcast psum
    psum_invariant psum_scatter ragged_all_to_all reduce_scatter""".split()
)
_CONSTRAINTS = frozenset({"sharding_constraint", "shardkit_constrain"})


def add_ends(ledger: Ledger, program: "Program") -> Ledger:
    """Returns a program's ledger with what made, wants and declares what each row sends."""
    reader = _EndsReader(program, ledger)
    rows = tuple(reader.add(row) for row in ledger)
    return dataclasses.replace(ledger, rows=rows)


@dataclasses.dataclass(frozen=True)
class _Operation:
    """An operation of the traced program: the last name of its JAX path, its phase and its line."""

    name: str
    phase: str
    source: Source | None

    def __str__(self) -> str:
        """Returns `dot_general at model.py:42 in attend`."""
        if self.source is None:
            return f"{self.name} of the update" if self.phase == "update" else self.name
        return f"{self.name} at {self.source}"


def _last_name(op_name: str) -> str:
    return split_op_name(op_name)[0].rpartition("/")[2]


class _EndsReader:
    def __init__(self, program: "Program", ledger: Ledger) -> None:
        self._program = program
        self._sources = Sources(program.hlo, program.module)
        kinds = program.declared.kinds
        stored = {"weights", "optimizer_state"}
        self._gathered = {kind.axis for kind in kinds if stored & kind.splits}
        self._constraint_lines = {one.source for one in program.declared.governing}
        self._reducing = {
            (row.computation, row.name, axis)
            for axis in program.batch_axes
            for row, _ in gradient_reductions(ledger, axis, program.leaves, program.sizes)
        }

    def add(self, row: LedgerRow) -> LedgerRow:
        here = self._program.module.computations[row.computation]
        sent = here.instructions[row.name]
        names = [
            name
            for name in sent.operands
            if [shape.dtype for shape in here.instructions[name].shapes] == [row.dtype]
        ]
        if len(names) != len(row.operands):  # one operand can be a tuple of arrays
            names = [sent.operands[0]] * len(row.operands)
        parts = [
            self._read_part(row, name, source, here)
            for name, source in zip(names, row.sources, strict=True)
        ]
        sources, ends = zip(*parts, strict=True)
        return dataclasses.replace(row, sources=sources, ends=ends)

    def _read_part(
        self, row: LedgerRow, operand: str, own: Source | None, here: Computation
    ) -> tuple[Source | None, Ends]:
        """The line that causes the transfer of one array, and its ends."""
        leaf = self._argument(here, operand)
        readers = result_names(here.instructions[row.name], operand, here)
        made = self._nearest([operand], producers(here), here)
        wanted = self._nearest(readers, consumers(here), here)
        source = self._cause(row, own, wanted)
        forced = source in self._constraint_lines and source != own
        declared = f"{_CONSTRAINT}{source}" if forced else self._declaration(row, leaf, own)
        return source, Ends(leaf.name if leaf else str(made or ""), str(wanted or ""), declared)

    def _cause(
        self, row: LedgerRow, own: Source | None, wanted: "_Operation | None"
    ) -> Source | None:
        """The line that causes a transfer.

        For a gather that the compiler inserts that is the operation which wants the result, or the
        constraint which forces that one's layout. Compilers name either side of it.
        """
        if row.kind in REDUCING or _last_name(row.op_name) in _EXPLICIT:
            return own
        near = wanted.source if wanted and wanted.source else own
        if near is None or set(row.axes) <= self._gathered:
            return near
        governing, batch_axes = self._program.declared.governing, self._program.batch_axes
        return find_governing(near, row.axes, governing, batch_axes) or near

    def _argument(self, here: Computation, name: str) -> "PlacedLeaf | None":
        """The argument of the step that an array is another form of; None if it is computed."""
        try:
            number = find_argument(self._program.module, here, name)
        except ComputedError:
            return None
        leaves = self._program.leaves
        return leaves[number] if number is not None and number < len(leaves) else None

    def _nearest(
        self, names: Iterable[str], onward: Onward, here: Computation
    ) -> "_Operation | None":
        """The nearest operation with a JAX path; a constraint without a line is passed over."""

        def tell(instruction: Instruction) -> _Operation | None:
            if not instruction.op_name or instruction.opcode == "get-tuple-element":
                return None
            name, phase = _last_name(instruction.op_name), phase_of(instruction.op_name)
            source = self._sources.of(instruction, here)
            silent = source is None and name in _CONSTRAINTS
            return None if silent else _Operation(name, phase, source)

        return next(iter(nearest(names, onward, tell, here)), None)

    def _declaration(self, row: LedgerRow, leaf: "PlacedLeaf | None", source: Source | None) -> str:
        """The declaration that decides one of the two layouts; "" where that is not certain."""
        if _last_name(row.op_name) in _CONSTRAINTS:
            return f"{_CONSTRAINT}{source}" if source else "a constraint"
        if leaf is not None and set(row.axes) <= set(leaf.axes()):
            return leaf.declared_by
        if row.by_optimizer and source is None:
            return "the optimizer"
        over = [a for a in row.axes if (row.computation, row.name, a) in self._reducing]
        if over and set(over) == set(row.axes):
            return f"the batch, whose rows are split over {', '.join(over)}"
        return ""
