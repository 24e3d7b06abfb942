"""Attention whose length is split over a mesh axis, with its gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ._attention_layout import Way


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def across(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids: jax.Array | None,
    causal: bool,
    way: Way,
) -> jax.Array:
    """Returns softmax(q kᵀ / √H + mask) v, the softmax in f32, without a length being gathered.

    The backward pass keeps the inputs as `way` moved them, the output and one number per query;
    it makes the same exchanges again instead of keeping what came.

    Args:
      q_BTNH: queries, [batch, length, heads, head_dim].
      k_BTKH: keys, [batch, length, kv_heads, head_dim].
      v_BTKH: values, as the keys.
      segment_ids: i32[batch, length], or None; a query sees only keys of its own segment.
      causal: whether a query sees only keys at its own position and before.
      way: `Ring` or `HeadExchange`.

    Returns:
      [batch, length, heads, head_dim] in the dtype of the queries.
    """
    return _across_fwd(q_BTNH, k_BTKH, v_BTKH, segment_ids, causal, way)[0]


def _across_fwd(
    q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None, causal: bool, way: Way
) -> tuple[jax.Array, tuple[Any, ...]]:
    q, k, v, ids = way.enter((q, k, v, ids), causal)
    out, lse = way.attend(q, k, v, ids, causal)
    # Under the name of the output, so that a policy which keeps one keeps both.
    out, lse = checkpoint_name((way.leave(out, causal), lse), "attn_mix")
    return out, (q, k, v, ids, out, lse)


def _across_bwd(causal: bool, way: Way, saved: tuple[Any, ...], g: jax.Array) -> tuple[Any, ...]:
    q, k, v, ids, out, lse = saved
    delta = (out.astype(jnp.float32) * g).sum(-1)
    g, delta = way.enter((g, delta), causal)
    grads = way.gradients(q, k, v, ids, lse, delta, g, causal)
    return *way.leave(grads, causal), None


across.defvjp(_across_fwd, _across_bwd)
