"""The costs of a program: collectives, products and writes, each in a phase of the program."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ..parallel import axes_splitting
from ._symbolic_sharding import SymbolicBytes, SymbolicSharding

PIPE, LENGTH, EXPERTS, HEADS = (
    axes_splitting(part)[0] for part in ("layers", "length", "experts", "heads")
)
"""Mesh axes that the formulae for stages, attention, experts and products are written for. The axis
of stages splits the dim of layers, over which a loop runs."""
PHASES = ("prologue", "forward", "epilogue", "backward", "prologue_backward")
"""Phases of a program around and inside its two loops over layers. The epilogue (head and loss) is
forward and backward at once; the backward pass of the prologue (embedding) comes last."""

MatmulDims = tuple[tuple[float, frozenset[str]], ...]
"""Elements of the rows, the columns and the sum of a product, each with the axes that split it."""


@dataclasses.dataclass(frozen=True)
class ProgramSite:
    """Where an operation runs: times per micro-batch, axes that divide them, index in `PHASES`."""

    trips: float
    loops: frozenset[str]
    phase: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective."""

    kind: str  # `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all` or `swap`
    axes: frozenset[str]  # mesh axes that it runs over
    payload: SymbolicBytes  # bytes (V of the ledger)
    site: ProgramSite  # where it runs
    # whether it reduces the gradient of a parameter, which happens once per step where
    # micro-batches are reduced together
    is_gradient: bool = False
    is_param: bool = False  # whether it gathers a parameter


@dataclasses.dataclass(frozen=True)
class Compute:
    """A product, or a write of 0 FLOPs."""

    name: str  # of the operation
    flops: float  # on all devices
    split: frozenset[str]  # axes that divide the FLOPs
    bytes_moved: SymbolicBytes  # bytes read and written
    site: ProgramSite  # where it runs
    dims: MatmulDims = ()  # those of a product of matrices


@dataclasses.dataclass
class CostLog:
    """Costs found so far by a propagation."""

    # in the order of the program
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    # products and writes, in the order of the program
    compute: list[Compute] = dataclasses.field(default_factory=list)
    phase: int = 0  # index into `PHASES`; it advances only where layers are split over stages
    # bytes that one layer hands to the next
    message: SymbolicBytes = dataclasses.field(default_factory=dict)


def matmul_dims(
    numbers: Any, shardings: Sequence[SymbolicSharding], shapes: Sequence[tuple[int, ...]]
) -> MatmulDims:
    """Rows, columns and sum of a product with these dimension numbers."""
    summed, batch = numbers

    def measure(side: int, dims: Sequence[int]) -> tuple[float, frozenset[str]]:
        axes = (axis for i in dims for axis in shardings[side].dims[i])
        return float(math.prod(shapes[side][i] for i in dims)), frozenset(axes)

    free = [[i for i in range(len(shapes[s])) if i not in (*summed[s], *batch[s])] for s in (0, 1)]
    return measure(0, free[0]), measure(1, free[1]), measure(0, summed[0])
