"""Attention, exact, with one implementation per backend.

Dims: B batch, T queries, S keys, N query heads, K key heads, G = N / K query heads that share
one key head, H head width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.backend import get_backend

from .._core.scope_markers import recomputed
from ._overridable import overridable

# Few enough blocks to keep the program small, enough to skip 7/16 of a causal square.
_MAX_BLOCKS = 8
_MIN_BLOCK = 64
_MASKED = -1e30

Residuals = tuple[Any, ...]


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Returns softmax(q kᵀ / √H + mask) v, with the softmax in f32.

    Args:
      q_BTNH: queries, [batch, length, heads, head_dim].
      k_BSKH: keys, [batch, length, kv_heads, head_dim]; `kv_heads` divides `heads`.
      v_BSKH: values, as the keys.
      causal: whether a query sees only keys at its own position and before.
      segment_ids: i32[batch, length]; a query sees only keys of its own segment.
      implementation: `"blocked"` cuts the queries into blocks, skips the keys that the causal
        mask hides and keeps one number per query for the backward pass. `"splash"`
        runs JAX's kernel for TPUs, on lengths that are multiples of 128. `"xla"` and `"cudnn"`
        are those of `jax.nn.dot_product_attention`. `"auto"` is `"cudnn"` in a process whose
        JAX runs on CUDA, for 16-bit types and head widths that cuDNN takes, and `"blocked"`
        otherwise; a program for a GPU that is absent states `"cudnn"` itself.

    Returns:
      [batch, length, heads, head_dim] in the dtype of the queries.

    It is the region `"attention"`: a strategy that splits the length carries it out itself.
    """
    carried = overridable("attention", _attention)
    return carried(q_BTNH, k_BSKH, v_BSKH, segment_ids, causal, implementation)


def _attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids: jax.Array | None,
    causal: bool,
    implementation: str,
) -> jax.Array:
    if implementation == "auto":
        implementation = "cudnn" if _cudnn_serves(q_BTNH) else "blocked"
    if implementation == "splash":
        # Importing Pallas takes longer than all of this package.
        from ._splash import splash

        return splash(q_BTNH, k_BSKH, v_BSKH, segment_ids, causal)
    if implementation == "blocked":
        return _blocked(q_BTNH, k_BSKH, v_BSKH, segment_ids, causal)
    return _library(q_BTNH, k_BSKH, v_BSKH, segment_ids, causal, implementation)


def _library(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids: jax.Array | None,
    causal: bool,
    implementation: str,
) -> jax.Array:
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask, is_causal=causal, implementation=implementation
    )


def _cudnn_serves(q_BTNH: jax.Array) -> bool:
    half = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
    fits = q_BTNH.shape[-1] % 8 == 0 and q_BTNH.shape[-1] <= 128
    return half and fits and "cuda" in get_backend().platform_version


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids: jax.Array | None,
    causal: bool,
) -> jax.Array:
    """Attention whose backward pass keeps its inputs, its output and one number per query."""
    return _blocked_forward(q_BTNH, k_BSKH, v_BSKH, segment_ids, causal)[0]


def _blocked_fwd(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids: jax.Array | None,
    causal: bool,
) -> tuple[jax.Array, Residuals]:
    inputs = (q_BTNH, k_BSKH, v_BSKH, segment_ids)
    # Under the name of the output, so that a policy which keeps one keeps both.
    out, lse = checkpoint_name(_blocked_forward(*inputs, causal), "attn_mix")
    return out, (*inputs, out, lse)


def _blocked_bwd(causal: bool, saved: Residuals, g_BTNH: jax.Array) -> Residuals:
    return *_blocked_backward(*saved, g_BTNH, causal), None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def _blocks(queries: int) -> list[tuple[int, int]]:
    """Bounds of the query blocks: at most `_MAX_BLOCKS`, none below `_MIN_BLOCK` but the last."""
    size = max(_MIN_BLOCK, -(-queries // _MAX_BLOCKS))
    return [(start, min(start + size, queries)) for start in range(0, queries, size)]


def _grouped(q_BTNH: jax.Array, key_heads: int) -> jax.Array:
    """[B, T, N, H] as [B, K, G, T, H]: products batch over B and K, and K, V stay unrepeated."""
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, key_heads, N // key_heads, H).transpose(0, 2, 3, 1, 4)


def _ungrouped(x_BKGTH: jax.Array) -> jax.Array:
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _scores(
    q_BKGtH: jax.Array,
    k_BKsH: jax.Array,
    segment_ids: jax.Array | None,
    bounds: tuple[int, int],
    causal: bool,
) -> jax.Array:
    """f32[B, K, G, t, s]: masked logits of one query block against the keys it may see."""
    start, stop = bounds
    keys = k_BKsH.shape[2]
    s = jnp.einsum("bkgth,bksh->bkgts", q_BKGtH, k_BKsH, preferred_element_type=jnp.float32)
    s = s * q_BKGtH.shape[-1] ** -0.5
    if causal:
        seen = jnp.arange(start, stop)[:, None] >= jnp.arange(keys)[None, :]
        s = jnp.where(seen, s, _MASKED)
    if segment_ids is not None:
        same = segment_ids[:, start:stop, None] == segment_ids[:, None, :keys]
        s = jnp.where(same[:, None, None], s, _MASKED)
    return s


def _blocked_forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids: jax.Array | None,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns the output and f32[B, T, N], the logarithm of each query's softmax sum."""
    q = _grouped(q_BTNH, k_BSKH.shape[2])
    k, v = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    outs, sums = [], []
    for start, stop in _blocks(q.shape[3]):
        end = stop if causal else k.shape[2]
        s = _scores(q[:, :, :, start:stop], k[:, :, :end], segment_ids, (start, stop), causal)
        top = s.max(-1, keepdims=True)
        p = jnp.exp(s - top)
        total = p.sum(-1, keepdims=True)
        mixed = jnp.einsum(
            "bkgts,bksh->bkgth",
            p.astype(v.dtype),
            v[:, :, :end],
            preferred_element_type=jnp.float32,
        )
        outs.append((mixed / total).astype(q.dtype))
        sums.append(top + jnp.log(total))
    return _ungrouped(jnp.concatenate(outs, 3)), _ungrouped(jnp.concatenate(sums, 3))[..., 0]


def _blocked_backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids: jax.Array | None,
    out_BTNH: jax.Array,
    lse_BTN: jax.Array,
    g_BTNH: jax.Array,
    causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v; each block's softmax is computed again from `lse`."""
    kinds, heads = (q_BTNH.dtype, k_BSKH.dtype, v_BSKH.dtype), k_BSKH.shape[2]
    q, g = _grouped(q_BTNH, heads), _grouped(g_BTNH, heads)
    k, v = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    lse = _grouped(lse_BTN[..., None], heads)
    delta = (out_BTNH.astype(jnp.float32) * g_BTNH).sum(-1, keepdims=True)
    delta = _grouped(delta, heads)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for start, stop in _blocks(q.shape[3]):
        end = stop if causal else k.shape[2]
        block = (slice(None),) * 3 + (slice(start, stop),)
        with recomputed():
            s = _scores(q[block], k[:, :, :end], segment_ids, (start, stop), causal)
        p = jnp.exp(s - lse[block])
        dp = product("bkgth,bksh->bkgts", g[block], v[:, :, :end])
        ds = (p * (dp - delta[block]) * q.shape[-1] ** -0.5).astype(q.dtype)
        dq.append(product("bkgts,bksh->bkgth", ds, k[:, :, :end]))
        dk = dk.at[:, :, :end].add(product("bkgts,bkgth->bksh", ds, q[block]))
        dv = dv.at[:, :, :end].add(product("bkgts,bkgth->bksh", p.astype(g.dtype), g[block]))
    dk, dv = dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3)
    grads = (_ungrouped(jnp.concatenate(dq, 3)), dk, dv)
    return tuple(x.astype(kind) for x, kind in zip(grads, kinds, strict=True))
