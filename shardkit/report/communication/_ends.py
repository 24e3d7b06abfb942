"""What each collective lies between: what made its array, what reads it, and who declared that.

A partitioner sends an array because one operation leaves it in one layout and the next one needs it
in another. Both are in the program, next to the collective:

    %w = f32[4,8] parameter(3)                    made by params/w
    %all-gather = f32[16,8] all-gather(%w)        declared by PathRules["**/w"] → P('fsdp', None)
    %dot = f32[2,8] dot(%x, %all-gather)          wanted by dot_general at model.py:42 in attend

Only what the program says is reported; what is not certain is left empty.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..._core.scope_markers import OF_THE_STEP
from ..._core.source import Source
from .._placed_leaf import PlacedLeaf
from ..hlo._hlo import Computation, Instruction, parse_shapes
from ..hlo._readers import find_fusion, moves, nearest_maker, nearest_readers
from ..hlo._scope import last_name, phase_of
from ..hlo._source_lines import Sources, result_names
from ..hlo._sources import ComputedError, find_argument
from ._causes import Causes, Operation, Transfer
from ._entries import CONSTRAINTS, PRODUCTS
from ._ledger import Ends, Ledger, LedgerRow
from ._reductions import REDUCING, gradient_reductions

if TYPE_CHECKING:
    from .._program import Program

# Operations of JAX that carry a declared layout out, as their paths end.
_CONSTRAINT = "the constraint at "
_HLO_PRODUCTS = frozenset({"dot", "convolution"})


def add_ends(ledger: Ledger, program: "Program") -> Ledger:
    """Returns a program's ledger with what made, wants and declares what each row sends."""
    reader = _EndsReader(program, ledger)
    rows = tuple(reader.add(row) for row in ledger)
    return dataclasses.replace(ledger, rows=rows)


def declarations(leaves: Sequence[PlacedLeaf]) -> str:
    """Returns `PathRules["**/w"] of params/w`; of several leaves, two and how many more."""
    named = [f"{leaf.declared_by} of {leaf.name}" for leaf in leaves if leaf.declared_by]
    return " and ".join([*named[:2], *([f"{len(named) - 2} more"] if named[2:] else [])])


class _EndsReader:
    def __init__(self, program: "Program", ledger: Ledger) -> None:
        self._program = program
        self._sources = Sources(program.hlo, program.module)
        self._causes = Causes(program)
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
        leaf, made = (
            self._argument(here, operand),
            nearest_maker(self._program.module, here, operand, self._tell),
        )
        wanted = self._wanted(row, operand, own, made)
        source, declared = self._causes.find(
            Transfer(row=row, own=own, leaf=leaf, made=made, wanted=wanted)
        )
        if not declared and source in self._causes.constraint_lines and source != own:
            declared = f"{_CONSTRAINT}{source}"
        declared = declared or self._declaration(row, leaf, own) or self._other_end(row, wanted)
        return source, Ends(leaf.name if leaf else str(made or ""), str(wanted or ""), declared)

    def _argument(self, here: Computation, name: str) -> PlacedLeaf | None:
        """The argument of the step that an array is another form of; None if it is computed."""
        try:
            number = find_argument(self._program.module, here, name)
        except ComputedError:
            return None
        leaves = self._program.leaves
        return leaves[number] if number is not None and number < len(leaves) else None

    def _wanted(
        self, row: LedgerRow, operand: str, own: Source | None, made: Operation | None
    ) -> Operation | None:
        """The operation that wants what a collective makes of an array.

        Compilers give a collective the line of either side: where it is not the maker's, it says
        which one of several readers it is for.
        """
        module = self._program.module
        within = module.computations[row.computation]
        sent = within.instructions[row.name]
        here, fusion = find_fusion(module, within, sent)
        names = [fusion.name] if fusion is not sent else result_names(sent, operand, here)

        of_reader = own is not None and made is not None and made.source != own
        unnamed = Operation(last_name(row.op_name), phase_of(row.op_name), own)

        def tell(reader: Instruction, at: Computation) -> Operation | None:
            if of_reader and not reader.op_name and reader.opcode in _HLO_PRODUCTS:
                return unnamed
            told = self._tell(reader, at)
            if told is not None and told.name in CONSTRAINTS:
                return told if self._forces(told.source, row) else None
            return None if moves(reader, sent, at) else told

        found = nearest_readers(module, here, names, tell)
        found = found or nearest_readers(module, here, names, self._tell)
        if of_reader:
            found.sort(key=lambda one: one.source != own)
        return next(iter(found), None)

    def _forces(self, constraint: Source | None, row: LedgerRow) -> bool:
        """Whether a constraint that reads an array can be what a collective makes it for.

        Where it splits the array over the axes of a gather, something behind it wants it whole.
        """
        governing, batch_axes = self._program.declared.governing, self._program.batch_axes
        if constraint is None or row.kind != "all-gather" or not governing:
            return True
        line = constraint.file, constraint.line
        own = [one for one in governing if (one.source.file, one.source.line) == line]
        return any(one.forbids(row.axes, batch_axes) for one in own)

    def _tell(self, instruction: Instruction, here: Computation) -> Operation | None:
        """What an instruction is, if it has a JAX path; a constraint of the step's own is none."""
        if not instruction.op_name or instruction.opcode == "get-tuple-element":
            return None
        name, phase = last_name(instruction.op_name), phase_of(instruction.op_name)
        source = self._sources.of(instruction, here)
        of_step = source is None or OF_THE_STEP in instruction.op_name
        silent = of_step and name in CONSTRAINTS
        return None if silent else Operation(name, phase, source)

    def _other_end(self, row: LedgerRow, wanted: Operation | None) -> str:
        """What declares the layout that an array is moved for; "" where that is not certain.

        An activation is gathered for a product since the weight is split otherwise. What the update
        moves is in a moment's layout, of its own rule, and in its parameter's.
        """
        if row.kind in REDUCING:
            return ""
        if wanted and wanted.source and wanted.name in PRODUCTS:
            weights = self._causes.weights.get((wanted.source.file, wanted.source.line), ())
            leaves = [leaf for leaf in weights if set(row.axes) <= set(leaf.axes())]
            return declarations(leaves) if len(leaves) == 1 else ""
        if row.phase != "update":
            return ""
        # An all-to-all sends an array as one operand for each device.
        parts = [math.prod(shape.dims) for text in row.operands for shape in parse_shapes(text)]
        leaves = self._program.own_layouts(row.axes)
        sizes = ((leaf, math.prod(leaf.shard(self._program.sizes))) for leaf in leaves)
        return declarations([leaf for leaf, size in sizes if size in (sum(parts), *parts)])

    def _declaration(self, row: LedgerRow, leaf: PlacedLeaf | None, source: Source | None) -> str:
        """The declaration that decides one of the two layouts; "" where that is not certain."""
        by_user = source is not None and OF_THE_STEP not in row.op_name
        if by_user and last_name(row.op_name) in CONSTRAINTS and self._forces(source, row):
            return f"{_CONSTRAINT}{source}"
        if leaf is not None and set(row.axes) <= set(leaf.axes()):
            return declarations([leaf])
        if row.by_optimizer and source is None:
            return "the optimizer"
        over = [a for a in row.axes if (row.computation, row.name, a) in self._reducing]
        if over and set(over) == set(row.axes):
            return f"the batch, whose rows are split over {', '.join(over)}"
        return ""
