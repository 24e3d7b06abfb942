"""The decoder with a cache of keys and values: a whole prompt once, then one token at a time.

Dims: B rows, T tokens of the prompt, S positions of the cache, E embed, N heads, K kv_heads,
G queries of each of these, H head_dim.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..nn._constrain import constrain
from ..nn._dot import einsum
from ._block import DecoderBlock
from ._decoder import Decoder

_CACHE = ("batch", "length", "kv_heads", "head_dim")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValueCache:
    """Keys after rotation, and values, of the positions of each row so far."""

    keys: jax.Array  # [layers, rows, positions, kv_heads, head_dim]
    values: jax.Array  # the same


def fill_cache(
    model: Decoder, tokens_BT: jax.Array, last_B: jax.Array, size: int
) -> tuple[jax.Array, KeyValueCache]:
    """Computes whole prompts i32[rows, length], as the model does in evaluation mode.

    `last_B` i32[rows] is the index of each prompt's last token; what is behind is ignored. `size`
    is the number of positions of the cache, at least `length`. Returns logits of the token behind
    each prompt, f32[rows, vocab], and the cache.
    """
    room = size - tokens_BT.shape[1]
    angles = model.angles(tokens_BT.shape[1])

    def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, KeyValueCache]:
        block = DecoderBlock(model.config, weights)
        qkv = block.attention_heads(x, angles)
        y = block.attention_output(block.attend(qkv))
        kept = (jnp.pad(part, ((0, 0), (0, room), (0, 0), (0, 0))) for part in qkv[1:])
        x, _ = block.add_feed_forward(block.add_attention(x, y))
        return x, KeyValueCache(*(constrain(part, *_CACHE) for part in kept))

    outer = model.outer_params()
    x = model.embed(outer, {"inputs": tokens_BT})
    x, cache = jax.lax.scan(layer, x, model.layer_params())
    last = jnp.take_along_axis(model.hidden(outer, x), last_B[:, None, None], axis=1)
    return model.logits(last[:, 0]), cache


def extend_cache(
    model: Decoder, token_B: jax.Array, at_B: jax.Array, cache: KeyValueCache
) -> tuple[jax.Array, KeyValueCache]:
    """Computes one token i32[rows] of each row, as the model does in evaluation mode.

    `at_B` i32[rows] is the position of each token, below the size of the cache; positions before it
    are filled. Returns logits of the tokens behind them, f32[rows, vocab], and the cache with these
    tokens.
    """
    size = cache.keys.shape[2]
    angles = tuple((cos[at_B][:, None], sin[at_B][:, None]) for cos, sin in model.angles(size))
    # A comparison instead of an index: rows and heads stay on the devices that have them.
    is_here = (jnp.arange(size) == at_B[:, None])[:, :, None, None]

    def layer(x: jax.Array, inputs: tuple[Any, KeyValueCache]) -> tuple[jax.Array, KeyValueCache]:
        weights, old = inputs
        block = DecoderBlock(model.config, weights)
        q, k, v = block.attention_heads(x, angles)
        keys = constrain(jnp.where(is_here, k, old.keys), *_CACHE)
        values = constrain(jnp.where(is_here, v, old.values), *_CACHE)
        mixed = _attend_to_cache(block, q, (keys, values), at_B)
        x = block.add_attention(x, block.attention_output(mixed))
        return block.add_feed_forward(x)[0], KeyValueCache(keys, values)

    outer = model.outer_params()
    x = model.embed(outer, {"inputs": token_B[:, None], "positions": at_B[:, None]})
    x, cache = jax.lax.scan(layer, x, (model.layer_params(), cache))
    return model.logits(model.hidden(outer, x)[:, 0]), cache


def _attend_to_cache(
    block: DecoderBlock, q_BTNH: jax.Array, cache: tuple[jax.Array, jax.Array], at_B: jax.Array
) -> jax.Array:
    """Softmax over the positions that one query of each row sees, in f32."""
    config = block.config
    keys, values = (part.astype(jnp.float32) for part in cache)
    rows, _, heads, width = q_BTNH.shape
    q = q_BTNH.astype(jnp.float32).reshape(rows, config.key_heads, config.group, width)
    logits = einsum("bkgh,bskh->bkgs", q, keys) * width**-0.5
    if config.attn_softcap is not None:
        logits = config.attn_softcap * jnp.tanh(logits / config.attn_softcap)
    size = keys.shape[1]
    distance = at_B[:, None] - jnp.arange(size)
    window = block.window(size)
    seen = (distance >= 0) & (True if window is None else distance < window)
    logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    mixed = einsum("bkgs,bskh->bkgh", jax.nn.softmax(logits), values)
    return mixed.reshape(rows, 1, heads, width).astype(q_BTNH.dtype)
