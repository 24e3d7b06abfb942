"""Softmax cross entropy from hidden states, one chunk of the logits at a time.

Dims: B batch, T length, E embed, V vocab, C chunks of the vocabulary, S = V / C.

Chunk c has the tokens {s · C + c}: every C-th column. With V = 12, C = 3 and two devices:

    token      0 1 2 3 4 5 | 6 7 8 9 10 11      device 0 | device 1
    chunk      0 1 2 0 1 2 | 0 1 2 0  1  2      every chunk has columns on both devices

A reshape V → [S, C] keeps a split of V on S, so nothing is gathered; contiguous chunks would each
be on one device. Selecting the label's logit sums f32[batch, length] over the devices; in the
gradient it is a comparison. Inside `shard_map` the summaries of shards are combined like those of
chunks.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._core.scope_markers import recomputed
from ..nn._constrain import constrain
from ..nn._dot import einsum, matmul, weight_gradient
from ..nn._manual_axis_rules import pmax, psum, shard_offset

Summary = tuple[jax.Array, jax.Array, jax.Array]


_NEVER = -1e30  # finite: a shard of the vocabulary may have padding alone


class LogitRule(NamedTuple):
    """What becomes of the product of hidden states and table."""

    # logits become `softcap · tanh(logits / softcap)`; None leaves them
    softcap: float | None = None
    # number of tokens; the logits of further columns of the table are -1e30. None: all are tokens.
    vocab: int | None = None

    def apply(self, logits: jax.Array, columns: jax.Array | None = None) -> jax.Array:
        """The logits f32[..., columns] of a product; `columns` are their numbers in the table."""
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        if self.vocab is None:
            return logits
        columns = jnp.arange(logits.shape[-1]) if columns is None else columns
        return jnp.where(columns < self.vocab, logits, _NEVER)

    def gradient(self, g: jax.Array, logits: jax.Array) -> jax.Array:
        """The gradient of the product from that of logits f32[..., columns], made by `apply`."""
        if self.softcap is None:
            return g
        inner = jnp.maximum(logits, -self.softcap)  # of padding too
        return g * (1 - (inner / self.softcap) ** 2)


PLAIN = LogitRule()


def cross_entropy(
    hidden_BTE: jax.Array,
    table_EV: jax.Array,
    targets_BT: jax.Array,
    chunks: int,
    rule: LogitRule = PLAIN,
) -> Summary:
    """Returns each token's logsumexp, label logit and largest logit, f32[batch, length] each.

    `lse - label` is the loss of a token in nats; no gradient flows through the largest logit. The
    backward pass recomputes the logits chunk by chunk; with one chunk it keeps them instead. Hidden
    states are [batch, length, embed], the table [embed, vocab], targets i32[batch, length];
    `chunks` divides the vocabulary. The rule is what becomes of the logits.
    """
    E, V = table_EV.shape
    table_CES = table_EV.reshape(E, V // chunks, chunks).transpose(2, 0, 1)
    local_BT = targets_BT - shard_offset("vocab", V)
    return _summary(hidden_BTE, constrain(table_CES, None, "embed", "vocab"), local_BT, rule)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _summary(
    hidden_BTE: jax.Array, table_CES: jax.Array, targets_BT: jax.Array, rule: LogitRule
) -> Summary:
    return _summary_fwd(hidden_BTE, table_CES, targets_BT, rule)[0]


def _summary_fwd(
    hidden_BTE: jax.Array, table_CES: jax.Array, targets_BT: jax.Array, rule: LogitRule
) -> tuple[Summary, tuple[Any, ...]]:
    chunks = table_CES.shape[0]
    if chunks == 1:
        saved_logits = _logits(hidden_BTE, table_CES[0], rule, chunks, 0)
        top, total, label = _summarize(saved_logits, targets_BT, 1, 0)
    else:
        saved_logits = None

        def body(carry: Summary, chunk: tuple[jax.Array, jax.Array]) -> tuple[Summary, None]:
            index, table_ES = chunk
            logits = _logits(hidden_BTE, table_ES, rule, chunks, index)
            return _combine(carry, _summarize(logits, targets_BT, chunks, index)), None

        zeros = jnp.zeros_like(targets_BT, jnp.float32)
        start = (zeros - jnp.inf, zeros, zeros)
        (top, total, label), _ = jax.lax.scan(body, start, (jnp.arange(chunks), table_CES))
    top, total, label = _combine_shards(top, total, label)
    lse = top + jnp.log(total)
    return (lse, label, top), (hidden_BTE, table_CES, targets_BT, lse, saved_logits)


def _summary_bwd(
    rule: LogitRule, saved: tuple[Any, ...], grads: Summary
) -> tuple[jax.Array, jax.Array, None]:
    """Computes gradients of the logits chunk by chunk, then one product each for hidden and table.

    The gradients of all chunks are kept, in the dtype of hidden. A running f32 sum of products per
    chunk would need as much memory, and be reduced in f32 if the vocabulary is split.
    """
    hidden_BTE, table_CES, targets_BT, lse, saved_logits = saved
    g_lse, g_label, _ = (g[..., None] for g in grads)
    chunks = table_CES.shape[0]

    def logits_gradient(logits: jax.Array, index: jax.Array | int) -> jax.Array:
        is_label = _is_label(logits, targets_BT, chunks, index)
        g_logits = g_lse * jnp.exp(logits - lse[..., None]) + jnp.where(is_label, g_label, 0)
        g_logits = rule.gradient(g_logits, logits)
        return constrain(g_logits.astype(hidden_BTE.dtype), "batch", "length", "vocab")

    if chunks == 1:
        g_BTS = logits_gradient(saved_logits, 0)
        g_hidden = einsum("bts,es->bte", g_BTS, table_CES[0])
        return g_hidden, weight_gradient(hidden_BTE, g_BTS)[None], None

    def body(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        index, table_ES = chunk
        with recomputed():
            logits = _logits(hidden_BTE, table_ES, rule, chunks, index)
        return None, logits_gradient(logits, index)

    _, g_CBTS = jax.lax.scan(body, None, (jnp.arange(chunks), table_CES))
    g_hidden = einsum("cbts,ces->bte", g_CBTS, table_CES)
    g_table = einsum("bte,cbts->ces", hidden_BTE, g_CBTS)
    return g_hidden, g_table, None


_summary.defvjp(_summary_fwd, _summary_bwd)


def _logits(
    hidden_BTE: jax.Array, table_ES: jax.Array, rule: LogitRule, chunks: int, index: jax.Array | int
) -> jax.Array:
    logits = matmul(hidden_BTE, table_ES, jnp.float32)
    logits = constrain(logits, "batch", "length", "vocab")
    if rule == PLAIN:
        return logits
    size = table_ES.shape[1]
    columns = jnp.arange(size) * chunks + index + shard_offset("vocab", size * chunks)
    return rule.apply(logits, columns)


def _is_label(
    logits: jax.Array, targets_BT: jax.Array, chunks: int, index: jax.Array | int
) -> jax.Array:
    """Returns bool[batch, length, S]: the columns of this chunk that are labels."""
    return targets_BT[..., None] == jnp.arange(logits.shape[-1]) * chunks + index


def _summarize(
    logits: jax.Array, targets_BT: jax.Array, chunks: int, index: jax.Array | int
) -> Summary:
    """Returns largest logit, Σ exp(logit - largest), and the label's logit or 0, of one chunk."""
    top = logits.max(-1)
    total = jnp.exp(logits - top[..., None]).sum(-1)
    label = jnp.where(_is_label(logits, targets_BT, chunks, index), logits, 0).sum(-1)
    return top, total, label


def _combine(a: Summary, b: Summary) -> Summary:
    """Combines the summaries of two parts of the vocabulary."""
    top = jnp.maximum(a[0], b[0])
    total = a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)
    return top, total, a[2] + b[2]


def _combine_shards(top: jax.Array, total: jax.Array, label: jax.Array) -> Summary:
    """Combines the summaries of all shards of the vocabulary."""
    largest = pmax(top, "vocab")
    scaled = total * jnp.exp(top - largest)
    return largest, psum(scaled, "vocab"), psum(label, "vocab")
