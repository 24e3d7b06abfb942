"""Computes from when to when each buffer of a scheduled program is alive.

The program is walked in the order of its schedule, a loop's body once. Each executed instruction is
a moment, counted from 1. A buffer is alive from the moment that makes it to the last one that reads
it. With `x` an argument:

    moment  instruction            a: 2 KiB   b: 2 KiB   c: 1 KiB
    1       a = multiply(x, x)     start
    2       b = tanh(a)            read       start
    3       c = slice(a)           read, end  |          start
    4       while(c), body: …                 |          state of the loop, in place
    …       d = negate(b)                     read, end             d takes over b's memory

Some results have no memory of their own. They are *aliased* to the buffer that they share:
tuples, bitcasts and barriers; a loop's state before, in and after its body; a slice and the array
that it is written into; a donated argument and the result that replaces it. An element-wise result
may also *reuse* an operand that nothing reads later, as `d` does: `b` then ends one moment early.
The arguments of a step are alive throughout: the caller holds them, or a result reuses them.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator

from ..communication._collectives import collective_kind
from ..hlo._hlo import Computation, Instruction, Module, Shape
from ..hlo._scope import phase_of
from ..hlo._source_lines import place_of
from ._buffer_sizes import SizedArray, SizedType, parse_sized_type
from ._fusions import (
    ELEMENTWISE,
    INTO,
    SAME,
    elementwise_parameters,
    find_update,
    written_parameter,
)

_CONSTANT = frozenset({"constant", "iota", "partition-id", "replica-id", "after-all"})
_DONATED = re.compile(r"\{([\d, ]*)\}: \((\d+), \{[^}]*\}, (?:may|must)-alias\)")
_IN_PLACE = re.compile(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}\)")


@dataclasses.dataclass(eq=False)
class Buffer:
    """An array in the device's memory, or several that are aliased.

    Attributes:
      shape: type of the array; of aliased ones, of the largest.
      bytes: bytes in main memory.
      start, end: the moment that makes it, and the last one that reads it.
      name: instruction that makes it.
      op_name: JAX's path for it, or for its operands.
      place: what its metadata says of its source; see `place_of`.
      phases: parts of the step that write it.
      readers: parts of the step that read it.
      from_collective: a collective writes it.
      argument: its number, if it is an argument of the step.
      output: it is a result of the step.
      params_only: it is computed from parameters alone.
      constant_only: it is computed from constants alone.
    """

    shape: Shape
    bytes: int
    start: int
    end: int
    name: str
    op_name: str = ""
    place: str = ""
    phases: set[str] = dataclasses.field(default_factory=set)
    from_collective: bool = False
    readers: set[str] = dataclasses.field(default_factory=set)
    argument: int | None = None
    output: bool = False
    params_only: bool = False
    constant_only: bool = False
    _alias_of: "Buffer | None" = None

    @property
    def alias_root(self) -> "Buffer":
        """The one buffer that holds the fields of all that are aliased to it."""
        root = self
        while root._alias_of is not None:
            root = root._alias_of
        return root

    def alias(self, other: "Buffer") -> None:
        """Merges another buffer into this one's root: both share one piece of memory.

        A loop over the state v, with `body(v) = v + w`:

            v0 = f32[256] start 3 end 4   before the loop   v0.alias(v1):
            v1 = f32[256] start 7 end 7   the body's result     v0: start 3 end 7, v1 → v0
        """
        mine, theirs = self.alias_root, other.alias_root
        if mine is theirs:
            return
        theirs._alias_of = mine
        if theirs.bytes > mine.bytes:
            mine.shape, mine.bytes = theirs.shape, theirs.bytes
        mine.start, mine.end = min(mine.start, theirs.start), max(mine.end, theirs.end)
        mine.phases |= theirs.phases
        mine.readers |= theirs.readers
        mine.from_collective |= theirs.from_collective
        # A gradient that a loop sums up starts as zeros: the sum has the telling name.
        if mine.constant_only or not mine.op_name:
            mine.name, mine.op_name = theirs.name, theirs.op_name or mine.op_name
            mine.place = theirs.place or mine.place
        mine.argument = theirs.argument if mine.argument is None else mine.argument
        mine.output |= theirs.output
        mine.params_only = all(x.params_only or x.constant_only for x in (mine, theirs))
        mine.constant_only &= theirs.constant_only


Value = Buffer | list["Value"]


class Liveness:
    """The buffers of one scheduled program and when each is alive."""

    def __init__(self, module: Module, platform: str, weights: frozenset[int]) -> None:
        """Walks a program that is scheduled and was read without problems.

        `platform` decides which memory space is main memory; `weights` numbers the arguments that
        are parameters.
        """
        self._module, self._platform = module, platform
        self._buffers: list[Buffer] = []
        self._reuse_candidates: list[tuple[int, Buffer, list[Buffer]]] = []
        self.moments: list[Instruction] = []  # moment 1 is at index 0
        self.problems: list[str] = []  # what could not be followed
        self._walk_entry(weights)
        for moment, result, operands in self._reuse_candidates:
            _reuse_operand(moment, result.alias_root, operands)

    def buffers(self) -> list[Buffer]:
        """The alias roots that take memory."""
        return [buffer for buffer in self._buffers if buffer._alias_of is None and buffer.bytes]

    def _walk_entry(self, weights: frozenset[int]) -> None:
        here = self._module.computations[self._module.entry]
        arguments: list[Value] = []
        for number, parameter in sorted(here.parameters.items()):
            value = self._allocate(parameter, [])
            for leaf in _flatten(value):
                leaf.argument, leaf.params_only = number, number in weights
            arguments.append(value)
        results = self._walk(here, arguments)
        for leaf in _flatten(results):
            leaf.alias_root.output = True
        for index, number in _DONATED.findall(self._module.header):
            _alias_all(arguments[int(number)], _index_value(results, index))
        self._mark_read([results, *arguments], "")

    def _walk(self, here: Computation, arguments: list[Value]) -> Value:
        """Walks a computation in the order of its schedule and returns the value of its root."""
        values: dict[str, Value] = {}
        for instruction in here.instructions.values():
            if instruction.opcode == "parameter":
                values[instruction.name] = arguments[int(instruction.arguments)]
            elif instruction.opcode == "constant":
                values[instruction.name] = self._constant_buffer(instruction)
            else:
                operands = [values[name] for name in instruction.operands]
                values[instruction.name] = self._evaluate(here, instruction, operands)
        assert here.root is not None
        return values[here.root.name]

    def _evaluate(
        self, here: Computation, instruction: Instruction, operands: list[Value]
    ) -> Value:
        if instruction.opcode == "tuple":
            return operands
        if instruction.opcode in SAME:
            return operands[0]
        if instruction.opcode == "get-tuple-element":
            return _index_value(operands[0], instruction.attrs["index"])
        if instruction.opcode == "while":
            return self._walk_loop(instruction, operands[0])
        if instruction.opcode == "conditional":
            return self._walk_branches(instruction, operands)
        self.moments.append(instruction)
        self._mark_read(operands, phase_of(instruction.op_name) if instruction.op_name else "")
        if instruction.opcode == "call":
            return self._walk(self._called(instruction), operands)
        if instruction.opcode == "async-start":
            return [operands, self._walk(self._called(instruction), operands)]
        if instruction.opcode.endswith("-done"):
            return _done_value(here.instructions[instruction.operands[0]], instruction, operands[0])
        result = self._allocate(instruction, operands)
        if instruction.opcode.endswith("-start"):
            result = _start_value(instruction, result, operands)
        self._alias_in_place(instruction, result, operands)
        return result

    def _called(self, instruction: Instruction) -> Computation:
        return self._module.computations[instruction.calls[0][1]]

    def _walk_loop(self, instruction: Instruction, state: Value) -> Value:
        called = dict(instruction.calls)
        self.moments.append(instruction)
        self._walk(self._module.computations[called["condition"]], [state])
        # One walk of the body stands for every trip: each updates the same buffers.
        after = self._walk(self._module.computations[called["body"]], [state])
        _alias_all(state, after)
        self._mark_read([state], "")
        return state

    def _walk_branches(self, instruction: Instruction, operands: list[Value]) -> Value:
        self.moments.append(instruction)
        branches = [self._module.computations[name] for _, name in instruction.calls]
        results = [
            self._walk(branch, [argument])
            for branch, argument in zip(branches, operands[1:], strict=True)
        ]
        # All branches write into the buffers of one result; only one of them runs.
        for other in results[1:]:
            _alias_all(results[0], other)
        self._mark_read(operands, "")
        return results[0]

    def _constant_buffer(self, instruction: Instruction) -> Buffer:
        """A constant is part of the program and takes no bytes of its allocation."""
        now, shape = len(self.moments), instruction.shapes[0]
        return Buffer(shape, 0, now, now, instruction.name, constant_only=True)

    def _allocate(self, instruction: Instruction, operands: list[Value]) -> Value:
        """Allocates the buffers of an instruction's result."""
        distinct = dict.fromkeys(leaf.alias_root for leaf in _flatten(operands))
        sources = sorted(distinct, key=lambda leaf: -leaf.bytes)
        path, place = self._origin(instruction, operands)
        path = path or next((leaf.op_name for leaf in sources if leaf.op_name), "")
        place = place or next((leaf.place for leaf in sources if leaf.place), "")
        # Scalars and constants (a scale, a mask value) do not decide what the result is made of.
        arrays = [leaf for leaf in sources if not leaf.constant_only and leaf.shape.dims]
        constant_only = instruction.opcode in _CONSTANT or (bool(sources) and not arrays)
        params_only = bool(arrays) and all(leaf.params_only for leaf in arrays)
        from_collective = collective_kind(instruction) is not None
        now = len(self.moments)

        def allocate(of: SizedType) -> Value:
            if not isinstance(of, SizedArray):
                return [allocate(element) for element in of]
            if not of.shape.known:
                self.problems.append(f"{instruction.name} has the unknown type {of.shape}")
            buffer = Buffer(
                shape=of.shape,
                bytes=of.bytes,
                start=now,
                end=now,
                name=instruction.name,
                op_name=path,
                place=place,
                phases={phase_of(path)} if path else set(),
                from_collective=from_collective,
                params_only=params_only,
                constant_only=constant_only,
            )
            self._buffers.append(buffer)
            return buffer

        return allocate(parse_sized_type(instruction.type, self._platform))

    def _origin(self, of: Instruction, operands: list[Value]) -> tuple[str, str]:
        """JAX's path and the place of an instruction; of an update, those of what it writes.

        A loop over layers saves what each computes in a stack. That update has the loop's line.
        """
        own, found = (of.op_name, place_of(of)), ("", "")
        outside = 1 if of.opcode == "dynamic-update-slice" else None
        if of.opcode == "fusion" and of.calls and (update := find_update(self._called(of))):
            found = update.op_name, place_of(update)
            outside = int(update.arguments) if update.opcode == "parameter" else None
        if outside is not None:
            made = next(_flatten(operands[outside])).alias_root
            found = made.op_name, made.place
        return found if found[1] and phase_of(found[0]) == phase_of(own[0]) else own

    def _mark_read(self, values: Iterable[Value], phase: str) -> None:
        for leaf in _flatten(list(values)):
            root = leaf.alias_root
            root.end = len(self.moments)
            if phase:
                root.readers.add(phase)

    def _alias_in_place(
        self, instruction: Instruction, result: Value, operands: list[Value]
    ) -> None:
        """Aliases results to the operands that they are written into; records those to reuse."""
        aliasing = instruction.attrs.get("output_to_operand_aliasing", "")
        for index, number, inner in _IN_PLACE.findall(aliasing):
            _alias_all(_index_value(operands[int(number)], inner), _index_value(result, index))
        if instruction.opcode in INTO:
            _alias_written(result, operands[0])
        elif instruction.opcode in ELEMENTWISE:
            self._record_reuse(result, operands)
        elif instruction.opcode == "fusion" and instruction.calls:
            inner = self._called(instruction)
            parts = result if isinstance(result, list) else [result]
            for part, root in zip(parts, inner.results, strict=False):
                number = written_parameter(inner, root)
                if number is not None:
                    _alias_written(part, operands[number])
            reusable = [operands[number] for number in elementwise_parameters(inner)]
            self._record_reuse(result, reusable)

    def _record_reuse(self, result: Value, operands: list[Value]) -> None:
        for leaf in _flatten(result):
            self._reuse_candidates.append((len(self.moments), leaf, list(_flatten(operands))))


def _alias_all(value: Value, other: Value) -> None:
    for mine, theirs in zip(_flatten(value), _flatten(other), strict=True):
        mine.alias(theirs)


def _reuse_operand(moment: int, result: Buffer, operands: list[Buffer]) -> None:
    """Gives a result the memory of an operand of its size that it reads last.

    That is known only when the whole program has been walked, since a later instruction may read
    the operand too.
    """
    if result.start != moment:
        return
    for operand in (buffer.alias_root for buffer in operands):
        dies = operand.end == moment and operand.start < moment and operand is not result
        if dies and operand.bytes == result.bytes and operand.argument is None:
            operand.end = moment - 1
            return


def _alias_written(result: Value, target: Value) -> None:
    """Aliases a result to the operand that it is written into, unless the caller owns that."""
    if isinstance(result, Buffer) and isinstance(target, Buffer):
        root = target.alias_root
        if root.argument is None and not root.constant_only and target.bytes:
            target.alias(result)


def _start_value(start: Instruction, result: Value, operands: list[Value]) -> Value:
    """The value of an asynchronous start: its operands, then its results.

    `(f32[8], f32[32]) all-gather-start(x)` repeats the type of `x`, and allocates only `f32[32]`.
    """
    if not isinstance(result, list) or len(result) < 2:
        return result
    if start.opcode == "copy-start":
        return [result[0], operands[0], *result[2:]]
    shapes = [str(leaf.shape) for leaf in _flatten(operands)]
    if [str(leaf.shape) for leaf in _flatten(result[0])] != shapes:
        return result
    for leaf in _flatten(result[0]):
        leaf.bytes = 0
    return [operands if isinstance(result[0], list) else operands[0], *result[1:]]


def _done_value(start: Instruction, done: Instruction, started: Value) -> Value:
    """The value of an asynchronous end, as a part of its start's."""
    if not isinstance(started, list):
        return started
    if start.opcode == "recv":
        return [started[0], started[-1]]
    if start.opcode == "copy-start":
        return started[0]
    if start.opcode.endswith("-start") and len(started) > 1:
        # A start with as many arrays as its end has no operands in it: a tuple's all-reduce-start.
        return started if len(start.shapes) == len(done.shapes) else started[1]
    return started


def _flatten(value: Value) -> Iterator[Buffer]:
    if isinstance(value, Buffer):
        yield value
    else:
        for element in value:
            yield from _flatten(element)


def _index_value(value: Value, index: str) -> Value:
    for number in re.findall(r"\d+", index):
        assert isinstance(value, list)
        value = value[int(number)]
    return value
