"""Finds the nearest instructions in the data flow that know something: a JAX path, a source line.

Compilers make instructions without either: copies, tuples, the pieces of a split collective.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar

from ._hlo import Computation, Instruction, Module
from ._scope import phase_of
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
    names: Iterable[str], onward: Onward, tell: Callable[[Instruction], T | None], here: Computation
) -> list[T]:
    """What the nearest instructions to `names` tell that tell anything, in breadth-first order.

    Where one tells nothing, its neighbours `onward` are asked.
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


class OpPaths:
    """Finds the JAX path of instructions without `op_name` from their neighbours.

    The compiler for several TPU slices splits a collective into one within each slice and one
    between them, and drops its path.
    """

    def __init__(self, module: Module) -> None:
        self._path_of = also_in_fusions(lambda instruction: instruction.op_name, module)

    def of(self, instruction: Instruction, here: Computation) -> str:
        """The path of the operands' producers; without any, that of the result's consumers; or "".

        It is one path for all operands, or one for each, joined by ";" as in XLA. If an operand
        packs several arrays, its path is one of the phase that most of them have.
        """
        operands = [name for name in instruction.operands if is_computed(name, here)]
        found = [self._nearest_path([name], producers(here), here) for name in operands]
        paths = [path for path in found if path]
        if not paths:
            users = consumers(here)
            return self._nearest_path(users(instruction), users, here)
        if len(paths) < len(found) or len(set(paths)) == 1:
            return paths[0]
        return ";".join(paths)

    def _nearest_path(self, names: Iterable[str], onward: Onward, here: Computation) -> str:
        paths = nearest(names, onward, self._path_of, here)
        if not paths:
            return ""
        (phase, _), *_ = Counter(map(phase_of, paths)).most_common(1)
        return next(path for path in paths if phase_of(path) == phase)
