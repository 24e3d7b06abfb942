"""From when to when each buffer of a scheduled program lives.

The program is walked in the order of its schedule, a loop's body once. A buffer lives from the
instruction that makes it to the last one that reads it. Tuples, bitcasts and barriers make none;
a loop, and what a donated input becomes, stay in place; so does a slice that is written into an
array. An element-wise result may take over an operand that nothing reads any more. The arguments
of a step live throughout, for the caller holds them or a result reuses them.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator

from ..communication._collectives import kind_of
from ..hlo._hlo import Computation, Instruction, Module, Shape
from ..hlo._scope import phase_of
from ._buffer_sizes import Sized, Type, sized

_SAME = frozenset({"bitcast", "opt-barrier", "domain", "add-dependency"})
_INTO = frozenset({"dynamic-update-slice", "scatter"})
_NEUTRAL = frozenset({"constant", "iota", "partition-id", "replica-id", "after-all"})
_ELEMENTWISE = frozenset(
    """abs add and atan2 cbrt ceil clamp compare convert copy cosine divide erf exponential
    exponential-minus-one floor is-finite log log-plus-one logistic maximum minimum multiply negate
    not or power remainder round-nearest-even rsqrt select sign sine sqrt subtract tan tanh xor
    all-reduce""".split()
)
_DONATED = re.compile(r"\{([\d, ]*)\}: \((\d+), \{[^}]*\}, (?:may|must)-alias\)")
_IN_PLACE = re.compile(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}\)")


@dataclasses.dataclass(eq=False)
class Buffer:
    """An array in the device's memory, or several that share one place one after another.

    Attributes:
      shape: type of the array.
      bytes: bytes in main memory.
      start: moment at which it is made.
      end: last moment at which it is read.
      name: instruction that makes it.
      op_name: JAX's path for it, or for what it is made of.
      phases: parts of the step that write it.
      readers: parts of the step that read it.
      sent: a collective writes it.
      argument: number of the argument of the step that it is.
      output: it is a result of the step.
      weight: it is made of parameters alone.
      neutral: it is made of constants alone.
    """

    shape: Shape
    bytes: int
    start: int
    end: int
    name: str
    op_name: str
    phases: set[str]
    sent: bool = False
    readers: set[str] = dataclasses.field(default_factory=set)
    argument: int | None = None
    output: bool = False
    weight: bool = False
    neutral: bool = False
    _into: "Buffer | None" = None

    @property
    def place(self) -> "Buffer":
        """The buffer that stands for all that share its place."""
        found = self
        while found._into is not None:
            found = found._into
        return found

    def join(self, other: "Buffer") -> None:
        """Puts two buffers into one place."""
        mine, theirs = self.place, other.place
        if mine is theirs:
            return
        theirs._into = mine
        if theirs.bytes > mine.bytes:
            mine.shape, mine.bytes = theirs.shape, theirs.bytes
        mine.start, mine.end = min(mine.start, theirs.start), max(mine.end, theirs.end)
        mine.phases |= theirs.phases
        mine.readers |= theirs.readers
        mine.sent |= theirs.sent
        # Where a loop's state begins as zeros, what it becomes says more.
        if mine.neutral or not mine.op_name:
            mine.name, mine.op_name = theirs.name, theirs.op_name or mine.op_name
        mine.argument = theirs.argument if mine.argument is None else mine.argument
        mine.output |= theirs.output
        mine.weight = (mine.weight or mine.neutral) and (theirs.weight or theirs.neutral)
        mine.neutral &= theirs.neutral


Value = Buffer | list["Value"]


class Lives:
    """The buffers of one scheduled program.

    Attributes:
      moments: the instruction of each moment.
      problems: what could not be followed.
    """

    def __init__(self, module: Module, platform: str, weights: frozenset[int]) -> None:
        """Follows a program.

        Args:
          module: the program, scheduled and read without problems.
          platform: decides which memory is the device's own.
          weights: numbers of the arguments that are parameters.
        """
        self._module, self._platform = module, platform
        self._made: list[Buffer] = []
        self._results: dict[int, Value] = {}
        self._takeovers: list[tuple[int, Buffer, list[Buffer]]] = []
        self.moments: list[Instruction] = []
        self.problems: list[str] = []
        self._entry(weights)
        for at, made, operands in self._takeovers:
            _take_over(at, made.place, operands)

    def buffers(self) -> list[Buffer]:
        """Every place in memory, once."""
        return [one for one in self._made if one._into is None and one.bytes]

    def _entry(self, weights: frozenset[int]) -> None:
        here = self._module.computations[self._module.entry]
        arguments: list[Value] = []
        for number, parameter in sorted(here.parameters.items()):
            value = self._fresh(parameter, [])
            for leaf in _leaves(value):
                leaf.argument, leaf.weight = number, number in weights
            arguments.append(value)
        results = self._run(here, arguments)
        outputs = list(_leaves(results))
        for leaf in outputs:
            leaf.place.output = True
        for at, number in _DONATED.findall(self._module.header):
            for made, given in zip(
                _leaves(_at(results, at)), _leaves(arguments[int(number)]), strict=True
            ):
                given.join(made)
        self._read([results, *arguments], "")

    def _run(self, here: Computation, arguments: list[Value]) -> Value:
        values: dict[str, Value] = {}
        for one in here.instructions.values():
            if one.opcode == "parameter":
                values[one.name] = arguments[int(one.arguments)]
            elif one.opcode == "constant":
                values[one.name] = self._constant(one)
            else:
                values[one.name] = self._value(here, one, [values[n] for n in one.operands])
        assert here.root is not None
        return values[here.root.name]

    def _value(self, here: Computation, one: Instruction, operands: list[Value]) -> Value:
        if one.opcode == "tuple":
            return operands
        if one.opcode in _SAME:
            return operands[0]
        if one.opcode == "get-tuple-element":
            return _at(operands[0], one.attrs["index"])
        if one.opcode == "while":
            return self._loop(one, operands[0])
        if one.opcode == "conditional":
            return self._branches(one, operands)
        self.moments.append(one)
        self._read(operands, phase_of(one.op_name) if one.op_name else "")
        if one.opcode == "call":
            return self._run(self._called(one), operands)
        if one.opcode == "async-start":
            return [operands, self._run(self._called(one), operands)]
        if one.opcode.endswith("-done"):
            return self._arrived(here, one, operands[0])
        made = self._fresh(one, operands)
        if one.opcode.endswith("-start"):
            made = _started(one, made, operands)
        self._in_place(one, made, operands)
        return made

    def _called(self, one: Instruction) -> Computation:
        return self._module.computations[one.calls[0][1]]

    def _loop(self, one: Instruction, state: Value) -> Value:
        called = dict(one.calls)
        self.moments.append(one)
        self._run(self._module.computations[called["condition"]], [state])
        after = self._run(self._module.computations[called["body"]], [state])
        self._join(state, after)
        self._read([state], "")
        return state

    def _branches(self, one: Instruction, operands: list[Value]) -> Value:
        self.moments.append(one)
        branches = [self._module.computations[name] for _, name in one.calls]
        results = [
            self._run(branch, [given]) for branch, given in zip(branches, operands[1:], strict=True)
        ]
        for other in results[1:]:
            self._join(results[0], other)
        self._read(operands, "")
        return results[0]

    def _join(self, one: Value, other: Value) -> None:
        for mine, theirs in zip(_leaves(one), _leaves(other), strict=True):
            mine.join(theirs)

    def _arrived(self, here: Computation, one: Instruction, started: Value) -> Value:
        start = here.instructions[one.operands[0]]
        if start.opcode == "recv" and isinstance(started, list):
            return [started[0], started[-1]]
        if start.opcode == "copy-start" and isinstance(started, list):
            return started[0]
        if start.opcode.endswith("-start") and isinstance(started, list) and len(started) > 1:
            if _count(sized(start.type, "")) != _count(sized(one.type, "")):
                return started[1]
        return started

    def _constant(self, one: Instruction) -> Buffer:
        """Constants lie in the program, not in what it allocates."""
        shape = one.shapes[0]
        now = len(self.moments)
        return Buffer(shape, 0, now, now, one.name, "", set(), neutral=True)

    def _fresh(self, one: Instruction, operands: list[Value]) -> Value:
        sources = sorted({leaf.place for leaf in _leaves(operands)}, key=lambda leaf: -leaf.bytes)
        path = one.op_name or next((leaf.op_name for leaf in sources if leaf.op_name), "")
        meant = [leaf for leaf in sources if not leaf.neutral and leaf.shape.dims]
        neutral = one.opcode in _NEUTRAL or (bool(sources) and not meant)
        weight = bool(meant) and all(leaf.weight for leaf in meant)
        sent = kind_of(one) is not None

        def made(of: Type) -> Value:
            if not isinstance(of, Sized):
                return [made(inner) for inner in of]
            if not of.shape.known:
                self.problems.append(f"{one.name} has the unknown type {of.shape}")
            now = len(self.moments)
            phases = {phase_of(path)} if path else set[str]()
            buffer = Buffer(of.shape, of.bytes, now, now, one.name, path, phases, sent)
            buffer.weight, buffer.neutral = weight, neutral
            self._made.append(buffer)
            return buffer

        return made(sized(one.type, self._platform))

    def _read(self, values: Iterable[Value], phase: str) -> None:
        for leaf in _leaves(list(values)):
            place = leaf.place
            place.end = len(self.moments)
            if phase:
                place.readers.add(phase)

    def _in_place(self, one: Instruction, made: Value, operands: list[Value]) -> None:
        """Joins results with the operands that they are written into, or may take over."""
        for at, number, inner in _IN_PLACE.findall(one.attrs.get("output_to_operand_aliasing", "")):
            self._join(_at(operands[int(number)], inner), _at(made, at))
        if one.opcode in _INTO:
            _write_into(made, operands[0])
        elif one.opcode in _ELEMENTWISE:
            self._may_take_over(made, operands)
        elif one.opcode == "fusion" and one.calls:
            inner = self._called(one)
            for slot, root in zip(_slots(made), _roots(inner), strict=False):
                source = _source(inner, root)
                if source is not None:
                    _write_into(slot, operands[source])
            ways = [operands[n] for n in inner.parameters if _elementwise(inner, n)]
            self._may_take_over(made, ways)

    def _may_take_over(self, made: Value, operands: list[Value]) -> None:
        for leaf in _leaves(made):
            self._takeovers.append((len(self.moments), leaf, list(_leaves(operands))))


def _take_over(at: int, made: Buffer, operands: list[Buffer]) -> None:
    if made.start != at:
        return
    for operand in (one.place for one in operands):
        dies = operand.end == at and operand.start < at and operand is not made
        if dies and operand.bytes == made.bytes and operand.argument is None:
            operand.end = at - 1
            return


def _write_into(made: Value, target: Value) -> None:
    """The result takes the place of an operand, unless that is the caller's."""
    if isinstance(made, Buffer) and isinstance(target, Buffer):
        if target.place.argument is None and not target.place.neutral | (not target.bytes):
            target.join(made)


def _started(one: Instruction, made: Value, operands: list[Value]) -> Value:
    """What an asynchronous start holds: its operands, then its results."""
    if not isinstance(made, list) or len(made) < 2:
        return made
    if one.opcode == "copy-start":
        return [made[0], operands[0], *made[2:]]
    given = [str(leaf.shape) for leaf in _leaves(operands)]
    if [str(leaf.shape) for leaf in _leaves(made[0])] != given:
        return made
    for leaf in _leaves(made[0]):
        leaf.bytes = 0
    held = operands if isinstance(made[0], list) else operands[0]
    return [held, *made[1:]]


def _source(inner: Computation, root: Instruction) -> int | None:
    """Number of the parameter that a fusion's result is, or is written into."""
    while root.opcode != "parameter":
        if root.opcode not in _INTO | _SAME:
            return None
        root = inner.instructions[root.operands[0]]
    return int(root.arguments)


def _elementwise(inner: Computation, number: int) -> bool:
    """Whether all that a fusion does with a parameter is element by element."""
    reached = {inner.parameters[number].name}
    for one in inner.instructions.values():
        if reached & set(one.operands):
            if one.opcode not in _ELEMENTWISE | _SAME | {"tuple"}:
                return False
            reached.add(one.name)
    return True


def _roots(inner: Computation) -> list[Instruction]:
    root = inner.root
    if root is None or root.opcode != "tuple":
        return [root] if root else []
    return [inner.instructions[name] for name in root.operands]


def _slots(value: Value) -> list[Value]:
    return value if isinstance(value, list) else [value]


def _leaves(value: Value) -> Iterator[Buffer]:
    if isinstance(value, Buffer):
        yield value
    else:
        for one in value:
            yield from _leaves(one)


def _count(of: Type) -> int:
    return sum(map(_count, of)) if isinstance(of, list) else 1


def _at(value: Value, index: str) -> Value:
    for number in re.findall(r"\d+", index):
        assert isinstance(value, list)
        value = value[int(number)]
    return value
