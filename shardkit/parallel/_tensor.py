"""Tensor parallelism (Megatron): column- then row-split pairs of products.

`x[B, D] · W[D, F_tensor] → h[B, F_tensor] · V[F_tensor, D] → y[B, D]`, y summed over tensor.

Collectives per layer, n devices, A bytes of one `[batch, length, embed]` activation: two
all-reduces forward and two backward, 8(n−1)/n · A per device. With `sequence=True` norms and
residuals are split over length: the same bytes as all-gather and reduce-scatter, and 1/n of
the activations between blocks.

Use inside a fast domain (one host, one torus row), when the batch per device is too small for
more `fsdp`. Do not use across slow links: its collectives stand in the way of every layer.
"""

from .._errors import Problem, StepError, did_you_mean, raise_all
from .._options import option_problems
from ._names import activations, check_axis, params
from ._strategy import Strategy

KV_HEADS = ("split", "replicate")


def tensor(axis: str = "tensor", *, sequence: bool = False, kv_heads: str = "split") -> Strategy:
    """Splits heads, MLP width and vocabulary over a mesh axis.

    Args:
      axis: name of the mesh axis.
      sequence: split the residual stream between blocks over length on the same axis.
      kv_heads: `"split"` splits key and value heads as query heads, whose number must then be a
        multiple of the axis; `"replicate"` has every device make all key and value heads and use
        those of its own queries, for grouped queries with fewer groups than devices; in
        `mode="auto"` alone.

    Returns:
      A strategy for models that carry the conventional logical names.

    Raises:
      StepError: `kv_heads` is neither.

    >>> tensor(sequence=True).activations.spec(("batch", "residual_length", "embed"))
    P(None, 'tensor')
    """
    check_axis("tensor", axis)
    problems = option_problems("tensor.", sequence=(sequence, bool))
    raise_all(StepError, "A strategy is declared wrongly.", problems)
    if kv_heads not in KV_HEADS:
        why = f"known: {', '.join(KV_HEADS)}.{did_you_mean(str(kv_heads), KV_HEADS)}"
        problem = Problem(f"tensor(kv_heads={kv_heads!r})", why, 'kv_heads="replicate"')
        raise_all(StepError, "There is no such policy for key and value heads.", [problem])
    split = dict.fromkeys(("heads", "mlp", "expert_mlp", "vocab"), axis)
    split |= {"kv_heads": axis} if kv_heads == "split" else {}
    stream = {"residual_length": axis} if sequence else {}
    return Strategy(
        params=params(split),
        activations=activations({**split, **stream}),
        kinds=(("tensor+sequence" if sequence else "tensor", axis),),
    )
