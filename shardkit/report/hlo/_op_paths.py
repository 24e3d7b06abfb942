"""Finds the JAX path of instructions without `op_name`.

The compiler for several TPU slices splits a collective into one within each slice and one between
them, and drops its path.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from ._hlo import Computation, Instruction, Module
from ._scope import phase_of
from ._slices import sent_operands

_MOST_VISITED = 64
_NO_PATH = frozenset({"parameter", "constant", "after-all", "partition-id", "replica-id", "iota"})
_Onward = Callable[[Instruction], Iterable[str]]


class OpPaths:
    """Finds paths from the neighbours of an instruction in the data flow."""

    def __init__(self, module: Module) -> None:
        self._module = module

    def of(self, instruction: Instruction, here: Computation) -> str:
        """The path of the operands' producers; without any, that of the result's consumers.

        If an operand packs several arrays, its path is one of the phase that most of them have.

        Args:
          instruction: one without a path.
          here: its computation.

        Returns:
          One path for all operands, or one for each, joined by ";" as in XLA; "" if there is none.
        """
        operands = [name for name in instruction.operands if self._is_array(name, here)]
        nearest = [self._nearest_path([name], here, _producers(here)) for name in operands]
        paths = [path for path in nearest if path]
        if not paths:
            users = _consumers(here)
            return self._nearest_path(users(instruction), here, users)
        if len(paths) < len(nearest) or len(set(paths)) == 1:
            return paths[0]
        return ";".join(paths)

    def _is_array(self, name: str, here: Computation) -> bool:
        return name in here.instructions and here.instructions[name].opcode not in _NO_PATH

    def _nearest_path(self, names: Iterable[str], here: Computation, onward: _Onward) -> str:
        """The path of the nearest instructions that have one, in breadth-first order."""
        level, visited = list(names), set[str]()
        paths: list[str] = []
        while level and len(visited) < _MOST_VISITED:
            arrays = [here.instructions[name] for name in level if self._is_array(name, here)]
            visited.update(instruction.name for instruction in arrays)
            onward_names: list[str] = []
            for instruction in arrays:
                if path := self._direct_path(instruction):
                    paths.append(path)
                else:
                    onward_names += onward(instruction)
            level = [name for name in dict.fromkeys(onward_names) if name not in visited]
        if not paths:
            return ""
        (phase, _), *_ = Counter(map(phase_of, paths)).most_common(1)
        return next(path for path in paths if phase_of(path) == phase)

    def _direct_path(self, instruction: Instruction) -> str:
        """Its own path, or that of the root of a fusion without one."""
        if instruction.op_name or instruction.opcode != "fusion":
            return instruction.op_name
        for _, callee in instruction.calls:
            inner = self._module.computations.get(callee)
            if inner and inner.root:
                if path := self._nearest_path([inner.root.name], inner, _producers(inner)):
                    return path
        return ""


def _producers(here: Computation) -> _Onward:
    """Names of an instruction's operands; for a `recv`, those of the matching `send`."""

    def operands(of: Instruction) -> Iterable[str]:
        return sent_operands(of, here) if of.opcode == "recv" else of.operands

    return operands


def _consumers(here: Computation) -> _Onward:
    def users(of: Instruction) -> list[str]:
        return [user.name for user in here.instructions.values() if of.name in user.operands]

    return users
