"""Data parallelism: every device holds the model, each works on its own rows.

`x[B_data, D] · W[D, F] → y[B_data, F]`

Collectives per step, n devices, G bytes of gradients: one all-reduce, 2(n−1)/n · G per device,
whatever the accumulation.

Use when the model, its gradients and the optimizer state fit on one device. Do not use when they
don't (`fsdp`), or when a device's share of the batch is too small to hide the all-reduce.
"""

from jax.sharding import PartitionSpec

from ..rules import REPLICATED
from ._names import activations, check_axis
from ._strategy import Strategy


def data(axis: str = "data") -> Strategy:
    """Splits the rows of the batch over a mesh axis; parameters are replicated.

    Args:
      axis: name of the mesh axis.

    Returns:
      A strategy for any model, with or without logical names.

    >>> data().batch
    P('data',)
    """
    check_axis("data", axis)
    return Strategy(
        params=REPLICATED,
        batch=PartitionSpec(axis),
        activations=activations({"batch": axis}),
        kinds=(("data", axis),),
    )
