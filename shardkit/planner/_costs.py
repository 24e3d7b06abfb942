"""What a walk finds: collectives, products and writes, and where in a program they are."""

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
of stages splits the dim of layers, which a loop works off."""
PHASES = ("first", "forward", "last", "backward", "begun")
"""Parts of a program around and inside of its loops over layers, forward and backward."""

MatmulDims = tuple[tuple[float, frozenset[str]], ...]
"""Elements of the rows, the columns and the sum of a product, each with the axes that split it."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective: `kind` over `axes`, of `payload` bytes (V of the ledger), `trips` times.

    `loops` are the axes that divide the trips; `gradient` says that a parameter's gradient is
    summed, which happens once per step where micro-batches are reduced together; `use_param` that a
    parameter is gathered; `part` where in a pipeline it is, one of `PHASES`.
    """

    kind: str
    axes: frozenset[str]
    payload: SymbolicBytes
    trips: float
    loops: frozenset[str]
    gradient: bool = False
    weight: bool = False
    part: int = 0


@dataclasses.dataclass(frozen=True)
class Compute:
    """A product or a write: FLOPs split over `split`, and bytes moved, `trips` times in a part.

    `dims` are those of a product of matrices.
    """

    name: str
    flops: float
    split: frozenset[str]
    moved: SymbolicBytes
    trips: float
    loops: frozenset[str]
    part: int = 0
    dims: MatmulDims = ()


def matmul_dims(
    numbers: Any, laid: Sequence[SymbolicSharding], shapes: Sequence[tuple[int, ...]]
) -> MatmulDims:
    """Rows, columns and sum of a product with these dimension numbers."""
    summed, batch = numbers

    def joined(side: int, dims: Sequence[int]) -> tuple[float, frozenset[str]]:
        axes = (axis for i in dims for axis in laid[side].dims[i])
        return float(math.prod(shapes[side][i] for i in dims)), frozenset(axes)

    free = [[i for i in range(len(shapes[s])) if i not in (*summed[s], *batch[s])] for s in (0, 1)]
    return joined(0, free[0]), joined(1, free[1]), joined(0, summed[0])
