"""Attention block by block, exact: some queries on some keys, and the loop over a whole sequence.

Dims: B batch, T queries, S keys, N query heads, K key heads, G = N / K query heads that share
one key head, H head width; t and s are the queries and keys of one block.

`attend_block` and `backward_block` are the mathematics of every attention of this package that is
not the library's. Two loops call them:

- `blockwise_attention`, here, unrolls over at most 8 blocks of queries, each with all the keys
  that the mask leaves. Slices are static and the partitioner may split every other dim. Its
  logits take T · S / 8 numbers a head.
- `parallel/context/_blockwise` scans over pairs of tiles of at most 512 × 512, inside
  `shard_map`, where lengths are so long that nothing may grow with their product.

Neither is good at the other's work. Forward and backward on a CPU: 4 rows of 512 tokens and 8 heads
take 89 ms of processor time and 70 MiB unrolled, 193 ms and 106 MiB in tiles, which cut 512 tokens
into one tile and so skip nothing; one row of 4096 tokens and 4 heads takes 463 ms and 452 MiB
unrolled, 311 ms and 21 MiB in tiles.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .._core.scope_markers import recomputed
from ._dot import einsum

# Few enough blocks to keep the program small, enough to skip 7/16 of a causal square.
_MAX_BLOCKS = 8
_MIN_BLOCK = 64
_MASKED = -1e30  # finite: a block may hide every key of a query, and a later one show some

Residuals = tuple[Any, ...]
SegmentIds = tuple[jax.Array, jax.Array] | None
# Segments i32[B, T], and a window i32[] that is only known when the program runs.
Hidden = tuple[jax.Array | None, jax.Array | None]


class BlockOptions(NamedTuple):
    """What the program of an attention depends on, beside its arrays."""

    causal: bool  # whether a query sees only keys at its own position and before
    window: int | None = None  # number of keys that a query sees, its own the last; None for all
    # logits become `softcap · tanh(logits / softcap)`; None leaves them
    softcap: float | None = None


def attend_block(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: SegmentIds,
    visible: jax.Array | None,
    *,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns softmax(q kᵀ / √H + mask) v over one block, and the log of each softmax sum.

    q is [B, K, G, t, H], k and v [B, K, s, H]; `ids` are segments of the queries i32[B, t] and of
    the keys i32[B, s], None for one segment; `visible` is bool[t, s], which keys each query sees,
    None for all. The results are f32[B, K, G, t, H] and f32[B, K, G, t].
    """
    s = _mask(_scores(q, k, softcap), ids, visible)
    largest = s.max(-1, keepdims=True)
    p = jnp.exp(s - largest)
    total = p.sum(-1, keepdims=True)
    mixed = einsum("bkgts,bksh->bkgth", p.astype(v.dtype), v, jnp.float32) / total
    return mixed, (largest + jnp.log(total))[..., 0]


def backward_block(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: SegmentIds,
    visible: jax.Array | None,
    *,
    lse: jax.Array,
    delta: jax.Array,
    g: jax.Array,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what one block adds to the gradients of q, and of k and v as [B, K, H, s], in f32.

    The first five arguments are as for `attend_block`. `lse` is f32[B, K, G, t], log of the softmax
    sums over all keys, of this block and others; `delta`, f32[B, K, G, t], the sum over H of the
    output times its cotangent; g, [B, K, G, t, H], the cotangent of the output over all keys.
    """
    with recomputed():
        logits = _scores(q, k, softcap)
        s = _mask(logits, ids, visible)
    p = jnp.exp(s - lse[..., None])
    dp = einsum("bkgth,bksh->bkgts", g, v, jnp.float32)
    ds = p * (dp - delta[..., None]) * q.shape[-1] ** -0.5
    if softcap is not None:
        ds = ds * (1 - (logits / softcap) ** 2)
    ds = ds.astype(q.dtype)
    dq = einsum("bkgts,bksh->bkgth", ds, k, jnp.float32)
    # XLA on CPUs writes a transposed copy of the left operand: it is the smaller one.
    dk = einsum("bkgth,bkgts->bkhs", q, ds, jnp.float32)
    dv = einsum("bkgth,bkgts->bkhs", g, p.astype(g.dtype), jnp.float32)
    return dq, dk, dv


def _scores(q: jax.Array, k: jax.Array, softcap: float | None) -> jax.Array:
    """f32[B, K, G, t, s]: logits, all of them visible."""
    s = einsum("bkgth,bksh->bkgts", q, k, jnp.float32) * q.shape[-1] ** -0.5
    return s if softcap is None else softcap * jnp.tanh(s / softcap)


def _mask(s: jax.Array, ids: SegmentIds, visible: jax.Array | None) -> jax.Array:
    if visible is not None:
        s = jnp.where(visible, s, _MASKED)
    if ids is not None:
        same = ids[0][:, :, None] == ids[1][:, None, :]
        s = jnp.where(same[:, None, None], s, _MASKED)
    return s


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, hidden: Hidden, options: BlockOptions
) -> jax.Array:
    """Attention whose backward pass keeps its inputs, its output and one number per query."""
    return _forward(q_BTNH, k_BSKH, v_BSKH, hidden, options)[0]


def _attention_fwd(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, hidden: Hidden, options: BlockOptions
) -> tuple[jax.Array, Residuals]:
    inputs = (q_BTNH, k_BSKH, v_BSKH, hidden)
    # Under the name of the output, so that a policy which keeps one keeps both.
    out, lse = checkpoint_name(_forward(*inputs, options=options), "attn_mix")
    return out, (*inputs, out, lse)


def _attention_bwd(options: BlockOptions, saved: Residuals, g_BTNH: jax.Array) -> Residuals:
    return *_backward(saved, g_BTNH, options), None


blockwise_attention.defvjp(_attention_fwd, _attention_bwd)


def query_blocks(queries: int) -> list[tuple[int, int]]:
    """Bounds of the query blocks: at most 8, none below 64 queries but the last.

    >>> query_blocks(150)
    [(0, 64), (64, 128), (128, 150)]
    """
    size = max(_MIN_BLOCK, -(-queries // _MAX_BLOCKS))
    return [(start, min(start + size, queries)) for start in range(0, queries, size)]


def _key_range(start: int, stop: int, keys: int, options: BlockOptions) -> slice:
    """Returns the keys that queries `start` … `stop` may see, as far as is known before the run."""
    first = 0 if options.window is None else max(0, start + 1 - options.window)
    return slice(first, stop if options.causal else keys)


def _masks(
    hidden: Hidden, start: int, stop: int, keys: slice, options: BlockOptions
) -> tuple[SegmentIds, jax.Array | None]:
    """What hides `keys` from queries `start` … `stop`: segments, the causal mask, the window."""
    segment_ids, window = hidden
    window = options.window if window is None else window
    ids = None if segment_ids is None else (segment_ids[:, start:stop], segment_ids[:, keys])
    positions = jnp.arange(start, stop)[:, None], jnp.arange(keys.start, keys.stop)[None, :]
    visible = positions[0] >= positions[1] if options.causal else None
    if window is not None:
        near = positions[0] - positions[1] < window
        visible = near if visible is None else visible & near
    return ids, visible


def _forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, hidden: Hidden, options: BlockOptions
) -> tuple[jax.Array, jax.Array]:
    """Returns the output and f32[B, T, N], the log of each query's softmax sum."""
    q = _group_heads(q_BTNH, k_BSKH.shape[2])
    k, v = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    outs, sums = [], []
    for start, stop in query_blocks(q.shape[3]):
        keys = _key_range(start, stop, k.shape[2], options)
        masks = _masks(hidden, start, stop, keys, options)
        block = (q[:, :, :, start:stop], k[:, :, keys], v[:, :, keys])
        out, lse = attend_block(*block, *masks, softcap=options.softcap)
        outs.append(out.astype(q.dtype))
        sums.append(lse[..., None])
    out, lse = jnp.concatenate(outs, 3), jnp.concatenate(sums, 3)
    return _ungroup_heads(out), _ungroup_heads(lse)[..., 0]


def _backward(
    saved: Residuals, g_BTNH: jax.Array, options: BlockOptions
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v; the softmax of each block is recomputed from `lse`."""
    q_BTNH, k_BSKH, v_BSKH, hidden, out_BTNH, lse_BTN = saved
    heads = k_BSKH.shape[2]
    q, g = _group_heads(q_BTNH, heads), _group_heads(g_BTNH, heads)
    k, v = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    lse = _group_heads(lse_BTN[..., None], heads)[..., 0]
    delta_BTN1 = (out_BTNH.astype(jnp.float32) * g_BTNH).sum(-1, keepdims=True)
    delta = _group_heads(delta_BTN1, heads)[..., 0]
    dqs, dk, dv = [], *(jnp.zeros(x.mT.shape, jnp.float32) for x in (k, v))
    for start, stop in query_blocks(q.shape[3]):
        keys = _key_range(start, stop, k.shape[2], options)
        block = (slice(None),) * 3 + (slice(start, stop),)
        masks = _masks(hidden, start, stop, keys, options)
        rows = {"lse": lse[block], "delta": delta[block], "g": g[block]}
        inputs = (q[block], k[:, :, keys], v[:, :, keys])
        d_q, d_k, d_v = backward_block(*inputs, *masks, **rows, softcap=options.softcap)
        dqs.append(d_q)
        dk, dv = dk.at[..., keys].add(d_k), dv.at[..., keys].add(d_v)
    dq = _ungroup_heads(jnp.concatenate(dqs, 3))
    dk, dv = dk.transpose(0, 3, 1, 2), dv.transpose(0, 3, 1, 2)
    return dq.astype(q_BTNH.dtype), dk.astype(k_BSKH.dtype), dv.astype(v_BSKH.dtype)


def _group_heads(q_BTNH: jax.Array, key_heads: int) -> jax.Array:
    """[B, T, N, H] as [B, K, G, T, H]: products batch over B and K, and K, V stay unrepeated."""
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, key_heads, N // key_heads, H).transpose(0, 2, 3, 1, 4)


def _ungroup_heads(x_BKGTH: jax.Array) -> jax.Array:
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)
