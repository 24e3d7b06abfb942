"""Finds the activations that a compiled step saves for its backward pass.

In the compiled program these are the values that forward instructions write and backward ones
read, with the shape of one device's shard. The jaxpr has the same values with their global shapes.
Both shapes together tell which mesh axes split a value:

    compiled f32[4,64], traced f32[8,256], mesh (data=2, tensor=4)  →  data and tensor
    compiled f32[4,256], traced f32[8,256]                          →  data alone
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxprs_in_params

from ..._core.equations import source_of_equation
from ..._core.source import Source
from ..hlo._hlo import Computation, Instruction, Module, Shape
from ..hlo._scope import phase_of, scope_of
from ..hlo._sources import ComputedError, find_argument

_BACKWARD = ("backward", "recompute")
_THROUGH = frozenset("tuple copy bitcast opt-barrier copy-start copy-done".split())
_NO_BUFFER = frozenset({"parameter", "constant"})


@dataclasses.dataclass(frozen=True)
class SavedActivation:
    """A value that is saved for the backward pass."""

    shape: Shape  # one device's shard
    global_shape: tuple[int, ...]  # shape of the whole array
    scope: str  # the model's scope that computes it
    axes: tuple[str, ...]  # mesh axes that split it
    source: Source | None = None  # the line of the user's code that computes it; None if unknown


def find_saved_activations(
    module: Module,
    jaxpr: ClosedJaxpr,
    mesh: Mapping[str, int],
    first: Sequence[str],
    parameters: Collection[int] = (),
) -> list[SavedActivation]:
    """Lists the values saved for the backward pass whose global shape is known.

    `first` are the axes that split the rows of the batch: they are assumed to split the first split
    dim if several axes have the right size. `parameters` numbers the arguments that are parameters:
    one that the forward pass gathers and the backward pass reads is not an activation.
    """
    traced: dict[tuple[tuple[int, ...], str], JaxprEqn] = {}
    for whole, scope, eqn in _traced_shapes(jaxpr.jaxpr, ""):
        traced.setdefault((whole, scope), eqn)
    by_rank: dict[int, list[tuple[tuple[int, ...], str]]] = {}
    for whole, scope in traced:
        by_rank.setdefault(len(whole), []).append((whole, scope))
    ordered = [*first, *(axis for axis in mesh if axis not in first)]
    saved = []
    for shape in _compiled_shapes(module, parameters):
        candidates = by_rank.get(len(shape.dims), [])
        matches = [
            SavedActivation(shape, whole, scope, axes)
            for whole, scope in candidates
            if (axes := splitting_axes(shape.dims, whole, mesh, ordered)) is not None
        ]
        if matches:
            # If several global shapes fit, the largest: it has the most axes that split it.
            largest = max(matches, key=lambda match: math.prod(match.global_shape))
            source = source_of_equation(traced[largest.global_shape, largest.scope])
            saved.append(dataclasses.replace(largest, source=source))
    return saved


def splitting_axes(
    shard: Sequence[int], whole: Sequence[int], mesh: Mapping[str, int], ordered: Sequence[str]
) -> tuple[str, ...] | None:
    """The mesh axes, tried in order, that split an array into a shard of this shape; else None.

    >>> mesh = {"data": 2, "tensor": 4}
    >>> splitting_axes((3, 4, 2), (3, 8, 8), mesh, ["data", "tensor"])
    ('data', 'tensor')
    >>> splitting_axes((3, 8), (3, 24), mesh, ["data", "tensor"]) is None
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


def is_shard_summed(
    local: Sequence[int], whole: Sequence[int], over: Sequence[str], mesh: Mapping[str, int]
) -> bool:
    """Whether an array can be what a device holds of another one that is summed over mesh axes.

    Those axes split no dim of it.

    >>> is_shard_summed((8, 128), (16, 512), ["tensor"], {"data": 2, "tensor": 4})
    False
    """
    others = [axis for axis in mesh if axis not in over]
    return len(local) == len(whole) and splitting_axes(local, whole, mesh, others) is not None


def _compiled_shapes(module: Module, parameters: Collection[int]) -> Iterator[Shape]:
    """Arrays that forward instructions write and backward ones read, each buffer once."""
    fused = {
        callee
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "fusion"
        for _, callee in instruction.calls
    }
    for here in module.computations.values():
        if here.name in fused:
            continue
        read = {
            saved.name: saved.shapes[0]
            for instruction in here.instructions.values()
            if instruction.opcode not in _NO_BUFFER and phase_of(instruction.op_name) in _BACKWARD
            for name in instruction.operands
            for saved in _forward_producers(here, name)
            if not _is_parameter(module, here, saved.name, parameters)
        }
        yield from read.values()


def _is_parameter(
    module: Module, here: Computation, name: str, parameters: Collection[int]
) -> bool:
    try:
        return find_argument(module, here, name) in parameters
    except ComputedError:
        return False


def _forward_producers(here: Computation, name: str) -> Iterator[Instruction]:
    """The forward instructions that compute an operand, through tuples and copies."""
    instruction = here.instructions.get(name)
    if instruction is None or instruction.opcode in _NO_BUFFER:
        return
    if instruction.opcode in _THROUGH:
        for inner in instruction.operands:
            yield from _forward_producers(here, inner)
        return
    source = instruction
    if instruction.opcode == "get-tuple-element":
        source = here.instructions.get(instruction.operands[0])
        if source is not None and source.opcode in _THROUGH:
            yield from _forward_producers(here, source.name)
            return
    if source and phase_of(source.op_name) == "forward" and len(instruction.shapes) == 1:
        yield instruction


def _traced_shapes(jaxpr: Jaxpr, path: str) -> Iterator[tuple[tuple[int, ...], str, JaxprEqn]]:
    """(global shape, scope, equation) of what forward equations write and backward ones read."""
    made: dict[Var, tuple[str, JaxprEqn]] = {}
    for eqn in jaxpr.eqns:
        stack = str(eqn.source_info.name_stack)
        here = f"{path}/{stack}" if path and stack else path or stack
        phase = phase_of(f"{here}/{eqn.primitive.name}")
        if phase in _BACKWARD:
            for value in eqn.invars:
                if not isinstance(value, Literal) and value in made:
                    aval: Any = value.aval
                    yield aval.shape, *made[value]
        elif phase == "forward":
            made |= {value: _maker(eqn, number, here) for number, value in enumerate(eqn.outvars)}
        for inner in jaxprs_in_params(eqn.params):
            yield from _traced_shapes(inner, here)


def _maker(eqn: JaxprEqn, number: int, path: str) -> tuple[str, JaxprEqn]:
    """Scope of one result, and its equation; for a scan, that of the body which computes it."""
    if eqn.primitive.name == "scan":
        body = eqn.params["jaxpr"].jaxpr
        value = body.outvars[number]
        inner = next((equation for equation in body.eqns if value in equation.outvars), None)
        if inner is not None:
            stack = inner.source_info.name_stack
            return scope_of(f"{path}/{stack}/{inner.primitive.name}"), inner
    return scope_of(f"{path}/{eqn.primitive.name}"), eqn
