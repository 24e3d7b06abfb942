"""One decoder block as a pure function of its weights and the residual stream.

Dims: B batch, T length, E embed, N heads, K kv_heads, H head_dim, F mlp.

Logical axes of activations. The residual stream between branches is
`("batch", "residual_length", "embed")`, the input of a branch is `("batch", "length", "embed")`, so
that a strategy can split the stream over length without splitting the length that attention and
products see. Inside a branch: `("batch", "length", "heads", "head_dim")`, the same with
`"kv_heads"`, and `("batch", "length", "mlp")`. For experts see `_mixture.py`.

Names for checkpoint policies: `attn_in` and `mlp_in` (a branch's normed input, gathered if the
stream is split), `qkv` (queries, keys and values after rotation), `attn_mix` (the result of
attention), `mlp_hidden` (gate and up products), `attn_out` and `mlp_out` (what a branch adds to
the stream, reduced if its products are split).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ..nn._attention import attention
from ..nn._constrain import constrain, constrain_gradient
from ..nn._dot import project
from ..nn._remat import defer_remat
from ..nn._use_param import use_param
from ._decoder_config import Activation, DecoderConfig
from ._mixture import mixture

Rotation = tuple[jax.Array, jax.Array]

STREAM = ("batch", "residual_length", "embed")
WORK = ("batch", "length", "embed")  # inputs of a branch, and their gradients
BIASES = {"attn_out": "out_bias", "mlp_out": "down_bias"}
POST_NORMS = {"attn_out": "attn_post_norm", "mlp_out": "mlp_post_norm"}
IS_LOCAL = "is_local"
"""A constant f32[layers] beside the weights: 1 where a layer sees `config.window` keys."""


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """Returns x / √(mean(x²) + eps) · (scale + offset) over the last dim, in f32 inside."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    scale = scale.astype(jnp.float32)
    return (wide * inverse * (scale + offset if offset else scale)).astype(x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=3)
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Returns (x - mean) / √(variance + eps) · scale + bias over the last dim, in f32 inside."""
    wide = x.astype(jnp.float32)
    centered = wide - jnp.mean(wide, -1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centered * centered, -1, keepdims=True) + eps)
    scale, bias = scale.astype(jnp.float32), bias.astype(jnp.float32)
    return (centered * inverse * scale + bias).astype(x.dtype)


def rope_angles(config: DecoderConfig, length: int, local: bool = False) -> Rotation:
    """Returns cosine and sine, f32[length, 1, head_dim / 2], of each position's angles.

    Layers that see a window turn in a `local` way of their own.
    """
    c, head_dim = config, config.head_size
    own = c.local_rope_theta if local else None
    theta = c.rope_theta if own is None else own
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if c.rope_factor != 1 and own is None:
        frequency = _scale_frequencies(c, frequency)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def _scale_frequencies(c: DecoderConfig, frequency: jax.Array) -> jax.Array:
    """Divides slow frequencies by `rope_factor`, as the released code of Llama 3.1 does."""
    scaled = frequency / c.rope_factor
    if c.rope_bands is None:
        return scaled
    low, high, length = c.rope_bands
    turns = length * frequency / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * scaled + kept * frequency


def rotate(x_BTNH: jax.Array, angles: Rotation) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of every head by its position's angles (arXiv:2104.09864)."""
    cos, sin = angles
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, -1).astype(x_BTNH.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a fraction `rate` of `x` and scales up the others; returns `x` if key is None."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class DecoderBlock:
    """One block, or the norm behind all of them, with its weights."""

    config: DecoderConfig
    weights: Mapping[str, jax.Array]  # of one layer, by the names of `Layers`

    def __call__(
        self,
        x_BTE: jax.Array,
        angles: tuple[Rotation, ...],
        segment_ids: jax.Array | None = None,
        key: jax.Array | None = None,
        token_weights: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the residual stream after the block: x + attention(norm x), then + mlp(norm x).

        With experts it also returns the sums of `router_statistics`; without experts an empty dict.
        The stream is [batch, length, embed]. `angles` are results of `rope_angles` for this length:
        one for all layers, or those of global and of local ones; empty without rotation.
        `segment_ids` i32[batch, length] may be None for one segment in each row, `token_weights`
        f32[batch, length] for 1, and `key` for no dropout.
        """
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        with jax.named_scope("attention"):
            mixed = defer_remat(functools.partial(_mix, self.config), "attn_out")
            y = mixed(self.weights, x_BTE, angles, segment_ids)
            x_BTE = self.add_attention(x_BTE, y, keys[0])
        return self.add_feed_forward(x_BTE, token_weights, keys[1])

    def norm(self, name: str, x: jax.Array) -> jax.Array:
        """Applies the norm of a name, of the kind that the config declares."""
        scale, c = self.weights[name], self.config
        if c.norm == "layer":
            return layer_norm(x, scale + c.norm_offset, self.weights[f"{name}_bias"], c.norm_eps)
        return rms_norm(x, scale, c.norm_eps, c.norm_offset)

    def add_attention(
        self, x_BTE: jax.Array, y_BTE: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        """Returns the stream after the attention branch, whose last product is `y_BTE`."""
        return x_BTE + self._branch_output("attn_out", y_BTE, ("heads", "head_dim"), key)

    def add_feed_forward(
        self, x_BTE: jax.Array, token_weights: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the stream after the feed-forward branch, and the sums of `router_statistics`."""
        experts = self.config.experts is not None
        # What the last products of the branch contract.
        inner = ("mlp",) * bool(self.config.dense_width) + ("expert_mlp",) * experts
        with jax.named_scope("mlp"):
            h = self._branch_input(x_BTE, "mlp", () if self.config.experts else inner)
            y, sums = self._feed_forward(h, token_weights)
            x_BTE = x_BTE + self._branch_output("mlp_out", y, inner, key)
        return constrain(x_BTE, *STREAM), sums

    def attention_heads(
        self, x_BTE: jax.Array, angles: tuple[Rotation, ...]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries [batch, length, heads, head_dim], and keys and values with kv_heads."""
        c, h_BTE = self.config, self._branch_input(x_BTE, "attn", ("heads", "kv_heads"))
        q = self._product(h_BTE, "query", "heads", "head_dim")
        k = self._product(h_BTE, "key", "kv_heads", "head_dim")
        v = self._product(h_BTE, "value", "kv_heads", "head_dim")
        turn = self._layer_angles(angles)
        q = self._norm_and_rotate("query", q, turn)
        if c.query_scale is not None:
            q = (q * (c.query_scale * c.head_size**0.5)).astype(q.dtype)
        q = constrain(q, "batch", "length", "heads", "head_dim")
        k = self._norm_and_rotate("key", k, turn)
        k = constrain(k, "batch", "length", "kv_heads", "head_dim")
        v = constrain(v, "batch", "length", "kv_heads", "head_dim")
        return checkpoint_name((q, k, v), "qkv")

    def attend(
        self, qkv: tuple[jax.Array, jax.Array, jax.Array], segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Returns the values that each query of a row mixes, [batch, length, heads, head_dim]."""
        return attention(
            *qkv,
            causal=True,
            segment_ids=segment_ids,
            implementation=self.config.attention,
            window=self.window(qkv[0].shape[1]),
            softcap=self.config.attn_softcap,
        )

    def attention_output(self, mixed: jax.Array) -> jax.Array:
        """Returns the product of what `attend` returns, [batch, length, embed]."""
        mixed = constrain(mixed, "batch", "length", "heads", "head_dim")
        out = use_param(self.weights["out"], "heads", "head_dim", "embed")
        return constrain_gradient(project(mixed, out, 2), WORK)

    def window(self, length: int) -> int | jax.Array | None:
        """Returns how many keys a query of this layer sees; None where that is all before it."""
        c = self.config
        if c.window is None or c.window >= length:
            return None
        if not c.mixes_layers:
            return None if c.global_layers else c.window
        return jnp.where(self.weights[IS_LOCAL] > 0, c.window, length)

    def _branch_input(self, x_BTE: jax.Array, branch: str, into: tuple[str, ...]) -> jax.Array:
        # Constrained here too, so that a gather moves the norm's result and not the f32 inside it.
        h = constrain(self.norm(f"{branch}_norm", x_BTE), *STREAM)
        return checkpoint_name(constrain(h, *WORK, source=STREAM, into=into), f"{branch}_in")

    def _branch_output(
        self, name: str, y_BTE: jax.Array, partial: tuple[str, ...], key: jax.Array | None
    ) -> jax.Array:
        """Constrains what a branch adds right after the product, so that it takes one reduction.

        The bias is added after the reduction; before it, every device would add it.
        """
        y = checkpoint_name(constrain(y_BTE, *STREAM, source=WORK, partial=partial), name)
        bias = self.weights.get(BIASES[name])
        y = y if bias is None else y + bias
        y = self.norm(POST_NORMS[name], y) if self.config.post_norms else y
        return dropout(y, self.config.dropout, key)

    def _product(self, h_BTE: jax.Array, name: str, *outputs: str) -> jax.Array:
        """Multiplies with a weight [embed, *outputs], and adds its bias if it has one."""
        y: Any = project(h_BTE, use_param(self.weights[name], "embed", *outputs))
        bias = self.weights.get(f"{name}_bias")
        return y if bias is None else y + bias

    def _norm_and_rotate(self, name: str, x: jax.Array, angles: Rotation | None) -> jax.Array:
        """Applies to queries or keys what the config declares of them."""
        if self.config.qk_norm:
            heads = {"query": "heads", "key": "kv_heads"}[name]
            # One scale for all heads: its gradient is summed over their shards.
            scale = constrain(self.weights[f"{name}_norm"], "head_dim", into=(heads,))
            x = rms_norm(x, scale, self.config.norm_eps, self.config.norm_offset)
        return x if angles is None else rotate(x, angles)

    def _layer_angles(self, angles: tuple[Rotation, ...]) -> Rotation | None:
        if len(angles) < 2:
            return angles[0] if angles else None
        is_local = self.weights[IS_LOCAL] > 0
        (cos, sin), (local_cos, local_sin) = angles
        return jnp.where(is_local, local_cos, cos), jnp.where(is_local, local_sin, sin)

    def _feed_forward(
        self, h_BTE: jax.Array, token_weights: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the dense branch, the chosen experts, or the sum of both."""
        if self.config.experts is None:
            return self._dense_branch(h_BTE), {}
        y, sums = mixture(self.config, self.weights, h_BTE, token_weights)
        if self.config.dense_width:
            y = y + self._dense_branch(constrain(h_BTE, *WORK, into=("mlp",)))
        return y, sums

    def _dense_branch(self, h_BTE: jax.Array) -> jax.Array:
        names = ("gate", "up") if self.config.gated else ("up",)
        products = (self._product(h_BTE, name, "mlp") for name in names)
        wide = tuple(constrain(product, "batch", "length", "mlp") for product in products)
        gate, *up = checkpoint_name(wide, "mlp_hidden")
        down = use_param(self.weights["down"], "mlp", "embed")
        return constrain_gradient(_activated_down(self.config.activation, gate, up, down), WORK)


def _mix(
    config: DecoderConfig,
    weights: Mapping[str, jax.Array],
    x_BTE: jax.Array,
    angles: tuple[Rotation, ...],
    segment_ids: jax.Array | None,
) -> jax.Array:
    block = DecoderBlock(config, weights)
    return block.attention_output(block.attend(block.attention_heads(x_BTE, angles), segment_ids))


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def _activated_down(
    activation: Activation, gate_BTF: jax.Array, up_BTF: list[jax.Array], down: jax.Array
) -> jax.Array:
    """Activation, gate and the product after it; the array between them is cheap to recompute."""
    hidden = _ACTIVATIONS[activation](gate_BTF)
    return project(functools.reduce(jnp.multiply, up_BTF, hidden), down)


_ACTIVATIONS: Mapping[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
