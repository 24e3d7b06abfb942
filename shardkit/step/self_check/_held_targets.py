"""A loss whose values behind `stop_gradient` stay where they are while its parameters move.

    (f(p) - stop_gradient(g(p)))²      has the gradient of (f(p) - t)², where t = g(p) of today

A difference quotient of the loss moves `g` too, so it is that of another function: for a GAN with
both losses in one, targets that the model makes itself, straight-through estimators. Here the loss
is computed for the parameters of today and for moved ones at once, by `jax.vmap`, and both get the
first one's value of what is behind `stop_gradient`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import batching, mlir

from ..._core.rewriting import rewrite
from ..._core.types import Params, Scalar
from .._objective import LossOutput, Objective

held_p = core.Primitive("shardkit_held")
held_p.def_impl(lambda x: x)
held_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(held_p, lambda ctx, x: [x])


def _take_first(args: Any, dims: Any) -> tuple[Any, Any]:
    (x,), (dim,) = args, dims
    return jnp.broadcast_to(jax.lax.index_in_dim(x, 0, dim), x.shape), dim


batching.primitive_batchers[held_p] = _take_first


def hold_targets(objective: Objective, start: Params) -> Objective:
    """The objective of moved parameters, with what is behind `stop_gradient` as at `start`."""
    held = rewrite(objective, {"stop_gradient": lambda eqn: eqn.replace(primitive=held_p)})

    def run(params: Params, *rest: Any) -> tuple[Scalar, LossOutput]:
        pair = jax.tree.map(lambda *both: jnp.stack(both), start, params)
        results = jax.vmap(held, in_axes=(0, *[None] * len(rest)))(pair, *rest)
        return jax.tree.map(lambda x: x[1], results)

    return run
