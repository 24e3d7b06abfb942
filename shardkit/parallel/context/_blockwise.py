"""Attention of some queries on some keys, and how such parts join: the work between exchanges.

Dims: B rows, K key heads, G query heads that share one of them, T queries, S keys, H head width.

A part is what softmax attention gives on a subset of the keys, with the logarithm of its softmax
sum; two parts on disjoint keys join exactly (`merge`, arXiv:2112.05682). Queries and keys are cut
into tiles, and only the pairs of tiles that a causal mask leaves are visited, one after another:
no array grows with the product of the lengths, and what is hidden costs nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ...nn._blockwise import attend_block, backward_block

Part = tuple[jax.Array, jax.Array]
Gradients = tuple[jax.Array, jax.Array, jax.Array]
Ids = tuple[jax.Array, jax.Array] | None

# A tile's logits are f32[B, K, G, 512, 512]: 1 MiB a head, and wide enough for a matrix unit.
_WIDEST, _NARROWEST = 512, 64


def attend(q: jax.Array, k: jax.Array, v: jax.Array, ids: Ids, causal: bool) -> Part:
    """Returns softmax(q kᵀ / √H + mask) v, and the logarithm of each query's softmax sum.

    Args:
      q: [B, K, G, T, H].
      k: [B, K, S, H].
      v: [B, K, S, H].
      ids: segments of the queries i32[B, T] and of the keys i32[B, S], or None.
      causal: whether query t sees the keys 0 … t alone; then S = T.

    Returns:
      f32[B, K, G, T, H] and f32[B, K, G, T].
    """
    tiles = _Tiles(q.shape[3], k.shape[2], causal)
    q, ids, pairs = _held(q, ids, tiles.pairs)

    def visit(part: Part, pair: jax.Array) -> tuple[Part, None]:
        i, j = pair
        q_tile, k_tile, v_tile = tiles.rows(q, i), tiles.keys(k, j), tiles.keys(v, j)
        tile = attend_block(q_tile, k_tile, v_tile, tiles.ids(ids, i, j), tiles.seen(i, j))
        out, lse = part
        so_far = tiles.rows(out, i), tiles.rows(lse, i)
        new_out, new_lse = merge(so_far, tile)
        return (tiles.put(out, i, new_out), tiles.put(lse, i, new_lse)), None

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
    return jax.lax.scan(visit, nothing, pairs)[0]


def merge(one: Part, other: Part) -> Part:
    """Joins attention on two disjoint sets of keys into attention on both, in f32."""
    lse = jnp.logaddexp(one[1], other[1])
    first, second = (jnp.exp(part[1] - lse)[..., None] * part[0] for part in (one, other))
    return first + second, lse


def attend_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: Ids,
    causal: bool,
    lse: jax.Array,
    delta: jax.Array,
    g: jax.Array,
) -> Gradients:
    """Returns what these keys add to the gradients of q, k and v, each in f32.

    Args:
      q: as for `attend`, and so k, v, ids and causal.
      k: [B, K, S, H].
      v: [B, K, S, H].
      ids: segments of queries and keys, or None.
      causal: whether query t sees the keys 0 … t alone.
      lse: f32[B, K, G, T], of the softmax over all keys, these and others.
      delta: f32[B, K, G, T], sum over H of output times its cotangent.
      g: [B, K, G, T, H], cotangent of the output over all keys.
    """
    tiles = _Tiles(q.shape[3], k.shape[2], causal)
    q, ids, pairs = _held(q, ids, tiles.pairs)

    def visit(sums: Gradients, pair: jax.Array) -> tuple[Gradients, None]:
        i, j = pair
        q_tile, g_tile = tiles.rows(q, i), tiles.rows(g, i)
        k_tile, v_tile = tiles.keys(k, j), tiles.keys(v, j)
        masks = tiles.ids(ids, i, j), tiles.seen(i, j)
        rows = {"lse": tiles.rows(lse, i), "delta": tiles.rows(delta, i), "g": g_tile}
        d_q, d_k, d_v = backward_block(q_tile, k_tile, v_tile, *masks, **rows)
        dq, dk, dv = sums
        dq = tiles.put(dq, i, tiles.rows(dq, i) + d_q)
        dk, dv = tiles.put_keys(dk, j, d_k), tiles.put_keys(dv, j, d_v)
        return (dq, dk, dv), None

    dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    nothing = dq, dk, dv
    return jax.lax.scan(visit, nothing, pairs)[0]


class _Tiles:
    """The pairs of tiles that a mask leaves, and the tiles themselves."""

    def __init__(self, queries: int, keys: int, causal: bool) -> None:
        self.height, self.width, self.causal = _tile(queries), _tile(keys), causal
        count = queries // self.height, keys // self.width
        pairs = [(i, j) for i in range(count[0]) for j in range(count[1]) if j <= i or not causal]
        self.pairs = jnp.asarray(np.asarray(pairs, np.int32))

    def rows(self, x: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, i * self.height, self.height, 3)

    def keys(self, x: jax.Array, j: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, j * self.width, self.width, 2)

    def ids(self, ids: Ids, i: jax.Array, j: jax.Array) -> Ids:
        if ids is None:
            return None
        cut = jax.lax.dynamic_slice_in_dim
        own = cut(ids[0], i * self.height, self.height, 1)
        return own, cut(ids[1], j * self.width, self.width, 1)

    def seen(self, i: jax.Array, j: jax.Array) -> jax.Array | None:
        if not self.causal:
            return None
        query = i * self.height + jnp.arange(self.height)
        return query[:, None] >= j * self.width + jnp.arange(self.width)[None, :]

    def put(self, x: jax.Array, i: jax.Array, tile: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, tile, i * self.height, 3)

    def put_keys(self, x: jax.Array, j: jax.Array, more: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, self.keys(x, j) + more, j * self.width, 2)


def _held(q: jax.Array, ids: Ids, pairs: jax.Array) -> tuple[jax.Array, Ids, jax.Array]:
    """The same arrays, of which none is known before the queries are.

    Differentiating a scan over layers takes out of it what no layer changes. Of the loop over
    tiles that would be every tile's mask, one beside the other: the square of the length.
    """
    return jax.lax.optimization_barrier((q, ids, pairs))


def _tile(length: int) -> int:
    """The largest divisor that a tile may have, or the whole length where there is none."""
    fits = (size for size in range(_WIDEST, _NARROWEST - 1, -1) if length % size == 0)
    return length if length <= _WIDEST else next(fits, length)
