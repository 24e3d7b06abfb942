"""The product of an input with the two factors of a weight, in the dims of that with the weight."""

from collections.abc import Mapping
from typing import Any

import jax

from ._tracked import Tracked


def multiply(weight: Tracked, x: jax.Array, side: int, params: Mapping[str, Any]) -> jax.Array:
    """Returns scale · (x A) B, in the shape of one `dot_general` of x and a weight W.

    W has dims that are contracted, batch dims, and others. Of these, stacked ones (`loose`) are
    batch dims of the second product, since A and B both have them:

        x [t, e] · W [X, e, f] → [t, X, f]    x A [t, X, r],    (x A) B over X → [X, t, f]

    W is operand `side` (0 or 1) of the product, x is floating-point.
    """
    contracted, batch = params["dimension_numbers"]
    w_in, w_batch = contracted[side], batch[side]
    x_in, x_batch = contracted[1 - side], batch[1 - side]
    free = [dim for dim in range(weight.value.ndim) if dim not in (*w_in, *w_batch)]
    loose = [d for d in free if any(weight.of.dims[label] == "s" for label in weight.dims[d])]
    outputs = [dim for dim in free if dim not in loose]
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    dtype = weight.value.dtype
    a, b = weight.a.astype(dtype).squeeze(outputs), weight.b.astype(dtype).squeeze(tuple(w_in))
    at_a = {dim: n for n, dim in enumerate(sorted((*w_in, *w_batch, *loose)))}
    at_b = {dim: n for n, dim in enumerate(sorted((*w_batch, *free)))}

    numbers = (x_in, [at_a[d] for d in w_in]), (x_batch, [at_a[d] for d in w_batch])
    low: Any = jax.lax.dot_general(x, a, numbers, **options)  # [*batch, *x, *loose, rank]
    low = (low * weight.of.scale).astype(max(x.dtype, dtype, key=lambda d: d.itemsize))
    last, num_batch = low.ndim - 1, len(w_batch)
    num_x = last - num_batch - len(loose)
    both = [*range(num_batch), *range(num_batch + num_x, last)]
    numbers = ([last], [b.ndim - 1]), (both, [at_b[d] for d in (*w_batch, *loose)])
    out: Any = jax.lax.dot_general(low, b, numbers, **options)  # [*batch, *loose, *x, *outputs]

    at = {dim: num_batch + n for n, dim in enumerate(loose)}
    own = num_batch + len(loose) + num_x
    at |= {dim: own + n for n, dim in enumerate(outputs)}
    of_x = list(range(num_batch + len(loose), own))
    of_w = [at[dim] for dim in free]
    return out.transpose(*range(num_batch), *(of_w + of_x if side == 0 else of_x + of_w))
