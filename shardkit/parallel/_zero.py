"""ZeRO-1 and ZeRO-2: data parallelism whose update is split over the devices that repeat it.

`x[B_data, D] · W[D, F] → y[B_data, F]`, then `W[D_data, F] ← update(W, g[D_data, F], m[D_data, F])`

Collectives per step, n devices, G bytes of gradients, W of weights: gradients reduce-scattered,
updated weights gathered: (n−1)/n · (G + W) per device, once per step whatever the accumulation.
The bytes are those of `data`; optimizer state, and with stage 2 gradients, take 1/n of the memory.

Use when weights and activations fit on one device, and the optimizer state does not: two moments in
f32 are four times the weights in bf16. Do not use when the weights do not fit either (`fsdp`).
Stage 2 saves nothing where micro-batches are accumulated with one reduction per step: each device
then holds its own gradients whole until that reduction.

The weights that are gathered are those that the step returns, in the dtype they are stored in.
XLA's CPU backend makes no reduce-scatter: it reduces whole gradients and slices them.
"""

import dataclasses
from typing import ClassVar, final

from jax.sharding import PartitionSpec

from ..report import Program
from ..rules import REPLICATED
from ._kind import DeviceBytes, Kind
from ._names import activations, check_axis
from ._strategy import Strategy
from ._zero_update import Zero


def zero_bytes(n: int, weights: float, gradients: float) -> float:
    """ZeRO-1 and ZeRO-2: gradients reduce-scattered, updated weights gathered.

    >>> zero_bytes(4, 1000, 1000)
    1500.0
    """
    return (n - 1) / n * (weights + gradients)


def zero(axis: str = "data", *, stage: int = 1) -> Strategy:
    """Splits the rows of the batch, and the optimizer's state, over a mesh axis.

    State is split on top of what other strategies split: `zero() | tensor()` has the moments of a
    parameter over `tensor` as the parameter, and over `data` besides. State of a parameter of
    which the axis divides no dim stays whole, which is a finding of the report.

    Args:
      axis: name of the mesh axis.
      stage: 1 reduces whole gradients, then slices them; 2 leaves gradients split.

    Returns:
      A strategy for any model and any optax chain.

    Raises:
      StepError: there is no such stage.

    >>> zero(stage=2).kinds
    (ZeroUpdate(axis='data'),)
    """
    check_axis("zero", axis)
    return Strategy(
        params=REPLICATED,
        batch=PartitionSpec(axis),
        activations=activations({"batch": axis}),
        zero=Zero(axis, stage),
        kinds=(ZeroUpdate(axis),),
    )


@final
@dataclasses.dataclass(frozen=True)
class ZeroUpdate(Kind):
    """Rows over an axis, and the update of parameters that are whole over it."""

    name: ClassVar[str] = "zero"
    splits = frozenset({"rows", "optimizer_state"})
    collectives = frozenset({"all-reduce", "reduce-scatter", "all-gather"})
    in_shard_map = True
    told_by = frozenset({"batch", "opt_state"})
    make = staticmethod(zero)
    by_default = False

    def minimum(self, program: Program) -> float:
        """Rajbhandari et al. 2020."""
        declared = program.declared
        sent, reduced = (
            program.param_bytes(self.axis, dtype, split=False)
            for dtype in (declared.compute_dtype, declared.reduce_dtype)
        )
        return zero_bytes(program.sizes[self.axis], sent, reduced)

    def sent_beside(self, held: DeviceBytes) -> float:
        """What was updated in parts is gathered again."""
        return held.regathered
