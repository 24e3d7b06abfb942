"""Follows the result of a collective to the operation that wants it, into fusions and out of them.

Between the two are operations that only move the array: copies, casts, other orders of dims. They
have the path and the line of what made the array:

    %all-gather.1 = f32[32,512] all-gather(%tanh), dimensions={1}
    %copy_fusion = f32[32,512] fusion(%all-gather.1)     moves it: says tanh at model.py:114
    %dot.7 = f32[32,128] dot(%copy_fusion, %w)           wants it: dot_general at model.py:115

A fusion has the path of its last operation; the one in it that reads the array says more.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ._hlo import Computation, Instruction, Module
from ._neighbours import nearest, producers
from ._scope import last_name
from ._source_lines import place_of

T = TypeVar("T")
_MOST_VISITED = 64
_FUSED = frozenset({"fusion", "call"})
_SAME_DIMS = frozenset("copy copy-start copy-done convert opt-barrier".split())
_OTHER_DIMS = frozenset({"bitcast", "reshape", "transpose"})
_RESHAPES = frozenset({"", "reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim"})
_Value = tuple[str, str]  # computation, instruction


def nearest_readers(
    module: Module,
    here: Computation,
    names: Sequence[str],
    tell: Callable[[Instruction, Computation], T | None],
) -> list[T]:
    """What the readers of an array tell that tell anything, the nearest first.

    The array is the result of the instructions `names`; where a reader tells None, those of its own
    result are asked.
    """
    told: list[T] = []
    level: list[_Value] = [(here.name, name) for name in names]
    visited = set[_Value]()
    while level and len(visited) < _MOST_VISITED:
        visited.update(level)
        onward: list[_Value] = []
        for where, name in level:
            at = module.computations[where]
            onward += _results_of_caller(module, at, name)
            for reader in map(at.instructions.__getitem__, at.users.get(name, ())):
                inside = _parameters_read(module, reader, name)
                known = None if inside else tell(reader, at)
                if known is not None:
                    told.append(known)
                    continue
                onward += inside or [(where, reader.name)]
        level = [value for value in dict.fromkeys(onward) if value not in visited]
    return told


def nearest_maker(
    module: Module,
    here: Computation,
    name: str,
    tell: Callable[[Instruction, Computation], T | None],
) -> T | None:
    """What the nearest instruction tells that made an array, also outside of a fusion."""
    own, call = here.instructions.get(name), _caller(module, here)
    while own and own.opcode == "parameter" and call:
        here, name = call[0], call[1].operands[int(own.arguments)]
        own, call = here.instructions.get(name), _caller(module, here)
    found = nearest([name], producers(here), lambda one: tell(one, here), here)
    return next(iter(found), None)


def find_fusion(
    module: Module, here: Computation, instruction: Instruction
) -> tuple[Computation, Instruction]:
    """The fusion that is all about an instruction without metadata of its own; else itself.

    The TPU compiler writes a reduce-scatter as such a fusion, of an all-reduce and a slice.
    """
    while not place_of(instruction) and (call := _caller(module, here)):
        here, instruction = call
    return here, instruction


def moves(reader: Instruction, sent: Instruction, here: Computation) -> bool:
    """Whether an instruction only moves the array that a collective sent.

    A reshape that splits or merges a gathered dim does more: it wants that dim whole; unless it is
    the compiler's own, which has the path of the product or sum that the collective has.
    """
    same_path = (reader.op_name, place_of(reader)) == (sent.op_name, place_of(sent))
    of_maker = same_path and last_name(reader.op_name) not in _RESHAPES
    if reader.opcode in _SAME_DIMS or (reader.opcode in _OTHER_DIMS and of_maker):
        return True
    if reader.opcode not in _OTHER_DIMS:
        return False
    if "dimensions" not in sent.attrs or not sent.opcode.startswith("all-gather"):
        return place_of(reader) == place_of(sent)
    gathered = sent.shapes[-1].dims[int(sent.attrs["dimensions"].strip("{}"))]
    (before,) = here.instructions[reader.operands[0]].shapes
    return _keeps(before.dims, reader.shapes[0].dims, gathered)


def _keeps(before: Sequence[int], after: Sequence[int], size: int) -> bool:
    """Whether a dim of this size is a dim of its own before and after a reshape or transpose."""
    if sorted(n for n in before if n > 1) == sorted(n for n in after if n > 1):
        return True
    starts = [{math.prod(d[:i]) for i, n in enumerate(d) if n == size} for d in (before, after)]
    return bool(starts[0] & starts[1])


def _caller(module: Module, here: Computation) -> tuple[Computation, Instruction] | None:
    """The only fusion that a computation is called by."""
    callers = module.callers.get(here.name, ())
    return callers[0] if len(callers) == 1 and callers[0][1].opcode in _FUSED else None


def _parameters_read(module: Module, call: Instruction, name: str) -> list[_Value]:
    """The parameters of a fused computation that an array is passed as."""
    callee = next((callee for _, callee in call.calls), "") if call.opcode in _FUSED else ""
    called = module.computations.get(callee)
    passed = [number for number, operand in enumerate(call.operands) if operand == name]
    known = called.parameters if called else {}
    return [(callee, known[number].name) for number in passed if number in known]


def _results_of_caller(module: Module, here: Computation, name: str) -> Iterator[_Value]:
    """Results of a fusion that an instruction in it is."""
    call = _caller(module, here)
    if call is None or name not in [result.name for result in here.results]:
        return
    outside, fusion = call
    if here.instructions[name].root:
        yield outside.name, fusion.name
        return
    index = str([result.name for result in here.results].index(name))
    for user in map(outside.instructions.__getitem__, outside.users.get(fusion.name, ())):
        if user.opcode == "get-tuple-element" and user.attrs["index"].strip() == index:
            yield outside.name, user.name
