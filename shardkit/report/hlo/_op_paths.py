"""Where an instruction came from that has no path of its own.

The compiler for several TPU slices cuts a collective into those inside of a slice and those between
them, and none of these keeps the path of the whole.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from ._hlo import Computation, Instruction, Module
from ._scope import phase_of
from ._slices import sent_operands

_FAR = 64
_NEUTRAL = frozenset({"parameter", "constant", "after-all", "partition-id", "replica-id", "iota"})
_Onward = Callable[[Instruction], Iterable[str]]


class OpPaths:
    """Finds the paths of instructions that have none."""

    def __init__(self, module: Module) -> None:
        self._module = module

    def of(self, instruction: Instruction, here: Computation) -> str:
        """The path of what made the operands; of what uses the result where that tells nothing.

        Where an operand is made of several arrays, as the buffer is that they are packed into, its
        path is one of the part of the step that most of them come from.

        Args:
          instruction: has no path itself.
          here: the computation that it stands in.

        Returns:
          One path for all operands, or one for each, joined as XLA joins them; "" if none is
          found.
        """
        operands = [name for name in instruction.operands if self._is_array(name, here)]
        made = [self._nearest_path([name], here, _producers(here)) for name in operands]
        paths = [path for path in made if path]
        if not paths:
            users = _consumers(here)
            return self._nearest_path(users(instruction), here, users)
        if len(paths) < len(made) or len(set(paths)) == 1:
            return paths[0]
        return ";".join(paths)

    def _is_array(self, name: str, here: Computation) -> bool:
        return name in here.instructions and here.instructions[name].opcode not in _NEUTRAL

    def _nearest_path(self, names: Iterable[str], here: Computation, onward: _Onward) -> str:
        """The path of the nearest instructions that have one, along every way to them."""
        level, seen = list(names), set[str]()
        paths: list[str] = []
        while level and len(seen) < _FAR:
            found = [here.instructions[name] for name in level if self._is_array(name, here)]
            seen.update(one.name for one in found)
            told = {one.name: path for one in found if (path := self._direct_path(one))}
            paths += told.values()
            further = [one for one in found if one.name not in told]
            names = (name for one in further for name in onward(one))
            level = [name for name in dict.fromkeys(names) if name not in seen]
        if not paths:
            return ""
        (phase, _), *_ = Counter(map(phase_of, paths)).most_common(1)
        return next(path for path in paths if phase_of(path) == phase)

    def _direct_path(self, instruction: Instruction) -> str:
        """Its own path, or that of the result of a fusion without one."""
        if instruction.op_name or instruction.opcode != "fusion":
            return instruction.op_name
        for _, callee in instruction.calls:
            inner = self._module.computations.get(callee)
            roots = [one.name for one in inner.instructions.values() if one.root] if inner else []
            if inner and (path := self._nearest_path(roots, inner, _producers(inner))):
                return path
        return ""


def _producers(here: Computation) -> _Onward:
    """What made an instruction's operands; for what comes from another slice, what was sent."""

    def operands(of: Instruction) -> Iterable[str]:
        return sent_operands(of, here) if of.opcode == "recv" else of.operands

    return operands


def _consumers(here: Computation) -> _Onward:
    def users(of: Instruction) -> list[str]:
        return [one.name for one in here.instructions.values() if of.name in one.operands]

    return users
