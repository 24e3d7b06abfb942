"""ZeRO-1 and ZeRO-2: data parallelism that splits the optimizer's update over its devices.

`x[B_data, D] · W[D, F] → y[B_data, F]`, then `W[D_data, F] ← update(W, g[D_data, F], m[D_data, F])`

Collectives per step, n devices, G bytes of gradients, W of weights: gradients reduce-scattered,
updated weights gathered: (n−1)/n · (G + W) per device, once per step whatever the accumulation.
The bytes are those of `data`; optimizer state, and with stage 2 gradients, take 1/n of the memory.

Use when weights and activations fit on one device, and the optimizer state does not: two moments in
f32 are four times the weights in bf16. Do not use when the weights do not fit either (`fsdp`).
Stage 2 saves nothing where micro-batches are accumulated with one reduction per step: each device
then holds whole gradients of its own rows until that reduction.

The gathered weights are those that the step returns, in the dtype they are stored in. XLA's CPU
backend has no reduce-scatter: it all-reduces whole gradients and slices them.
"""

import dataclasses
from typing import ClassVar, final

from jax.sharding import PartitionSpec

from ..report import Program
from ..rules import REPLICATED
from ._kind import DeviceBytes, Kind
from ._names import activations, check_strategy
from ._strategy import Strategy
from ._zero_update import Zero


def zero_bytes(n: int, weights: float, gradients: float) -> float:
    """Bytes per device: gradients reduce-scattered, updated weights gathered.

    >>> zero_bytes(4, 1000, 1000)
    1500.0
    """
    return (n - 1) / n * (weights + gradients)


def zero(axis: str = "data", *, stage: int = 1) -> Strategy:
    """Splits the rows of the batch, and the optimizer's state, over a mesh axis.

    State is split on top of what other strategies split: with `zero() | tensor()` the moments of a
    parameter are split over `tensor`, like the parameter, and over `data`. If the axis divides no
    dim of a parameter, its state stays whole, which the report lists as a finding.

    Args:
      axis: name of the mesh axis.
      stage: 1 reduces whole gradients, then slices them; 2 leaves gradients split.

    Returns:
      A strategy for any model and any optax chain.

    Raises:
      StepError: the stage is not 1 or 2.

    >>> zero(stage=2).kinds
    (ZeroUpdate(axis='data'),)
    """
    check_strategy("zero", axis)
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
    """Rows split over an axis, and the update of parameters that are whole over it."""

    name: ClassVar[str] = "zero"
    splits = frozenset({"rows", "optimizer_state"})
    collectives = frozenset({"all-reduce", "reduce-scatter", "all-gather"})
    in_shard_map = True
    implied_by = frozenset({"batch", "opt_state"})
    factory = staticmethod(zero)
    sweep_by_default = False

    def minimum(self, program: Program) -> float:
        """Rajbhandari et al. 2020."""
        declared = program.declared
        sent, reduced = (
            program.param_bytes(self.axis, dtype, split=False, trained=True)
            for dtype in (declared.compute_dtype, declared.reduce_dtype)
        )
        return zero_bytes(program.sizes[self.axis], sent, reduced)

    def extra_bytes(self, held: DeviceBytes) -> float:
        """Parameters are gathered after their split update."""
        return held.regathered
