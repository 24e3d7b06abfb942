"""What a walk finds: collectives, products and writes, and where in a program they are."""

import dataclasses

from ._laid import Terms

PIPE = "pipe"
"""The axis of the stages of a pipeline: it splits the dim of layers, which a loop works off."""
PARTS = ("first", "forward", "last", "backward", "begun")
"""Parts of a program around and inside of its loops over layers, forward and backward."""


@dataclasses.dataclass(frozen=True)
class Sent:
    """A collective: `kind` over `axes`, of `payload` bytes (V of the ledger), `trips` times.

    `loops` are the axes that divide the trips; `gradient` says that a parameter's gradient is
    summed, which happens once per step where micro-batches are reduced together; `weight` that a
    parameter is gathered; `part` where in a pipeline it is, one of `PARTS`.
    """

    kind: str
    axes: frozenset[str]
    payload: Terms
    trips: float
    loops: frozenset[str]
    gradient: bool = False
    weight: bool = False
    part: int = 0


@dataclasses.dataclass(frozen=True)
class Work:
    """A product or a write: FLOPs split over `split`, and bytes moved, `trips` times in a part."""

    name: str
    flops: float
    split: frozenset[str]
    moved: Terms
    trips: float
    loops: frozenset[str]
    part: int = 0
