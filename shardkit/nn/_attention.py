"""`sk.nn.attention`: exact attention, with one implementation per backend."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.backend import get_backend

from .._core.errors import StepError
from .._core.options import check_arguments
from ._blockwise import blockwise_attention
from ._overridable import overridable

Implementation = Literal["auto", "blocked", "splash", "xla", "cudnn"]


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Returns softmax(q kᵀ / √head_dim + mask) v, with the softmax in f32.

    A strategy may override it by the name `"attention"`: `sk.strategies.context()` computes it
    with the length split over devices.

    Args:
      query: [batch, length, heads, head_dim].
      key: [batch, length, kv_heads, head_dim]; `kv_heads` divides `heads`.
      value: [batch, length, kv_heads, head_dim].
      causal: whether a query sees only keys at its own position and before.
      segment_ids: i32[batch, length]; a query sees only keys of its own segment.
      implementation: `"blocked"` cuts the queries into blocks, skips the keys that the causal
        mask hides and keeps one number per query for the backward pass. `"splash"`
        runs JAX's kernel for TPUs, on lengths that are multiples of 128. `"xla"` and `"cudnn"`
        are those of `jax.nn.dot_product_attention`. `"auto"` is `"cudnn"` in a process whose
        JAX runs on CUDA, for 16-bit types and head widths that cuDNN takes, and `"blocked"`
        otherwise; to compile for a GPU that is absent, pass `"cudnn"`.

    Returns:
      [batch, length, heads, head_dim] in the dtype of the queries.

    >>> x = jnp.ones((1, 4, 2, 8))
    >>> attention(x, x, x).shape
    (1, 4, 2, 8)
    """
    check_arguments(
        StepError,
        "sk.nn.attention has wrong options.",
        causal=(causal, bool),
        implementation=(implementation, Implementation),
    )
    options = {"segment_ids": segment_ids, "causal": causal, "implementation": implementation}
    return overridable("attention", _attention)(query, key, value, **options)


def _attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    causal: bool,
    implementation: str,
) -> jax.Array:
    if implementation == "auto":
        implementation = "cudnn" if _supports_cudnn(query) else "blocked"
    if implementation == "splash":
        # Importing Pallas takes longer than all of this package.
        from ._splash import splash_attention

        return splash_attention(query, key, value, segment_ids, causal)
    if implementation == "blocked":
        return blockwise_attention(query, key, value, segment_ids, causal)
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    library: Any = implementation
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=causal, implementation=library
    )


def _supports_cudnn(query: jax.Array) -> bool:
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    return half and fits and "cuda" in get_backend().platform_version
