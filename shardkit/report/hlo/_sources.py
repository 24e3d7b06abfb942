"""Where the value of an instruction comes from: back through tuples, calls and loops."""

import dataclasses
from collections.abc import Collection, Sequence

from ._hlo import Computation, Instruction, Module

SAME = frozenset(
    """copy copy-start copy-done bitcast convert reshape opt-barrier async-update async-done
    call-update call-done""".split()
)
"""Operations whose result has the values of their operand, in their order."""
_FORMS = SAME | frozenset(
    """transpose slice dynamic-slice all-gather all-gather-start all-gather-done
    collective-permute collective-permute-start collective-permute-done""".split()
)
_CALLS = frozenset({"fusion", "call", "call-start", "async-start"})


class ComputedError(Exception):
    """A value is the result of another operation, not another form of one value."""


@dataclasses.dataclass(frozen=True)
class Place:
    """The value of an instruction, or an element of it: `elements` are indices into tuples."""

    computation: str
    name: str
    elements: tuple[int, ...] = ()

    def instruction(self, module: Module) -> Instruction | None:
        """The instruction; None if the text lacks it."""
        return module.computations[self.computation].instructions.get(self.name)


def find_argument(module: Module, here: Computation, name: str) -> int | None:
    """The number of the argument that an array is another form, or a part, of.

    None if it is unknown, or one of several; raises ComputedError for a result of arithmetic. The
    state of a loop is its initial value, or what the body makes of it. A loop over layers passes
    their stack on, and slices one layer, perhaps the next one ahead:

        all-gather(fusion(state[3], i)) → dynamic-slice(state[3]) → initial[3] → parameter(7)
    """
    arguments, visited = set[int | None](), set[Place]()
    pending = [Place(here.name, name)]
    while pending:
        place = pending.pop()
        if place in visited:
            continue
        visited.add(place)
        instruction = place.instruction(module)
        if instruction and instruction.opcode == "parameter" and place.computation == module.entry:
            arguments.add(int(instruction.arguments))
            continue
        sources = find_sources(module, place, _FORMS)
        arguments |= set() if sources else {None}
        pending += sources
    return arguments.pop() if len(arguments) == 1 else None


def find_sources(module: Module, place: Place, forms: Collection[str] = SAME) -> Sequence[Place]:
    """The same value one instruction earlier: one place, or () if unknown.

    For an element of a loop's state two: the initial value, and what the body makes of it. Raises
    ComputedError if the value is the result of an operation that is none of `forms`: those that
    keep the value, perhaps in another form.
    """
    instruction = place.instruction(module)
    if instruction is None:
        return ()
    op, operands, elements = instruction.opcode, instruction.operands, place.elements
    if op == "parameter":
        return _find_passed(module, place, int(instruction.arguments))
    if op == "get-tuple-element":
        index = int(instruction.attrs["index"])
        return [Place(place.computation, operands[0], (*elements, index))]
    if op == "while":
        return _find_states(module, place, place.computation, instruction)
    if op in _CALLS and instruction.calls:
        ((_, callee), *_) = instruction.calls
        return _find_result(module, place, callee)
    if op == "tuple" or (op in forms and operands[1:] and "gather" in op):
        if not elements:
            return ()
        return [Place(place.computation, operands[elements[-1]], elements[:-1])]
    if op in forms:
        return [Place(place.computation, operands[0], elements)]
    raise ComputedError


def _find_passed(module: Module, place: Place, number: int) -> Sequence[Place]:
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
    return [Place(caller.name, call.operands[number], place.elements)]


def _find_states(module: Module, place: Place, outside: str, loop: Instruction) -> Sequence[Place]:
    """An element of a loop's state: the initial one, and what the body makes of it."""
    initial = Place(outside, loop.operands[0], place.elements)
    return [initial, *_find_result(module, place, dict(loop.calls).get("body", ""))]


def _find_result(module: Module, place: Place, callee: str) -> Sequence[Place]:
    called = module.computations.get(callee)
    return [Place(callee, called.root.name, place.elements)] if called and called.root else ()
