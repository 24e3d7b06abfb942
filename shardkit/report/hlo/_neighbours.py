"""Finds the nearest instructions in the data flow that know something: a JAX path, a source line.

Compilers make instructions without either: copies, tuples, the pieces of a split collective.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

from ._hlo import Computation, Instruction, Module
from ._slices import sent_operands

T = TypeVar("T")
Onward = Callable[[Instruction], Iterable[str]]

_MOST_VISITED = 64
_ONE_BY_ONE = frozenset({"all-reduce", "all-gather", "reduce-scatter", "collective-permute"})
_SILENT = frozenset({"parameter", "constant", "after-all", "partition-id", "replica-id", "iota"})


def is_computed(name: str, here: Computation) -> bool:
    """Whether an instruction computes its result from others."""
    return name in here.instructions and here.instructions[name].opcode not in _SILENT


def nearest(
    names: Iterable[str],
    onward: Onward,
    tell: Callable[[Instruction], T | None],
    here: Computation,
) -> list[T]:
    """What the nearest instructions tell that tell anything, in breadth-first order.

    Args:
      names: where to start.
      onward: the neighbours to ask where an instruction tells nothing: `producers(here)` or
        `consumers(here)`.
      tell: what an instruction knows; None or "" if nothing.
      here: their computation.
    """
    level, visited = list(names), set[str]()
    told: list[T] = []
    while level and len(visited) < _MOST_VISITED:
        arrays = [here.instructions[name] for name in level if is_computed(name, here)]
        visited.update(instruction.name for instruction in arrays)
        onward_names: list[str] = []
        for instruction in arrays:
            if known := tell(instruction):
                told.append(known)
            else:
                onward_names += onward(instruction)
        level = [name for name in dict.fromkeys(onward_names) if name not in visited]
    return told


def producers(here: Computation) -> Onward:
    """Names of an instruction's operands; for a `recv`, those of the matching `send`.

    A collective of several arrays makes each of them of one: element 1 of `all-reduce(%a, %b)` is
    made of `%b`.
    """

    def operands(of: Instruction) -> Iterable[str]:
        if of.opcode == "recv":
            return sent_operands(of, here)
        made = here.instructions.get(of.operands[0]) if of.opcode == "get-tuple-element" else None
        if made and made.opcode in _ONE_BY_ONE and len(made.operands) == len(made.shapes) > 1:
            return [made.operands[int(of.attrs["index"])]]
        return of.operands

    return operands


def consumers(here: Computation) -> Onward:
    """Names of the instructions that read an instruction's result."""
    return lambda of: here.users.get(of.name, ())


def also_in_fusions(
    tell: Callable[[Instruction], T | None], module: Module
) -> Callable[[Instruction], T | None]:
    """Asks, where a fusion tells nothing, what computes the result inside of it."""

    def tell_of(instruction: Instruction) -> T | None:
        if (own := tell(instruction)) or instruction.opcode != "fusion":
            return own
        for _, callee in instruction.calls:
            inner = module.computations.get(callee)
            if inner and inner.root:
                if told := nearest([inner.root.name], producers(inner), tell_of, inner):
                    return told[0]
        return None

    return tell_of
