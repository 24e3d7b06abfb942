"""Reads the text of a compiled XLA program: computations, instructions, and who calls whom.

The text is meant for people and has traps: an instruction can span several lines (kernel metadata
has newlines), so that a line such as `}}, metadata={…` looks like the end of a computation;
operands may repeat their types; layouts have brackets too. So an instruction is read up to the
point where all its brackets and quotes close, and what cannot be read is listed in
`Module.problems`: a reader that loses text silently also loses bytes silently.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+)\s*(\(.*\)\s*->.*)?\{\s*$", re.DOTALL)
# A computation of another core of the chip ends in `}, execution_thread="sparsecore"`.
_END = re.compile(r"\}(?:, \w+=.*)?\s*$")
_START = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ", re.DOTALL)
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=\s]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|"|[(){}\[\],]', re.DOTALL)
_NESTING = re.compile(r'["(){}\[\]]')
_BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4, "token": 0, "opaque": 0}
_DTYPE = re.compile(r"(?:[su](8|16|32|64)|f(16|32|64)|bf(16)|c(64|128)|f(4|8)e\dm\d\w*)$")
_CALLS = ("calls", "to_apply", "body", "condition", "true_computation", "false_computation")
_LITERAL = frozenset({"constant", "parameter"})  # a value in their parentheses, no operands
_CALL_LISTS = ("branch_computations", "called_computations", "async_execution_thread_calls")


def dtype_bits(dtype: str) -> int:
    """Bits of one element of an XLA dtype; 0 for an unknown one.

    >>> dtype_bits("bf16"), dtype_bits("pred"), dtype_bits("f8e4m3fn"), dtype_bits("c64")
    (16, 8, 8, 64)
    """
    if dtype in _BITS:
        return _BITS[dtype]
    match = _DTYPE.match(dtype)
    return int(match[match.lastindex or 0]) if match else 0


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array type as XLA prints it: `f32[4,16]`."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def known(self) -> bool:
        """The size of the element type is known."""
        return self.dtype in _BITS or bool(dtype_bits(self.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of the array; types narrower than a byte count packed."""
        return -(-math.prod(self.dims) * dtype_bits(self.dtype) // 8)

    def __str__(self) -> str:
        """Returns `f32[4,16]`."""
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction."""

    name: str  # without the `%`
    opcode: str  # `all-reduce`, `fusion`, `while` …
    shapes: tuple[Shape, ...]  # result arrays; a tuple is flattened
    type: str  # text of the result's type, with tuples and layouts
    operands: tuple[str, ...]  # names of its operands
    # text between its parentheses: the value of a `constant`, the number of a `parameter`
    arguments: str
    rest: str  # text of its attributes, not parsed; see `attrs`
    root: bool = False  # its value is the result of the computation

    @functools.cached_property
    def attrs(self) -> dict[str, str]:
        """Attributes by name, each as its text."""
        attrs: dict[str, str] = {}
        last = ""
        for piece in split_commas(self.rest):
            key, equals, value = piece.partition("=")
            if not equals or key.strip() == "device_ids":  # belongs to a mesh's replica groups
                attrs[last] = attrs.get(last, "") + ", " + piece.strip()
                continue
            last = key.strip()
            attrs[last] = value
        return attrs

    @functools.cached_property
    def op_name(self) -> str:
        """The path of JAX scopes and transformations that this instruction comes from."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attrs.get("metadata", ""))
        return match.group(1) if match else ""

    @functools.cached_property
    def element_counts(self) -> tuple[int, ...]:
        """Number of arrays in each element of its result, a tuple whose elements may be tuples."""
        elements = split_commas(self.type.strip()[1:-1])
        return tuple(len(_SHAPE.findall(element)) for element in elements)

    @functools.cached_property
    def calls(self) -> tuple[tuple[str, str], ...]:
        """Pairs (attribute, name of the computation that it calls)."""
        if "=" not in self.rest:
            return ()
        calls = []
        for key in _CALLS:
            if f"{key}=" in self.rest and key in self.attrs:
                calls += [(key, self.attrs[key].strip().lstrip("%"))]
        for key in _CALL_LISTS:
            if f"{key}=" in self.rest and key in self.attrs:
                calls += [(key, name) for name in _NAME.findall(self.attrs[key])]
        return tuple(calls)


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named computation; `instructions` keeps the printed order, which is the schedule."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction | None:
        """The instruction whose value the computation returns."""
        return next((i for i in self.instructions.values() if i.root), None)

    @property
    def results(self) -> list[Instruction]:
        """The root, or what it puts into a tuple."""
        if self.root is None or self.root.opcode != "tuple":
            return [self.root] if self.root else []
        return [self.instructions[name] for name in self.root.operands]

    def after(self, name: str) -> Iterator[Instruction]:
        """The instructions printed after one, without a walk through those before it."""
        order, position = self._order
        for index in range(position[name] + 1, len(order)):
            yield order[index]

    @functools.cached_property
    def _order(self) -> tuple[list[Instruction], dict[str, int]]:
        order = list(self.instructions.values())
        return order, {instruction.name: index for index, instruction in enumerate(order)}

    @functools.cached_property
    def users(self) -> dict[str, list[str]]:
        """Name of an instruction → names of those that read its result."""
        users: dict[str, list[str]] = {}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                users.setdefault(name, []).append(instruction.name)
        return users

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameter number → instruction."""
        return {int(i.arguments): i for i in self.instructions.values() if i.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Module:
    """A parsed program."""

    header: str  # the `HloModule` line
    computations: dict[str, Computation]  # by name
    entry: str  # name of the computation that runs first; "" if the text has none
    problems: tuple[str, ...] = ()  # parts of the text that could not be read

    @functools.cached_property
    def callers(self) -> dict[str, list[tuple[Computation, Instruction]]]:
        """Computation → every instruction that calls it, with its computation."""
        callers: dict[str, list[tuple[Computation, Instruction]]] = {}
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                for _, callee in instruction.calls:
                    callers.setdefault(callee, []).append((computation, instruction))
        return callers

    @property
    def scheduled(self) -> bool:
        """Instructions are printed in the order in which they run."""
        return "is_scheduled=true" in self.header

    @property
    def num_partitions(self) -> int:
        """Number of devices that run the program together."""
        match = re.search(r"num_partitions=(\d+)", self.header)
        return int(match.group(1)) if match else 1


def aliased_parameters(text: str) -> frozenset[int]:
    """Numbers of the entry parameters whose buffers outputs reuse.

    >>> header = "HloModule m, input_output_alias={ {0}: (2, {}, may-alias) }, x={}"
    >>> sorted(aliased_parameters(header))
    [2]
    """
    match = re.search(r"input_output_alias=\{(.*?\))\s*\}", text.partition("\n")[0])
    return frozenset(map(int, re.findall(r": \((\d+),", match[1]))) if match else frozenset()


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`.

    >>> module = parse('''HloModule m, num_partitions=2
    ... ENTRY %main (x: f32[4]) -> f32[4] {
    ...   %x = f32[4]{0} parameter(0)
    ...   ROOT %y = f32[4]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
    ... }
    ... ''')
    >>> module.computations["main"].root.opcode, module.problems
    ('all-reduce', ())
    """
    computations: dict[str, Computation] = {}
    problems: list[str] = []
    header, entry = "", ""
    current: Computation | None = None
    for line in _logical_lines(text, problems):
        if current is None:
            if line.startswith("HloModule"):
                header = line
            elif (match := _HEADER.match(line)) and not line.startswith(" "):
                current = Computation(match.group(2), {})
                entry = match.group(2) if match.group(1) else entry
        elif _END.match(line):
            computations[current.name] = current
            current = None
        elif (instruction := _parse_instruction(line)) is not None:
            current.instructions[instruction.name] = instruction
        elif line.strip():
            problems.append(f"computation {current.name}: cannot read {line.strip()[:60]!r}")
    if current is not None:
        computations[current.name] = current
        problems.append(f"the text ends inside computation {current.name}")
    if not header:
        problems.append("the text has no HloModule line")
    if not entry:
        problems.append("the text has no ENTRY computation")
    problems += [
        problem for computation in computations.values() for problem in _find_gaps(computation)
    ]
    return Module(header, computations, entry, tuple(problems))


def _find_gaps(computation: Computation) -> Iterator[str]:
    """Reports missing lines of a computation: its root, or operands without an instruction."""
    where, known = f"computation {computation.name}", computation.instructions
    if computation.root is None:
        yield f"{where} has no ROOT"
    for instruction in known.values():
        if instruction.opcode not in _LITERAL and not known.keys() >= set(instruction.operands):
            missing = next(name for name in instruction.operands if name not in known)
            yield f"{where}: operand {missing} of {instruction.name} is not in the text"


def _logical_lines(text: str, problems: list[str]) -> Iterator[str]:
    """Yields lines; those of one instruction or header are joined."""
    pending = ""
    for line in text.split("\n"):
        whole = f"{pending}\n{line}" if pending else line
        opens = pending or _START.match(line)
        if opens and not _is_closed(whole):
            pending = whole
            continue
        pending = ""
        yield whole
    if pending:
        problems.append(f"the text ends inside {pending.strip()[:60]!r}")


def _is_closed(text: str) -> bool:
    """Whether all brackets and quotes of the text close."""
    if not (text.count('"') - text.count('\\"')) % 2 and all(
        text.count(a) == text.count(b) for a, b in ("()", "{}", "[]")
    ):
        return True
    tokens = [("", 0), *((match[0], depth) for match, depth in _nest(text))]
    return tokens[-1][1] == 0 and ('"' not in dict(tokens))


def _nest(text: str, start: int = 0) -> Iterator[tuple[re.Match[str], int]]:
    """Brackets, commas and quoted texts from an index on, each with the depth behind it."""
    depth = 0
    for match in _TOKEN.finditer(text, start):
        token = match.group()
        depth += (token in "({[") - (token in ")}]")
        yield match, depth


def _closing_index(text: str, start: int) -> int:
    """Index after the bracket that closes the one at `start`; -1 if none does."""
    end = text.find(")", start)
    if text.startswith("(", start) and end > 0 and not _NESTING.search(text, start + 1, end):
        return end + 1
    return next((match.end() for match, depth in _nest(text, start) if depth == 0), -1)


def split_commas(text: str) -> list[str]:
    """Splits at the commas outside of brackets and quotes."""
    if not _NESTING.search(text):
        return [piece for piece in text.split(",") if piece.strip()]
    pieces, start = [], 0
    for match, depth in _nest(text):
        if match[0] == "," and depth == 0:
            pieces.append(text[start : match.start()])
            start = match.end()
    return [piece for piece in [*pieces, text[start:]] if piece.strip()]


def _parse_instruction(line: str) -> Instruction | None:
    """Reads one instruction; None if the line is something else."""
    start = _START.match(line)
    if start is None:
        return None
    at = start.end()
    end = _closing_index(line, at) if line.startswith("(", at) else line.find(" ", at)
    opcode = _OPCODE.match(line, end) if end > 0 else None
    if opcode is None:
        return None
    close = _closing_index(line, opcode.end() - 1)
    if close < 0:
        return None
    arguments = line[opcode.end() : close - 1]
    return Instruction(
        name=start.group(2),
        opcode=opcode.group(1),
        shapes=parse_shapes(line[at:end]),
        type=line[at:end],
        operands=tuple(_operand_name(piece) for piece in split_commas(arguments)),
        arguments=arguments,
        rest=line[close:].lstrip(", "),
        root=bool(start.group(1)),
    )


def _operand_name(piece: str) -> str:
    """Name of an operand, which may be printed with its type in front."""
    return piece.split()[-1].rpartition("*/")[2].lstrip("%")


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Reads every array type in a text; bounds of dynamic dims (`<=8`) count as the size.

    >>> [str(shape) for shape in parse_shapes("(f32[4,16]{1,0:T(8,128)}, /*index=1*/s32[])")]
    ['f32[4,16]', 's32[]']
    """
    return tuple(
        Shape(dtype, tuple(map(int, re.findall(r"[0-9]+", dims))))
        for dtype, dims in _SHAPE.findall(text)
    )
