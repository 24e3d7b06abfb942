"""Bytes of device memory that a compiled program reads and writes, for rooflines.

Every instruction of a schedule reads its operands and writes its results once; values inside a
fusion stay in registers. Reading or writing a slice of an array moves the bytes of the slice.
"""

from collections.abc import Iterator

from ..communication._collectives import collective_kind
from ..hlo._hlo import Computation, Instruction, Module
from ..hlo._trips import TripCounts

# These name or group values, or call; none of them moves bytes itself.
_FREE = frozenset(
    """parameter constant tuple get-tuple-element bitcast while conditional call after-all
    partition-id replica-id opt-barrier domain add-dependency async-start async-update
    async-done""".split()
)
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
_UPDATE = "dynamic-update-slice"


def step_traffic(module: Module, loops: TripCounts) -> tuple[int, tuple[str, ...]]:
    """Bytes that a step reads and writes, and the loops of unknown length, which count once."""
    unknown: list[str] = []
    total = sum(
        times * instruction_traffic(module, here, instruction)
        for here, instruction, times in _executed_instructions(
            module, loops, module.entry, 1, unknown
        )
    )
    return total, tuple(dict.fromkeys(unknown))


def instruction_traffic(module: Module, here: Computation, instruction: Instruction) -> int:
    """Bytes that one execution of an instruction reads and writes; 0 for a collective.

    A loop, branch or call counts 0; the instructions that it runs count.
    """
    op = instruction.opcode
    if op in _FREE or op.endswith("-done") or collective_kind(instruction):
        return 0
    if op == "copy-start":
        return sum(shape.nbytes for shape in instruction.shapes[:2])
    if op.startswith("fusion") and instruction.calls:
        return _fusion_traffic(module, here, instruction)
    if op in _SLICES:
        return 2 * _result_bytes(instruction)
    if op == _UPDATE:
        return 2 * _operand_bytes(here, instruction.operands[1])
    return _result_bytes(instruction) + sum(
        _operand_bytes(here, name) for name in instruction.operands
    )


def _executed_instructions(
    module: Module, loops: TripCounts, name: str, times: int, unknown: list[str]
) -> Iterator[tuple[Computation, Instruction, int]]:
    """Every instruction outside of fusions, with its executions per step; all branches count."""
    here = module.computations[name]
    for instruction in here.instructions.values():
        yield here, instruction, times
        if instruction.opcode == "while":
            trips = loops.trips(name, instruction.name)
            unknown += [instruction.name] if trips is None else []
            body = dict(instruction.calls)["body"]
            yield from _executed_instructions(
                module, loops, body, times * (1 if trips is None else trips), unknown
            )
        elif instruction.opcode in ("call", "conditional", "async-start"):
            for _, callee in instruction.calls:
                yield from _executed_instructions(module, loops, callee, times, unknown)


def _fusion_traffic(module: Module, here: Computation, fusion: Instruction) -> int:
    inner = module.computations[fusion.calls[0][1]]
    if any(collective_kind(instruction) for instruction in inner.instructions.values()):
        return 0
    read = 0
    for number, parameter in inner.parameters.items():
        users = list(_value_users(inner, parameter.name))
        sliced = (u.opcode in {*_SLICES, _UPDATE} and u.operands[0] == name for u, name in users)
        if users and all(sliced):
            read += sum(_result_bytes(user) for user, _ in users if user.opcode in _SLICES)
        else:
            read += _operand_bytes(here, fusion.operands[number])
    return read + sum(_written_bytes(inner, instruction) for instruction in inner.results)


def _value_users(inner: Computation, name: str) -> Iterator[tuple[Instruction, str]]:
    """(instruction, operand name) of those that read a value, directly or through bitcasts."""
    for instruction in inner.instructions.values():
        if name in instruction.operands:
            if instruction.opcode == "bitcast":
                yield from _value_users(inner, instruction.name)
            else:
                yield instruction, name


def _written_bytes(inner: Computation, root: Instruction) -> int:
    while root.opcode == "bitcast" and root.operands[0] in inner.instructions:
        root = inner.instructions[root.operands[0]]
    return (
        _operand_bytes(inner, root.operands[1]) if root.opcode == _UPDATE else _result_bytes(root)
    )


def _result_bytes(instruction: Instruction) -> int:
    return sum(shape.nbytes for shape in instruction.shapes)


def _operand_bytes(here: Computation, name: str) -> int:
    instruction = here.instructions.get(name)
    return _result_bytes(instruction) if instruction else 0
