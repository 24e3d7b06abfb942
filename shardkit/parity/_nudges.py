"""What rounding does to a reference: runs of it that differ by roundings alone.

The change of the results is the noise of the reference: programs that sum in another order differ
by roundings too, so correct programs differ by about as much.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.precision import policy_dtype
from .._core.types import Params


def nudge_params(params: Params, dtype: str | None, seed: int, roundings: float = 1.0) -> Params:
    """Moves every parameter up or down by one rounding, at random: 0.5 becomes 0.5 ± 6e-8 in f32.

    The rounding is that of the dtype which the policy `dtype` computes it in. Other `roundings`
    move it by as many, the opposite way if negative.
    """
    rng = np.random.default_rng(seed)

    def move(x: jax.Array) -> jax.Array:
        return jax.device_put(_nudge(x, rng, dtype, times=roundings), x.sharding)

    return jax.tree.map(move, params)


def nudge_grads(reduce_dtype: str, seed: int) -> Callable[[Params], Params]:
    """Moves every gradient up or down by one rounding of the dtype that gradients are summed in.

    What a device sends is rounded to this dtype, however exact the computation is. The parts of a
    small sum may be as large as those of others, so its rounding is that of a usual element:
    0.5 - 0.4999 is 0.001 in bf16, not 0.0001. What is zero is zero everywhere, as an unused row of
    an embedding.
    """
    rng = np.random.default_rng(seed)
    return functools.partial(jax.tree.map, lambda g: _nudge(g, rng, reduce_dtype, usual=True))


def _nudge(
    x: Any,
    rng: np.random.Generator,
    dtype: str | None,
    *,
    usual: bool = False,
    times: float = 1.0,
) -> Any:
    """Moves each element by roundings of its own, or of the usual size among those not zero."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    eps = float(jnp.finfo(policy_dtype(x.dtype, dtype)).eps)
    wide = np.asarray(x).astype(np.promote_types(x.dtype, np.float64))
    sizes = np.full(x.shape, times)
    if usual and wide.any():
        size = np.abs(wide)
        rms = np.sqrt(np.mean(size[size > 0] ** 2))
        np.divide(rms, size, out=sizes, where=(size > 0) & (size < rms))
    return (wide * (1 + eps * sizes * rng.choice([-1.0, 1.0], size=x.shape))).astype(x.dtype)
