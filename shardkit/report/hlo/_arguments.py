"""Traces an array back to the argument that it is a copy, cast, transpose, slice or gather of."""

import dataclasses
from collections.abc import Sequence

from ._hlo import Computation, Instruction, Module

_FORMS = frozenset(
    """copy copy-start copy-done bitcast convert transpose reshape opt-barrier slice dynamic-slice
    all-gather all-gather-start all-gather-done collective-permute collective-permute-start
    collective-permute-done async-update async-done call-update call-done""".split()
)
_SEVERAL = frozenset({"tuple", "all-gather", "all-gather-start"})
_CALLS = frozenset({"fusion", "call", "call-start", "async-start"})


class ComputedError(Exception):
    """An array is the result of arithmetic, not another form of an argument."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """The value of an instruction, or an element of it: `elements` are indices into tuples."""

    computation: str
    name: str
    elements: tuple[int, ...] = ()


def find_argument(module: Module, here: Computation, name: str) -> int | None:
    """Finds the argument of the program that an array is another form, or a part, of.

    The state of a loop is its initial value, or what the body makes of it. A loop over layers
    passes their stack on, and slices one layer, perhaps the next one ahead:

        all-gather(fusion(state[3], i)) → dynamic-slice(state[3]) → initial[3] → parameter(7)

    Args:
      module: the compiled program.
      here: the computation of the array.
      name: of the instruction that produces it.

    Returns:
      The argument's number; None if it is unknown, or one of several.

    Raises:
      ComputedError: the array is a result of arithmetic.
    """
    arguments, visited = set[int | None](), set[_Place]()
    pending = [_Place(here.name, name)]
    while pending:
        place = pending.pop()
        if place in visited:
            continue
        visited.add(place)
        instruction = module.computations[place.computation].instructions.get(place.name)
        if instruction and instruction.opcode == "parameter" and place.computation == module.entry:
            arguments.add(int(instruction.arguments))
            continue
        sources = _find_sources(module, place, instruction) if instruction else ()
        arguments |= set() if sources else {None}
        pending += sources
    return arguments.pop() if len(arguments) == 1 else None


def _find_sources(module: Module, place: _Place, instruction: Instruction) -> Sequence[_Place]:
    """The same array, or what it is a part of, one instruction earlier; () if unknown."""
    op, operands, elements = instruction.opcode, instruction.operands, place.elements
    if op == "parameter":
        return _find_passed(module, place, int(instruction.arguments))
    if op == "get-tuple-element":
        index = int(instruction.attrs["index"])
        return [_Place(place.computation, operands[0], (*elements, index))]
    if op == "while":
        return _find_states(module, place, place.computation, instruction)
    if op in _CALLS and instruction.calls:
        ((_, callee), *_) = instruction.calls
        return _find_result(module, place, callee)
    if op in _SEVERAL and operands[1:]:
        if not elements:
            return ()
        return [_Place(place.computation, operands[elements[-1]], elements[:-1])]
    if op in _FORMS:
        return [_Place(place.computation, operands[0], elements)]
    raise ComputedError


def _find_passed(module: Module, place: _Place, number: int) -> Sequence[_Place]:
    """What the only caller of a computation passes as a parameter of it."""
    callers = [
        (caller, call)
        for caller, call in module.callers.get(place.computation, ())
        if not call.opcode.endswith(("-update", "-done"))
    ]
    if len(callers) != 1:
        return ()
    caller, call = callers[0]
    if call.opcode == "while":
        return _find_states(module, place, caller.name, call)
    if call.opcode == "conditional":  # Operand 0 selects the branch.
        number = 1 + [callee for _, callee in call.calls].index(place.computation)
    elif call.opcode not in _CALLS:
        return ()
    return [_Place(caller.name, call.operands[number], place.elements)]


def _find_states(
    module: Module, place: _Place, outside: str, loop: Instruction
) -> Sequence[_Place]:
    """An element of a loop's state: the initial one, and what the body makes of it."""
    initial = _Place(outside, loop.operands[0], place.elements)
    return [initial, *_find_result(module, place, dict(loop.calls).get("body", ""))]


def _find_result(module: Module, place: _Place, callee: str) -> Sequence[_Place]:
    called = module.computations.get(callee)
    return [_Place(callee, called.root.name, place.elements)] if called and called.root else ()
