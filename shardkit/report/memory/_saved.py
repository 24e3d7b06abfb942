"""Activations that a compiled step keeps from its forward to its backward pass.

In the compiled program these are the values that forward instructions make and backward ones
read, with the shape that one device holds. The traced program has the same values with their
global shapes. Beside each other they tell which mesh axes split a value and which do not.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jax.extend.core import Literal, jaxprs_in_params

from ..findings._arguments import Computed, argument_of
from ..hlo._hlo import Computation, Instruction, Module, Shape
from ..hlo._scope import phase_of, scope_of

_BACKWARD = ("backward", "recompute")
_THROUGH = frozenset("tuple copy bitcast opt-barrier copy-start copy-done".split())
_NO_BUFFER = frozenset({"parameter", "constant"})


@dataclasses.dataclass(frozen=True)
class Saved:
    """A value that waits for the backward pass.

    Attributes:
      shape: what one device holds.
      whole: its global shape.
      scope: the model's scope that made it.
      axes: mesh axes that split it.
    """

    shape: Shape
    whole: tuple[int, ...]
    scope: str
    axes: tuple[str, ...]


def saved(
    module: Module,
    jaxpr: Any,
    mesh: Mapping[str, int],
    first: Sequence[str],
    parameters: Collection[int] = (),
) -> list[Saved]:
    """Lists the saved values whose global shape is known.

    Args:
      module: the compiled program.
      jaxpr: the closed jaxpr that it was made from.
      mesh: names and sizes of the mesh axes.
      first: axes that split the rows of the batch: those that split the first dim that is split,
        where sizes alone leave a choice.
      parameters: numbers of the arguments that are parameters: one that was gathered for the
        forward pass and is kept is no activation.
    """
    known: dict[int, list[tuple[tuple[int, ...], str]]] = {}
    for whole, scope in dict.fromkeys(_traced(jaxpr.jaxpr, "")):
        known.setdefault(len(whole), []).append((whole, scope))
    ordered = [*first, *(axis for axis in mesh if axis not in first)]
    found = []
    for shape in _compiled(module, parameters):
        candidates = known.get(len(shape.dims), [])
        matches = [
            Saved(shape, whole, scope, axes)
            for whole, scope in candidates
            if (axes := splitting(shape.dims, whole, mesh, ordered)) is not None
        ]
        if matches:
            # Where several global shapes fit, the one that leaves least to find.
            found.append(max(matches, key=lambda one: math.prod(one.whole)))
    return found


def splitting(
    shard: Sequence[int], whole: Sequence[int], mesh: Mapping[str, int], ordered: Sequence[str]
) -> tuple[str, ...] | None:
    """Mesh axes that make a shard of an array; None if no axes do.

    Args:
      shard: shape on one device.
      whole: global shape, of the same rank.
      mesh: sizes of the mesh axes.
      ordered: the axes, those to be tried first at the front.

    >>> mesh = {"data": 2, "tensor": 4}
    >>> splitting((3, 4, 2), (3, 8, 8), mesh, ["data", "tensor"])
    ('data', 'tensor')
    >>> splitting((3, 8), (3, 24), mesh, ["data", "tensor"]) is None
    True
    """
    used: list[str] = []
    for part, full in zip(shard, whole, strict=True):
        if part == 0 or full % part:
            return None
        left = [axis for axis in ordered if axis not in used]
        groups = (g for n in range(len(left) + 1) for g in itertools.combinations(left, n))
        ways = next((g for g in groups if math.prod(mesh[a] for a in g) == full // part), None)
        if ways is None:
            return None
        used += ways
    return tuple(axis for axis in mesh if axis in used)


def _compiled(module: Module, parameters: Collection[int]) -> Iterator[Shape]:
    """Arrays that forward instructions make and backward ones read, each buffer once."""
    inside = {
        callee
        for computation in module.computations.values()
        for one in computation.instructions.values()
        if one.opcode == "fusion"
        for _, callee in one.calls
    }
    for here in module.computations.values():
        if here.name in inside:
            continue
        read = {
            made.name: made.shapes[0]
            for one in here.instructions.values()
            if one.opcode not in _NO_BUFFER and phase_of(one.op_name) in _BACKWARD
            for name in one.operands
            for made in _made_forward(here, name)
            if not _is_parameter(module, here, made.name, parameters)
        }
        yield from read.values()


def _is_parameter(
    module: Module, here: Computation, name: str, parameters: Collection[int]
) -> bool:
    try:
        return argument_of(module, here, name) in parameters
    except Computed:
        return False


def _made_forward(here: Computation, name: str) -> Iterator[Instruction]:
    """The forward arrays behind an operand, seen through tuples and copies."""
    one = here.instructions.get(name)
    if one is None or one.opcode in _NO_BUFFER:
        return
    if one.opcode in _THROUGH:
        for inner in one.operands:
            yield from _made_forward(here, inner)
        return
    source = one
    if one.opcode == "get-tuple-element":
        source = here.instructions.get(one.operands[0])
        if source is not None and source.opcode in _THROUGH:
            yield from _made_forward(here, source.name)
            return
    if source is not None and phase_of(source.op_name) == "forward" and len(one.shapes) == 1:
        yield one


def _traced(jaxpr: Any, path: str) -> Iterator[tuple[tuple[int, ...], str]]:
    """(global shape, scope) of values that forward equations make and backward ones read."""
    made: dict[Any, str] = {}
    for eqn in jaxpr.eqns:
        stack = str(eqn.source_info.name_stack)
        here = f"{path}/{stack}" if path and stack else path or stack
        phase = phase_of(f"{here}/{eqn.primitive.name}")
        if phase in _BACKWARD:
            for value in eqn.invars:
                if not isinstance(value, Literal) and value in made:
                    yield value.aval.shape, made[value]
        elif phase == "forward":
            made |= {value: _scope(eqn, number, here) for number, value in enumerate(eqn.outvars)}
        for inner in jaxprs_in_params(eqn.params):
            yield from _traced(inner, here)


def _scope(eqn: Any, number: int, path: str) -> str:
    """Scope of one result of an equation; of a scan's, that of what makes it in the body."""
    if eqn.primitive.name == "scan":
        body = eqn.params["jaxpr"].jaxpr
        value = body.outvars[number]
        inner = next((one for one in body.eqns if value in one.outvars), None)
        if inner is not None:
            return scope_of(f"{path}/{inner.source_info.name_stack}/{inner.primitive.name}")
    return scope_of(f"{path}/{eqn.primitive.name}")
