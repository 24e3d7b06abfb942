"""Trip counts of the loops of a compiled program.

CPU and GPU programs print `known_trip_count`. In TPU programs the count follows from the loop's
condition (`i < 12`), the initial value of `i`, and the step that the body adds (2 for a windowed
einsum), each of which can be behind fusions, copies and tuples:

    state (i, x) = (0, x0);  condition i < 7;  body (i + 2, f(x))   →  4 trips: i = 0, 2, 4, 6
"""

import dataclasses
import re

from ._hlo import Computation, Module
from ._sources import ComputedError, Place, find_sources

_KNOWN = re.compile(r'known_trip_count\\?":\s*\{\\?"n\\?":\\?"(\d+)')
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
        instruction = self._module.computations[computation].instructions[loop]
        if known := _KNOWN.search(instruction.rest):
            return int(known.group(1))
        called = dict(instruction.calls)
        condition = self._module.computations.get(called.get("condition", ""))
        body = self._module.computations.get(called.get("body", ""))
        if condition is None or condition.root is None or body is None:
            return None
        state = Place(computation, instruction.operands[0])
        return self._count_trips(state, Place(condition.name, condition.root.name), body)

    def _count_trips(self, state: Place, condition: Place, body: Computation) -> int | None:
        where = self._find_compare(condition)
        compare = where.instruction(self._module) if where else None
        if where is None or compare is None:
            return None
        sides = (Place(where.computation, name) for name in compare.operands)
        left, right = (self._evaluate(side, condition.computation) for side in sides)
        direction = compare.attrs.get("direction", "").strip()
        if left is None or right is None:
            return None
        if left.slot is None or self._step(body, left.slot) == 0:
            left, right, direction = right, left, _MIRROR.get(direction, direction)
        bound = self._initial_value(state, right)
        if left.slot is None or bound is None:
            return None
        start, step = self._initial_value(state, left), self._step(body, left.slot)
        return _count_steps(start, bound, step, direction) if start is not None and step else None

    def _find_compare(self, place: Place) -> Place | None:
        """The `compare` whose result a condition returns, through fusions and copies."""
        while (found := place.instruction(self._module)) and found.opcode != "compare":
            try:
                (place,) = find_sources(self._module, place)
            except (ComputedError, ValueError):
                return None
        return place if found else None

    def _initial_value(self, state: Place, value: _Affine) -> int | None:
        """Value of a condition's scalar before the first trip."""
        if value.slot is None:
            return value.offset
        first = self._evaluate(dataclasses.replace(state, elements=(value.slot,)), "")
        return first.offset + value.offset if first is not None and first.slot is None else None

    def _step(self, body: Computation, slot: int) -> int | None:
        """What a trip adds to element `slot` of the state; None if it does something else."""
        if body.root is None:
            return None
        moved = self._evaluate(Place(body.name, body.root.name, (slot,)), body.name)
        return moved.offset if moved is not None and moved.slot == slot else None

    def _evaluate(self, place: Place, loop: str) -> _Affine | None:
        """A scalar in terms of the state of the loop whose body or condition is `loop`."""
        instruction = place.instruction(self._module)
        if instruction is None:
            return None
        if instruction.opcode == "constant":
            text = instruction.arguments.strip()
            return _Affine(None, int(text)) if re.fullmatch(r"-?\d+", text) else None
        if instruction.opcode in ("add", "subtract"):
            operands = (Place(place.computation, name) for name in instruction.operands)
            left, right = (self._evaluate(operand, loop) for operand in operands)
            return _add(left, right, 1 if instruction.opcode == "add" else -1)
        if instruction.opcode == "parameter" and place.computation == loop:
            return _Affine(place.elements[-1], 0) if place.elements else None
        try:
            first, *after = find_sources(self._module, place)
        except (ComputedError, ValueError):
            return None
        # An element of another loop's state is known if that loop never changes it.
        for result in after:
            body = self._module.computations[result.computation]
            if not result.elements or self._step(body, result.elements[-1]) != 0:
                return None
        return self._evaluate(first, loop)


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
