"""Finds instructions of a compiled program that combine parts which do not belong together.

An element-wise operation or a product computes what the whole arrays say only if the parts that
meet start at the same index of each dim. Of a sum over devices that is not known: parts that start
at other indices are rightly summed where they are those of a dim of which each device has one
element, as a head, which is left out. The walk carries these starts (`_parts.py`) from the
arguments of the program through its instructions. It believes only what the partitioner moves:
what a model moves on purpose (in a `shard_map`, by shifts, gathers and slices) has unknown starts
from there on.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ._groups import read_groups, read_pairs
from ._hlo import Computation, Instruction, Module, Shape
from ._part_rules import RULES, Site
from ._parts import (
    ANYWHERE,
    Dims,
    Parts,
    Starts,
    differs_within,
    gather,
    gather_in_order,
    join,
    join_starts,
    permute,
    scatter,
)

Values = tuple[Parts, ...]  # of every array of a result, tuples flattened
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute")
_ELEMENTWISE = frozenset(
    """add subtract multiply divide maximum minimum power remainder and or xor compare select clamp
    atan2 shift-left shift-right-logical shift-right-arithmetic abs negate exponential
    exponential-minus-one log log-plus-one logistic tanh sine cosine sqrt rsqrt cbrt sign floor
    ceil round-nearest-even round-nearest-afz not is-finite convert copy real imag complex erf
    reduce-precision""".split()
)
# How the partitioner computes the offset of a device's own part.
_ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.floor_divide,
    "remainder": np.remainder,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "convert": lambda x: x,
    "copy": lambda x: x,
}


@dataclasses.dataclass(frozen=True)
class Misaligned:
    """An instruction that combines parts which do not belong together."""

    instruction: Instruction  # the instruction
    shape: Shape  # of one of the arrays that it combines, on one device
    dim: int  # the dim whose starts differ
    devices: int  # number of devices on which they differ


def find_misaligned(
    module: Module, arguments: Sequence[Parts], results: Sequence[Parts], devices: int
) -> tuple[Misaligned, ...]:
    """Walks a program from the parts that its arguments hold to those that its results must hold.

    Both are in order; results may be fewer than the program has.
    """
    entry = module.computations.get(module.entry)
    if entry is None or len(entry.parameters) != len(arguments):
        return ()
    walk = _Walk(module, devices)
    numbered = enumerate(arguments)
    computed = walk.run(entry, [(_fit(p, entry.parameters[n]),) for n, p in numbered])
    for result, parts, instruction in zip(computed, results, entry.results, strict=False):
        wanted = _fit(parts, instruction)
        for dim, (a, b) in enumerate(zip(result.dims, wanted.dims, strict=True)):
            walk.compare(instruction, instruction.shapes[0], dim, a, b)
    return tuple(walk.found.values())


def _fit(parts: Parts, instruction: Instruction) -> Parts:
    """Parts of an array of this rank: random keys have a dim more in a compiled program."""
    known = len(parts.dims) == len(instruction.shapes[0].dims)
    return parts if known else Parts.unknown(instruction.shapes[0])


class _Walk:
    """Carries parts through a module, computation by computation."""

    def __init__(self, module: Module, devices: int) -> None:
        self.module, self.devices = module, devices
        self.found: dict[tuple[str, int], Misaligned] = {}

    def run(self, here: Computation, arguments: Sequence[Values]) -> Values:
        """The result of a computation."""
        values: dict[str, Values] = {}
        for name, instruction in here.instructions.items():
            if instruction.opcode == "parameter":
                values[name] = arguments[int(instruction.arguments)]
                continue
            operands = [values[name] for name in instruction.operands if name in values]
            result = self._step(instruction, here, operands)
            ranks = [len(shape.dims) for shape in instruction.shapes]
            fits = [len(parts.dims) for parts in result] == ranks
            values[name] = result if fits else _unknown(instruction)
        return values[here.root.name] if here.root else ()

    def compare(
        self, instruction: Instruction, shape: Shape, dim: int, a: Starts | None, b: Starts | None
    ) -> Starts | None:
        """The starts of a dim that two arrays share; they must agree where both are known."""
        if a is None or b is None:
            known = b if a is None else a
            return None if known == ANYWHERE else known
        if a == b or ANYWHERE in (a, b):
            return join_starts(a, b)
        if len(set(a)) == 1 or len(set(b)) == 1:
            # As large whole as split: they are two dims, beside ones of a single element on a
            # device that are left out, as `[heads, 8]` with a head on each device is.
            return None
        differ = sum(x != y for x, y in zip(a, b, strict=True))
        self.found[instruction.name, dim] = Misaligned(instruction, shape, dim, differ)
        return None

    def _step(self, of: Instruction, here: Computation, operands: Sequence[Values]) -> Values:
        every = tuple(parts for operand in operands for parts in operand)
        if "shard_map" in of.op_name:
            return _unknown(of)
        if of.opcode in ("tuple", "optimization-barrier"):
            return every
        if of.opcode == "get-tuple-element":
            return _element(of, here, every)
        if of.calls and of.opcode in ("fusion", "call", "while", "conditional"):
            return self._call(of, operands)
        if of.opcode in _COLLECTIVES:
            return tuple(
                self._collective(of, parts, shape)
                for parts, name in zip(every, of.operands, strict=True)
                for shape in here.instructions[name].shapes
            )
        if of.opcode == "all-to-all":
            return (self._all_to_all(of, every),) * len(of.shapes)
        if of.opcode in _ELEMENTWISE:
            return (self._elementwise(of, every),)
        if of.opcode not in RULES:
            return _unknown(of)
        site = Site(of, here, self.devices)
        shape = here.instructions[of.operands[0]].shapes[0] if operands else of.shapes[0]
        return (RULES[of.opcode](functools.partial(self.compare, of, shape), site, every),)

    def _elementwise(self, of: Instruction, operands: Values) -> Parts:
        shape = of.shapes[0]
        # The predicate of a select may be a scalar.
        alike = [one for one in operands if len(one.dims) == len(shape.dims)]
        dims = alike[0].dims if alike else Parts.unknown(shape).dims
        for other in alike[1:]:
            pairs = enumerate(zip(dims, other.dims, strict=True))
            dims = [self.compare(of, shape, dim, a, b) for dim, (a, b) in pairs]
        inserted = self._insertion(of, alike)
        compute, tables = _ARITHMETIC.get(of.opcode), [parts.values for parts in operands]
        known = compute and all(table is not None for table in tables)
        return Parts(tuple(dims), compute(*tables) if compute and known else None, inserted)

    def _insertion(self, of: Instruction, operands: Sequence[Parts]) -> Dims | None:
        """`inserted` of an element-wise operation: what all know that may not start anywhere.

        Where a device has one element of a dim, one operand may be spread along it by a broadcast
        and another one split. Their starts then have other values, and are not in another order.
        """
        own = [one.inserted for one in operands if any(at != ANYWHERE for at in one.dims)]
        return functools.reduce(lambda a, b: a and b and self._meet(of, a, b), own or [None])

    def _meet(self, of: Instruction, first: Dims, second: Dims) -> Dims:
        dims = list(first)
        for dim, (a, b) in enumerate(zip(first, second, strict=True)):
            in_order = not a or not b or a == b or sorted(a) != sorted(b)
            dims[dim] = join_starts(a, b) if in_order else self.compare(of, of.shapes[0], dim, a, b)
        return tuple(dims)

    def _call(self, of: Instruction, operands: Sequence[Values]) -> Values:
        called = [(key, self.module.computations[name]) for key, name in of.calls]
        if of.opcode == "while":
            return self._loop(dict(called)["body"], operands[0])
        if of.opcode == "conditional":
            pairs = zip(called, operands[1:], strict=True)
            branches = [self.run(branch, [operand]) for (_, branch), operand in pairs]
            return functools.reduce(_join_all, branches)
        return self.run(called[0][1], operands)

    def _loop(self, body: Computation, start: Values) -> Values:
        """Walks three trips, of which each is as it would be outside of a loop, then what all keep.

        A carry that starts from zeros has the starts that the first trip gives it, and it is a
        later trip that meets with them what the loop reads: trips are not joined before.
        """
        carry = start
        for _ in range(3):
            after = _keep_tables(carry, self.run(body, [carry]))
            if _same(after, carry):
                return carry
            carry = after
        found = dict(self.found)
        while not _same(joined := _join_all(carry, self.run(body, [carry])), carry):
            carry = joined
        self.found = found
        return carry

    def _all_to_all(self, of: Instruction, operands: Values) -> Parts:
        """Dims that are split, and in the same place in all pieces of a group, stay as they are.

        One that is whole may be a part of one that is split afterwards: `[8]` is sent as `[2, 4]`.
        """
        groups = read_groups(of.attrs.get("replica_groups", "{}"), self.devices)
        dims = functools.reduce(join, operands).dims
        split = of.attrs.get("dimensions", "").strip("{} ")

        def stays(dim: int, starts: Starts | None) -> bool:
            if not starts or not any(starts) or str(dim) == split:
                return False
            return not differs_within(starts, groups)

        kept = (starts if stays(dim, starts) else None for dim, starts in enumerate(dims))
        return Parts(tuple(kept))

    def _collective(self, of: Instruction, parts: Parts, shape: Shape) -> Parts:
        found = dict(self.found)
        inserted = parts.inserted and self._collect(of, parts.inserted, shape)
        self.found = found
        return Parts(self._collect(of, parts.dims, shape), inserted=inserted)

    def _collect(self, of: Instruction, dims: Dims, shape: Shape) -> Dims:
        if of.opcode == "collective-permute":
            pairs = read_pairs(of.attrs.get("source_target_pairs", ""))
            return tuple(permute(dim, pairs) for dim in dims)
        groups = read_groups(of.attrs.get("replica_groups", "{}"), self.devices)
        moved = of.attrs.get("dimensions", "").strip("{} ")
        after = list(dims)
        for dim, starts in enumerate(dims):
            if of.opcode == "all-gather" and moved == str(dim):
                after[dim] = gather(starts, shape.dims[dim], groups)
                if after[dim] is None and gather_in_order(starts, shape.dims[dim], groups):
                    self.found[of.name, dim] = Misaligned(of, shape, dim, self.devices)
            elif starts is not None and differs_within(starts, groups):
                after[dim] = None
            elif moved == str(dim):
                after[dim] = scatter(starts, shape.dims[dim] // len(groups[0]), groups)
        return tuple(after)


def _unknown(of: Instruction) -> Values:
    return tuple(map(Parts.unknown, of.shapes))


def _keep_tables(before: Values, after: Values) -> Values:
    """The result of a trip, with the tables that it left as they were."""
    pairs = zip(before, after, strict=True)
    return tuple(dataclasses.replace(b, values=join(a, b).values) for a, b in pairs)


def _same(first: Values, second: Values) -> bool:
    """Whether two walks know the same: equal starts, and the same tables."""
    pairs = zip(first, second, strict=True)
    return first == second and all(a.values is b.values for a, b in pairs)


def _join_all(first: Values, second: Values) -> Values:
    return tuple(join(a, b) for a, b in zip(first, second, strict=True))


def _element(of: Instruction, here: Computation, values: Values) -> Values:
    """One element of a tuple, which may itself be a tuple."""
    counts = here.instructions[of.operands[0]].element_counts
    index = int(of.attrs["index"])
    start = sum(counts[:index])
    return values[start : start + counts[index]]
