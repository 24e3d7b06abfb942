"""Trip counts of the loops of a compiled program.

CPU and GPU programs print `known_trip_count`. In TPU programs the count follows from the loop's
condition (`i < 12`), the initial value of `i`, and the step that the body adds (2 for a windowed
einsum), each of which can be behind fusions, copies and tuples:

    state (i, x) = (0, x0);  condition i < 7;  body (i + 2, f(x))   →  4 trips: i = 0, 2, 4, 6
"""

import dataclasses
import re

from ._hlo import Computation, Instruction, Module

_SAME = frozenset({"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done"})
_TUPLES = frozenset({"opt-barrier", "copy", "copy-start", "copy-done"})
_KNOWN = re.compile(r'known_trip_count\\?":\s*\{\\?"n\\?":\\?"(\d+)')
_INLINE = ("fusion", "call")
_MIRROR = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE", "EQ": "EQ"}


@dataclasses.dataclass(frozen=True)
class _Affine:
    """A scalar: `offset`, plus element `slot` of a loop's state unless `slot` is None.

    With a state (i, n): `i + 2` is `_Affine(0, 2)`, `n` is `_Affine(1, 0)`, and the constant 12 is
    `_Affine(None, 12)`.
    """

    slot: int | None
    offset: int


class TripCounts:
    """Trip counts of one module's loops."""

    def __init__(self, module: Module) -> None:
        self._module = module

    def trips(self, computation: str, loop: str) -> int | None:
        """Number of times that a `while` runs its body; None if unknown."""
        here = self._module.computations[computation]
        instruction = here.instructions[loop]
        if known := _KNOWN.search(instruction.rest):
            return int(known.group(1))
        called = dict(instruction.calls)
        condition = self._module.computations.get(called.get("condition", ""))
        if condition is None or called.get("body") not in self._module.computations:
            return None
        compared = self._find_compare(condition)
        if compared is None:
            return None
        where, compare = compared
        sides = [self._evaluate(where, name, condition.name) for name in compare.operands]
        return self._count_trips(
            here, instruction, sides, compare.attrs.get("direction", "").strip()
        )

    def _find_compare(self, condition: Computation) -> tuple[Computation, Instruction] | None:
        """The `compare` whose result a condition returns, through fusions and copies."""
        where, result = condition, condition.root
        while result is not None and result.opcode != "compare":
            if result.opcode in _SAME:
                result = where.instructions.get(result.operands[0])
            elif result.opcode in _INLINE:
                where = self._module.computations[result.calls[0][1]]
                result = where.root
            else:
                return None
        return (where, result) if result is not None else None

    def _count_trips(
        self,
        here: Computation,
        loop: Instruction,
        sides: list[_Affine | None],
        direction: str,
    ) -> int | None:
        left, right = sides
        if left is None or right is None:
            return None
        if left.slot is None or self._is_invariant(loop, left.slot):
            left, right, direction = right, left, _MIRROR.get(direction, direction)
        bound = self._initial_value(here, loop, right)
        if left.slot is None or bound is None:
            return None
        start = self._initial_value(here, loop, left)
        body = self._module.computations[dict(loop.calls)["body"]]
        moved = self._evaluate_element(body, body.root, left.slot, body.name)
        if start is None or moved is None or moved.slot != left.slot or not moved.offset:
            return None
        return _count_steps(start, bound, moved.offset, direction)

    def _initial_value(self, here: Computation, loop: Instruction, value: _Affine) -> int | None:
        """Value of a condition's scalar before the first trip."""
        if value.slot is None:
            return value.offset
        state = here.instructions.get(loop.operands[0])
        first = self._evaluate_element(here, state, value.slot, "")
        return first.offset + value.offset if first is not None and first.slot is None else None

    def _is_invariant(self, loop: Instruction, slot: int) -> bool:
        """Whether a loop leaves element `slot` of its state unchanged."""
        body = self._module.computations.get(dict(loop.calls).get("body", ""))
        if body is None:
            return False
        return self._evaluate_element(body, body.root, slot, body.name) == _Affine(slot, 0)

    def _evaluate(self, where: Computation, name: str, loop: str) -> _Affine | None:
        """A scalar in terms of the state of the loop whose body or condition is `loop`."""
        instruction = where.instructions.get(name)
        if instruction is None:
            return None
        op, operands = instruction.opcode, instruction.operands
        if op == "constant":
            text = instruction.arguments.strip()
            return _Affine(None, int(text)) if re.fullmatch(r"-?\d+", text) else None
        if op in _SAME:
            return self._evaluate(where, operands[0], loop)
        if op in ("add", "subtract"):
            sign = 1 if op == "add" else -1
            left, right = (self._evaluate(where, n, loop) for n in operands)
            return _add(left, right, sign)
        if op == "get-tuple-element":
            index = int(instruction.attrs["index"])
            return self._evaluate_element(where, where.instructions.get(operands[0]), index, loop)
        if op in _INLINE:
            inner = self._module.computations.get(instruction.calls[0][1])
            return self._evaluate(inner, inner.root.name, loop) if inner and inner.root else None
        if op == "parameter":
            return self._evaluate_parameter(where, int(instruction.arguments), loop)
        return None

    def _evaluate_parameter(self, where: Computation, number: int, loop: str) -> _Affine | None:
        """A scalar parameter of a fusion, as its only caller passes it."""
        callers = self._module.callers.get(where.name, [])
        if len(callers) != 1 or callers[0][1].opcode not in _INLINE:
            return None
        caller, call = callers[0]
        return self._evaluate(caller, call.operands[number], loop)

    def _evaluate_element(
        self, where: Computation, source: Instruction | None, index: int, loop: str
    ) -> _Affine | None:
        """Element `index` of a tuple, in terms of the state of `loop`."""
        if source is None:
            return None
        if source.opcode == "tuple":
            return self._evaluate(where, source.operands[index], loop)
        if source.opcode in _TUPLES:
            inner = where.instructions.get(source.operands[0])
            return self._evaluate_element(where, inner, index, loop)
        if source.opcode == "while":
            return self._evaluate_loop_state(where, source, index, loop)
        if source.opcode == "parameter":
            if where.name == loop:
                return _Affine(index, 0)
            return self._evaluate_tuple_parameter(where, int(source.arguments), index, loop)
        if source.opcode in _INLINE:
            inner = self._module.computations.get(source.calls[0][1])
            return self._evaluate_element(inner, inner.root, index, loop) if inner else None
        return None

    def _evaluate_tuple_parameter(
        self, where: Computation, number: int, index: int, loop: str
    ) -> _Affine | None:
        """Element `index` of a parameter that is a tuple, as its only caller passes it."""
        callers = self._module.callers.get(where.name, [])
        if len(callers) != 1:
            return None
        caller, call = callers[0]
        if call.opcode == "while":
            return self._evaluate_loop_state(caller, call, index, loop)
        if call.opcode not in _INLINE:
            return None
        passed = caller.instructions.get(call.operands[number])
        return self._evaluate_element(caller, passed, index, loop)

    def _evaluate_loop_state(
        self, where: Computation, outer: Instruction, index: int, loop: str
    ) -> _Affine | None:
        """Element `index` of a loop's state, if the loop never changes it."""
        if not self._is_invariant(outer, index):
            return None
        return self._evaluate_element(where, where.instructions.get(outer.operands[0]), index, loop)


def _add(left: _Affine | None, right: _Affine | None, sign: int) -> _Affine | None:
    if left is None or right is None:
        return None
    if right.slot is None:
        return _Affine(left.slot, left.offset + sign * right.offset)
    if left.slot is None and sign > 0:
        return _Affine(right.slot, left.offset + right.offset)
    return None


def _count_steps(start: int, bound: int, step: int, direction: str) -> int | None:
    """Counts `i = start; while i <direction> bound: i += step`.

    >>> _count_steps(0, 12, 1, "LT"), _count_steps(0, 7, 2, "LT")
    (12, 4)
    >>> _count_steps(3, 0, -1, "GE"), _count_steps(0, 4, 1, "GT")
    (4, 0)
    """
    if direction in ("LE", "GE"):
        bound += 1 if direction == "LE" else -1
    if direction == "NE":
        whole = step != 0 and (bound - start) % step == 0 and (bound - start) // step >= 0
        return (bound - start) // step if whole else None
    if direction not in ("LT", "LE", "GT", "GE"):
        return None
    if (step > 0) != (direction in ("LT", "LE")):
        reached = start >= bound if direction in ("LT", "LE") else start <= bound
        return 0 if reached else None
    return max(0, -(-(bound - start) // step))
