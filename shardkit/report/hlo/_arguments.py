"""Traces an array back to the argument that it is a copy, cast, transpose or gather of."""

from ._hlo import Computation, Instruction, Module

_FORMS = frozenset(
    """copy copy-start copy-done bitcast convert transpose reshape opt-barrier
    get-tuple-element""".split()
)
_GATHERS = frozenset("all-gather all-gather-start all-gather-done".split())
_INSIDE = _FORMS | {"parameter", "constant", "tuple"}


class ComputedError(Exception):
    """An array is the result of arithmetic, not another form of an argument."""


def find_argument(module: Module, here: Computation, name: str) -> int | None:
    """Finds the argument of the program that an array is another form of.

    Args:
      module: the compiled program.
      here: the computation of the array.
      name: of the instruction that produces it.

    Returns:
      The argument's number; None if it is unknown, as for the state of a loop.

    Raises:
      Computed: the array is a result of arithmetic.
    """
    instruction = here.instructions.get(name)
    while instruction is not None:
        if instruction.opcode == "parameter":
            return int(instruction.arguments) if here.name == module.entry else None
        if instruction.opcode == "while":
            return None
        arrays = [o for o in instruction.operands if not _is_constant(here, o)]
        several = len(arrays) != 1
        if several and instruction.opcode in ("tuple", "fusion", *_GATHERS):
            return None
        if several or not _keeps_values(module, instruction):
            raise ComputedError
        instruction = here.instructions.get(arrays[0])
    return None


def _is_constant(here: Computation, name: str) -> bool:
    instruction = here.instructions.get(name)
    return instruction is not None and instruction.opcode == "constant"


def _keeps_values(module: Module, instruction: Instruction) -> bool:
    """Whether an instruction with one operand changes its form alone, not its values."""
    if instruction.opcode != "fusion":
        return instruction.opcode in _FORMS | _GATHERS
    inner = [
        module.computations[callee]
        for _, callee in instruction.calls
        if callee in module.computations
    ]
    return all(i.opcode in _INSIDE for c in inner for i in c.instructions.values())
