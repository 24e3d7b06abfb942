"""Fully sharded data parallelism (ZeRO-3): rows, weights, gradients and optimizer state split.

`x[B_fsdp, D] · W[D_fsdp, F] → y[B_fsdp, F]`, W gathered where it is used.

Collectives per step, n devices, W bytes of weights in compute dtype, G of gradients: gather
forward, gather backward, reduce-scatter of gradients: (n−1)/n · (2W + G) per device.

Use when weights, gradients and optimizer state do not fit, and the batch is large enough that
computing on it takes longer than gathering weights. Do not use across slow links for small
batches per device (`data` across them, `fsdp` inside).
"""

from jax.sharding import PartitionSpec

from ..rules import chain, shard_largest
from ._names import activations, params
from ._strategy import Strategy


def fsdp(axis: str = "fsdp", min_size: int = 1024) -> Strategy:
    """Splits rows, and every parameter over its `embed` dim, over one mesh axis.

    A model without logical names has each parameter split over the largest dim that the axis
    divides.

    Args:
      axis: name of the mesh axis.
      min_size: parameters of models without names that have fewer elements are replicated.

    Returns:
      A strategy for any model.

    >>> fsdp().batch
    P('fsdp',)
    """
    return Strategy(
        params=chain(params({"embed": axis}), shard_largest(axis, min_size=min_size)),
        batch=PartitionSpec(axis),
        activations=activations({"batch": axis}),
        kinds=(("fsdp", axis),),
    )
