"""Tensor parallelism (Megatron): column- then row-split pairs of products.

`x[B, D] · W[D, F_tensor] → h[B, F_tensor] · V[F_tensor, D] → y[B, D]`, y summed over tensor.

Collectives per layer, n devices, A bytes of one `[batch, length, embed]` activation: two
all-reduces forward and two backward, 8(n−1)/n · A per device. With `sequence=True` norms and
residuals are split over length: the same bytes as all-gather and reduce-scatter, and 1/n of
the activations between blocks.

Use inside a fast domain (one host, one torus row), when the batch per device is too small for
more `fsdp`. Do not use across slow links: its collectives stand in the way of every layer.
"""

from ._names import activations, params
from ._strategy import Strategy


def tensor(axis: str = "tensor", *, sequence: bool = False) -> Strategy:
    """Splits heads, MLP width and vocabulary over a mesh axis.

    Args:
      axis: name of the mesh axis.
      sequence: split the residual stream between blocks over length on the same axis.

    Returns:
      A strategy for models that carry the conventional logical names.

    >>> tensor(sequence=True).activations.spec(("batch", "residual_length", "embed"))
    P(None, 'tensor')
    """
    split = {"heads": axis, "kv_heads": axis, "mlp": axis, "vocab": axis}
    stream = {"residual_length": axis} if sequence else {}
    return Strategy(
        params=params(split),
        activations=activations({**split, **stream}),
        kinds=(("tensor+sequence" if sequence else "tensor", axis),),
    )
