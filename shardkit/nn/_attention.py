"""`sk.nn.attention`: exact attention, with one implementation per backend."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.backend import get_backend

from .._core.errors import Problem, StepError, raise_all
from .._core.options import check_arguments
from ._blockwise import BlockOptions, blockwise_attention
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
    window: int | jax.Array | None = None,
    softcap: float | None = None,
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
      window: number of keys that a query sees, the one at its own position the last; None for
        all. An integer saves the products with the others, an i32[] array may differ from layer
        to layer of a scan. Needs `"auto"`, `"blocked"` or `"xla"`.
      softcap: logits become `softcap · tanh(logits / softcap)`; None leaves them. Needs `"auto"`
        or `"blocked"`.

    Returns:
      [batch, length, heads, head_dim] in the dtype of the queries.

    Raises:
      StepError: an option is not one of these, or the implementation lacks it.

    >>> x = jnp.ones((1, 4, 2, 8))
    >>> attention(x, x, x).shape
    (1, 4, 2, 8)
    """
    check_arguments(
        StepError,
        "sk.nn.attention has wrong options.",
        causal=(causal, bool),
        implementation=(implementation, Implementation),
        window=(window, int | jax.Array | None),
        softcap=(softcap, float | None),
    )
    options = {"segment_ids": segment_ids, "causal": causal, "implementation": implementation}
    limits = {"window": window, "softcap": softcap}
    options |= {name: value for name, value in limits.items() if value is not None}
    _check_limits(implementation, causal, **limits)
    return overridable("attention", _attention)(query, key, value, **options)


def _attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    causal: bool,
    implementation: str,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:
    if implementation == "auto":
        plain = window is None and softcap is None
        implementation = "cudnn" if plain and _supports_cudnn(query) else "blocked"
    if implementation == "splash":
        # Importing Pallas takes longer than all of this package.
        from ._splash import splash_attention

        return splash_attention(query, key, value, segment_ids, causal)
    if implementation == "blocked":
        fixed = window if isinstance(window, int) else None
        hidden = (segment_ids, None if fixed is window else jnp.asarray(window))
        return blockwise_attention(query, key, value, hidden, BlockOptions(causal, fixed, softcap))
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    if window is not None:
        distance = jnp.arange(query.shape[1])[:, None] - jnp.arange(key.shape[1])[None, :]
        near = (distance < window)[None, None]
        mask = near if mask is None else mask & near
    library: Any = implementation
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=causal, implementation=library
    )


_USE = 'implementation="blocked"'
_LIMITS = {"window": ("auto", "blocked", "xla"), "softcap": ("auto", "blocked")}


def _check_limits(implementation: str, causal: bool, **limits: Any) -> None:
    problems = [
        Problem(f"{name}=", f"is not in implementation={implementation!r}", _USE)
        for name, known in _LIMITS.items()
        if limits[name] is not None and implementation not in known
    ]
    for name, value in limits.items():
        if isinstance(value, int | float) and value <= 0:
            problems.append(Problem(f"{name}={value}", "must be positive", f"{name}=None"))
    if limits["window"] is not None and not causal:
        why = "counts the keys before a query, but causal=False shows those after it too"
        problems.append(Problem("window=", why, "causal=True, or window=None"))
    raise_all(StepError, "sk.nn.attention cannot be computed.", problems)


def _supports_cudnn(query: jax.Array) -> bool:
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    return half and fits and "cuda" in get_backend().platform_version
