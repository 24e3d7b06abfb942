"""Where a traced program uses its parameters: the equations in which they meet other values.

Until then a value is computed from parameters alone, however it is moved, cast or looped over:

    w = params["up"]                    {up}
    w = sk.nn.use_param(w[i], "embed")  {up, taken, marked}   a use, with the axes of the mark
    y = x @ w                           {other}               a use
    s = (params["up"] ** 2).sum()       {up, computed}
    loss = y.mean() + s                 {other}               a use, of something computed
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, final

from jax.extend import core

from .._core.tracing import record_p
from ..nn._manual_axis_rules import Names, use_param_p
from ..nn._remat import NEVER_SAVED
from .rows import is_elementwise
from .shard_map._axis_types import AxisTypes, FlowRule, follow_types

_OTHER, _COMPUTED, _MARKED, _TAKEN = "(other)", "(computed)", "(marked)", "(taken)"
_KEEPING = frozenset(
    """convert_element_type copy copy_p name optimization_barrier pcast pvary reduce_precision
    shardkit_record shardkit_vary stop_gradient""".split()
)
_TAKING = frozenset("dynamic_slice reshape slice split squeeze".split())


@dataclasses.dataclass(frozen=True)
class ParamUse:
    """One use of a value that is computed from parameters alone."""

    # paths of these parameters; empty where other values are marked as a weight
    leaves: frozenset[str]
    path: str  # scopes of the equation, as in the name of a compiled instruction
    # logical axes that `sk.nn.use_param` marks it with; None where it meets other values
    names: Names | None = None
    marked: bool = False  # it has been marked before
    taken: bool = False  # it is a part of a parameter along its first dim, as one layer of a stack
    # its elements are not those of a parameter, or of such a part, at their places
    computed: bool = False


def find_param_uses(jaxpr: Any, params: Sequence[str | None]) -> list[ParamUse]:
    """Finds the uses of parameters in a program, that of marked ones also after the mark.

    `params` has the path of the parameter that each argument of the program is, None for others.
    """
    uses: dict[ParamUse, None] = {}
    rule = _Uses(uses)
    inputs = [frozenset({_OTHER if path is None else path}) for path in params]
    results, _ = follow_types(jaxpr, inputs, rule)
    rule.meet([*results, frozenset({_OTHER})], "")
    return list(uses)


@final
@dataclasses.dataclass(frozen=True)
class _Uses(FlowRule):
    """Notes uses in `uses` while a program is followed; `path` is that of the equations around."""

    uses: dict[ParamUse, None]
    path: str = ""

    def inside(self, equation: core.JaxprEqn) -> "_Uses":
        return dataclasses.replace(self, path=self._path_of(equation))

    def result(self, equation: core.JaxprEqn, inputs: Sequence[AxisTypes]) -> AxisTypes:
        joined = frozenset[str]().union(*inputs)
        if equation.primitive is use_param_p:
            self._note(joined, self._path_of(equation), equation.params["names"])
            return joined if _OTHER in joined else joined | {_MARKED}
        self.meet(inputs, self._path_of(equation))
        if _OTHER in joined:
            return frozenset({_OTHER})
        if equation.primitive is record_p and equation.params["fact"][0] == NEVER_SAVED:
            return joined - {_COMPUTED}  # codes are gathered before they become floats
        return joined | _find_notes(equation) if joined else joined

    def meet(self, inputs: Sequence[AxisTypes], path: str) -> None:
        """Notes each value of parameters alone that meets one of others, or one that is marked."""
        joined = frozenset[str]().union(*inputs)
        for value in inputs:
            if value and _OTHER not in value and {_OTHER, _MARKED} & (joined - value):
                self._note(value, f"{path}/")

    def _note(self, value: AxisTypes, path: str, names: Names | None = None) -> None:
        leaves = frozenset() if _OTHER in value else value - {_COMPUTED, _MARKED, _TAKEN}
        notes = {"marked": _MARKED, "taken": _TAKEN, "computed": _COMPUTED}
        given = {name: note in value for name, note in notes.items()}
        self.uses[ParamUse(leaves, path, names, **given)] = None

    def _path_of(self, equation: core.JaxprEqn) -> str:
        return "/".join(filter(None, (self.path, str(equation.source_info.name_stack))))


def _find_notes(equation: core.JaxprEqn) -> AxisTypes:
    """What an equation makes of a weight; nothing if shards become what the whole becomes."""
    name, operands = equation.primitive.name, list[Any](equation.invars)
    shapes = [operand.aval.shape for operand in operands]
    inner = (shapes or [()])[0][1:]
    if name in _TAKING and shapes[0]:
        results = [out.aval.shape for out in list[Any](equation.outvars)]
        ends = [shape[len(shape) - len(inner) :] for shape in results]
        return frozenset({_TAKEN} if ends == [inner] * len(ends) else {_COMPUTED})
    one_array = sum(shape != () for shape in shapes) == 1
    keeps = name in _KEEPING or (is_elementwise(equation) and one_array)
    return frozenset() if keeps else frozenset({_COMPUTED})
