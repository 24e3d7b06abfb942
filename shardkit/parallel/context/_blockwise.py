"""Attention of some queries to some keys, and how two such results merge.

Dims: B rows, K key heads, G query heads that share one of them, T queries, S keys, H head width.

A `Partial` is softmax attention over a subset of the keys, with the logarithm of its softmax sum;
two partials over disjoint keys merge exactly (`merge`, arXiv:2112.05682). Queries and keys are cut
into tiles, and only the pairs of tiles that a causal mask leaves visible are computed, one after
another: no array grows with the product of the lengths, and hidden tiles cost nothing. What is
computed of a pair are the formulas of `nn/_blockwise`, which also says why there are two loops.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...nn._blockwise import BlockOptions, SegmentIds, attend_block, backward_block

Partial = tuple[jax.Array, jax.Array]
Gradients = tuple[jax.Array, jax.Array, jax.Array]
# Queries, keys, values, segments of both and which keys each query sees, of two tiles.
Block = tuple[jax.Array, jax.Array, jax.Array, SegmentIds, jax.Array | None]

# A tile's logits are f32[B, K, G, 512, 512]: 1 MiB a head, and wide enough for a matrix unit.
_WIDEST, _NARROWEST = 512, 64


class Queries(NamedTuple):
    """Queries [B, K, G, T, H]; their segments and first visible positions, i32[B, T] or None."""

    q: jax.Array
    ids: jax.Array | None
    first: jax.Array | None


class Keys(NamedTuple):
    """Keys and values [B, K, S, H]; their segments and positions, i32[B, S] or None.

    Positions are the same in every row.
    """

    k: jax.Array
    v: jax.Array
    ids: jax.Array | None
    positions: jax.Array | None


class Cotangents(NamedTuple):
    """What the backward pass knows of each query, from the softmax over all keys."""

    lse: jax.Array  # f32[B, K, G, T], logarithm of the softmax sum
    delta: jax.Array  # f32[B, K, G, T], sum over H of the output times its cotangent
    g: jax.Array  # [B, K, G, T, H], cotangent of the output


def attend(queries: Queries, keys: Keys, options: BlockOptions) -> Partial:
    """Returns softmax(q kᵀ / √H + mask) v, and the logarithm of each query's softmax sum.

    Of T queries and S keys that is f32[B, K, G, T, H] and f32[B, K, G, T]. Causal, query t sees the
    keys 0 … t alone, and S = T.
    """
    tiles = _Tiles(queries.q.shape[3], keys.k.shape[2], options.causal)
    queries, keys, pairs = _order_after_queries(queries, keys, tiles.pairs)

    def visit(partial: Partial, pair: jax.Array) -> tuple[Partial, None]:
        i, j = pair
        block = tiles.block(queries, keys, i, j)
        tile = attend_block(*block, softcap=options.softcap)
        return tiles.set_queries(partial, i, merge(tiles.queries(partial, i), tile)), None

    q = queries.q
    empty = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
    return jax.lax.scan(visit, empty, pairs)[0]


def merge(a: Partial, b: Partial) -> Partial:
    """Merges attention over two disjoint sets of keys into attention over both, in f32."""
    lse = jnp.logaddexp(a[1], b[1])
    first, second = (jnp.exp(part[1] - lse)[..., None] * part[0] for part in (a, b))
    return first + second, lse


def attend_backward(
    queries: Queries, keys: Keys, cotangents: Cotangents, options: BlockOptions
) -> Gradients:
    """Returns what these keys add to the gradients of q, k and v, each in f32.

    They are some of the keys that the softmax of the cotangents is over.
    """
    tiles = _Tiles(queries.q.shape[3], keys.k.shape[2], options.causal)
    queries, keys, pairs = _order_after_queries(queries, keys, tiles.pairs)

    def visit(grads: Gradients, pair: jax.Array) -> tuple[Gradients, None]:
        i, j = pair
        block, rows = tiles.block(queries, keys, i, j), tiles.queries(cotangents, i)._asdict()
        dq, dk, dv = backward_block(*block, **rows, softcap=options.softcap)
        sums = tiles.add_queries(grads[0], i, dq), tiles.add_keys(grads[1], j, dk.mT)
        return (*sums, tiles.add_keys(grads[2], j, dv.mT)), None

    dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (queries.q, keys.k, keys.v))
    return jax.lax.scan(visit, (dq, dk, dv), pairs)[0]


class _Tiles:
    """The pairs of tiles that a mask leaves visible, and slices of arrays by tile.

    Six queries, six keys, tiles of two, causal: 6 of the 9 pairs (i, j) are computed.

        (0,0)   .     .
        (1,0) (1,1)   .
        (2,0) (2,1) (2,2)
    """

    def __init__(self, queries: int, keys: int, causal: bool) -> None:
        self.height, self.width, self.causal = _tile_size(queries), _tile_size(keys), causal
        rows, columns = queries // self.height, keys // self.width
        pairs = [(i, j) for i in range(rows) for j in range(columns) if j <= i or not causal]
        self.pairs = jnp.asarray(np.asarray(pairs, np.int32))

    def queries(self, tree: Any, i: jax.Array) -> Any:
        return _slice_length(tree, i * self.height, self.height, 3)

    def keys(self, tree: Any, j: jax.Array) -> Any:
        return _slice_length(tree, j * self.width, self.width, 2)

    def set_queries(self, tree: Any, i: jax.Array, tile: Any) -> Any:
        update = jax.lax.dynamic_update_slice_in_dim
        return jax.tree.map(lambda x, y: update(x, y, i * self.height, 3), tree, tile)

    def add_queries(self, x: jax.Array, i: jax.Array, tile: jax.Array) -> jax.Array:
        return self.set_queries(x, i, self.queries(x, i) + tile)

    def add_keys(self, x: jax.Array, j: jax.Array, tile: jax.Array) -> jax.Array:
        total = self.keys(x, j) + tile
        return jax.lax.dynamic_update_slice_in_dim(x, total, j * self.width, 2)

    def block(self, queries: Queries, keys: Keys, i: jax.Array, j: jax.Array) -> Block:
        """One pair of tiles, as the formulas of a block take it."""
        queries, keys = self.queries(queries, i), self.keys(keys, j)
        visible = ids = None
        if self.causal:
            query = i * self.height + jnp.arange(self.height)
            visible = query[:, None] >= j * self.width + jnp.arange(self.width)[None, :]
        if queries.first is not None and keys.positions is not None:
            near = keys.positions[0][None, :] >= queries.first[0][:, None]
            visible = near if visible is None else visible & near
        if queries.ids is not None and keys.ids is not None:
            ids = queries.ids, keys.ids
        return queries.q, keys.k, keys.v, ids, visible


def _slice_length(tree: Any, start: jax.Array, size: int, dim: int) -> Any:
    """Slices the length of arrays: `dim` of what has heads, dim 1 of segments."""

    def cut(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size, 1 if x.ndim == 2 else dim)

    return jax.tree.map(cut, tree)


def _order_after_queries(
    queries: Queries, keys: Keys, pairs: jax.Array
) -> tuple[Queries, Keys, jax.Array]:
    """Makes masks and pairs of tiles depend on the queries, so that they stay in the loop.

    Differentiating a scan over layers hoists out of it whatever no layer changes. Of the loop over
    tiles that would be the masks of all tiles, side by side: the square of the length.
    """
    masks = keys.ids, keys.positions
    queries, (ids, positions), pairs = jax.lax.optimization_barrier((queries, masks, pairs))
    return queries, keys._replace(ids=ids, positions=positions), pairs


def _tile_size(length: int) -> int:
    """The largest divisor of the length from 64 to 512; else the whole length."""
    divisors = (size for size in range(_WIDEST, _NARROWEST - 1, -1) if length % size == 0)
    return length if length <= _WIDEST else next(divisors, length)
