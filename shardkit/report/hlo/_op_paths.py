"""Finds the JAX path of instructions without `op_name`.

The compiler for several TPU slices splits a collective into one within each slice and one between
them, and drops its path.
"""

from collections import Counter
from collections.abc import Iterable

from ._hlo import Computation, Instruction, Module
from ._neighbours import Onward, also_in_fusions, consumers, is_computed, nearest, producers
from ._scope import phase_of


class OpPaths:
    """Finds paths from the neighbours of an instruction in the data flow."""

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
