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
from ..hlo._arguments import ComputedError, find_argument
from ..hlo._hlo import Computation, Instruction
from ..hlo._neighbours import Onward, consumers, nearest, producers
from ..hlo._scope import phase_of, split_op_name
from ..hlo._sources import Sources, result_names
from ._governing import find_governing
from ._ledger import Ends, Ledger, LedgerRow
from ._reductions import REDUCING, gradient_reductions

if TYPE_CHECKING:
    from .._program import PlacedLeaf, Program

# Operations of JAX that carry a declared layout out, as their paths end.
_CONSTRAINT = "the constraint at "
_CONSTRAINTS = frozenset({"sharding_constraint", "shardkit_constrain"})


def add_ends(ledger: Ledger, program: "Program") -> Ledger:
    """Returns a program's ledger with what made, wants and declares what each row sends."""
    reader = _EndsReader(program, ledger)
    rows = tuple(reader.add(row) for row in ledger)
    return dataclasses.replace(ledger, rows=rows)


class _EndsReader:
    def __init__(self, program: "Program", ledger: Ledger) -> None:
        self._program = program
        self._sources = Sources(program.hlo, program.module)
        kinds = program.declared.kinds
        stored = {"weights", "optimizer_state"}
        self._gathered = {kind.axis for kind in kinds if stored & kind.splits}
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
        sources = tuple(self._cause(row, source) for source in row.sources)
        ends = (
            self._read_ends(row, name, source, here)
            for name, source in zip(names, row.sources, strict=True)
        )
        ends = tuple(
            end if cause == own else dataclasses.replace(end, declared_by=f"{_CONSTRAINT}{cause}")
            for end, cause, own in zip(ends, sources, row.sources, strict=True)
        )
        return dataclasses.replace(row, sources=sources, ends=ends)

    def _cause(self, row: LedgerRow, source: Source | None) -> Source | None:
        """The constraint that forces a gather, if it is one; else the operation next to it."""
        declared = self._program.declared
        if source is None or row.kind in REDUCING or set(row.axes) <= self._gathered:
            return source
        batch_axes = self._program.batch_axes
        return find_governing(source, row.axes, declared.governing, batch_axes) or source

    def _read_ends(
        self, row: LedgerRow, operand: str, source: Source | None, here: Computation
    ) -> Ends:
        leaf = self._argument(here, operand)
        readers = result_names(here.instructions[row.name], operand, here)
        return Ends(
            made_by=leaf.name if leaf else self._describe([operand], producers(here), here),
            wanted_by=self._describe(readers, consumers(here), here),
            declared_by=self._declaration(row, leaf, source),
        )

    def _argument(self, here: Computation, name: str) -> "PlacedLeaf | None":
        """The argument of the step that an array is another form of; None if it is computed."""
        try:
            number = find_argument(self._program.module, here, name)
        except ComputedError:
            return None
        leaves = self._program.leaves
        return leaves[number] if number is not None and number < len(leaves) else None

    def _describe(self, names: Iterable[str], onward: Onward, here: Computation) -> str:
        """The nearest operation with a JAX path, `dot_general at model.py:42 in attend`."""

        def describe(instruction: Instruction) -> str:
            if not instruction.op_name or instruction.opcode == "get-tuple-element":
                return ""
            path = split_op_name(instruction.op_name)[0]
            operation = path.rpartition("/")[2]
            source = self._sources.of(instruction, here)
            if source is None:
                return f"{operation} of the update" if phase_of(path) == "update" else operation
            return f"{operation} at {source}"

        return next(iter(nearest(names, onward, describe, here)), "")

    def _declaration(self, row: LedgerRow, leaf: "PlacedLeaf | None", source: Source | None) -> str:
        """The declaration that decides one of the two layouts; "" where that is not certain."""
        if split_op_name(row.op_name)[0].rpartition("/")[2] in _CONSTRAINTS:
            return f"{_CONSTRAINT}{source}" if source else "a constraint"
        if leaf is not None and set(row.axes) <= set(leaf.axes()):
            return leaf.declared_by
        if row.by_optimizer and source is None:
            return "the optimizer"
        over = [a for a in row.axes if (row.computation, row.name, a) in self._reducing]
        if over and set(over) == set(row.axes):
            return f"the batch, whose rows are split over {', '.join(over)}"
        return ""
