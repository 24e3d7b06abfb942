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

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ..nn._attention import attention
from ..nn._constrain import constrain, constrain_gradient
from ..nn._dot import project
from ..nn._remat import defer_remat
from ..nn._use_param import use_param
from ._decoder_config import DecoderConfig
from ._mixture import mixture

Rotation = tuple[jax.Array, jax.Array]

STREAM = ("batch", "residual_length", "embed")
WORK = ("batch", "length", "embed")  # inputs of a branch, and their gradients
BIASES = {"attn_out": "out_bias", "mlp_out": "down_bias"}


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Returns x / √(mean(x²) + eps) · scale over the last dim, in f32 inside."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def rope_angles(length: int, head_dim: int, theta: float) -> Rotation:
    """Returns cosine and sine, f32[length, 1, head_dim / 2], of each position's angles."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


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


def block(
    config: DecoderConfig,
    weights: Mapping[str, jax.Array],
    x_BTE: jax.Array,
    angles: Rotation,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
    token_weights: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the residual stream after one block: x + attention(norm x), then + mlp(norm x).

    With experts it also returns the sums of `router_statistics`; without experts an empty dict.

    Args:
      config: the decoder's sizes.
      weights: arrays of one layer, by the names of `Layers`.
      x_BTE: residual stream, [batch, length, embed].
      angles: result of `rope_angles` for this length.
      segment_ids: i32[batch, length]; None if every row is one segment.
      key: draws dropout; None for no dropout.
      token_weights: f32[batch, length], weight of each token in losses; None for 1.
    """
    keys = (None, None) if key is None else tuple(jax.random.split(key))
    with jax.named_scope("attention"):
        mixed = defer_remat(functools.partial(_mix, config), "attn_out")
        y = mixed(weights, x_BTE, angles, segment_ids)
        x_BTE = x_BTE + _branch_output(
            config, weights, "attn_out", y, partial=("heads", "head_dim"), key=keys[0]
        )
    with jax.named_scope("mlp"):
        inner = _inner(config)
        into = () if config.experts else inner
        h = _branch_input(config, x_BTE, weights["mlp_norm"], "mlp_in", into)
        y, sums = _feed_forward(config, weights, h, token_weights)
        x_BTE = x_BTE + _branch_output(config, weights, "mlp_out", y, partial=inner, key=keys[1])
    return constrain(x_BTE, *STREAM), sums


def _inner(config: DecoderConfig) -> tuple[str, ...]:
    """Returns the logical axes that the last products of the feed-forward branch contract."""
    chosen = () if config.experts is None else ("expert_mlp",)
    return (*(("mlp",) if config.dense_width else ()), *chosen)


def _mix(
    config: DecoderConfig,
    weights: Mapping[str, jax.Array],
    x_BTE: jax.Array,
    angles: Rotation,
    segment_ids: jax.Array | None,
) -> jax.Array:
    into = ("heads", "kv_heads")
    h = _branch_input(config, x_BTE, weights["attn_norm"], "attn_in", into)
    return _attend(config, weights, h, angles, segment_ids)


def _branch_input(
    config: DecoderConfig, x_BTE: jax.Array, scale: jax.Array, name: str, into: tuple[str, ...]
) -> jax.Array:
    # Constrained here too, so that a gather moves the norm's result and not the f32 inside it.
    h = constrain(rms_norm(x_BTE, scale, config.norm_eps), *STREAM)
    return checkpoint_name(constrain(h, *WORK, source=STREAM, into=into), name)


def _branch_output(
    config: DecoderConfig,
    weights: Mapping[str, jax.Array],
    name: str,
    y_BTE: jax.Array,
    *,
    partial: tuple[str, ...],
    key: jax.Array | None,
) -> jax.Array:
    """Constrains what a branch adds right after the product, so that it takes one reduction.

    The bias is added after the reduction; before it, every device would add it.
    """
    y = checkpoint_name(constrain(y_BTE, *STREAM, source=WORK, partial=partial), name)
    bias = weights.get(BIASES[name])
    return dropout(y if bias is None else y + bias, config.dropout, key)


def _product(
    h_BTE: jax.Array, weights: Mapping[str, jax.Array], name: str, *outputs: str
) -> jax.Array:
    """Multiplies with a weight [embed, *outputs], and adds its bias if it has one."""
    y: Any = project(h_BTE, use_param(weights[name], "embed", *outputs))
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias


def _attend(
    config: DecoderConfig,
    weights: Mapping[str, jax.Array],
    h_BTE: jax.Array,
    angles: Rotation,
    segment_ids: jax.Array | None,
) -> jax.Array:
    q = _product(h_BTE, weights, "query", "heads", "head_dim")
    k = _product(h_BTE, weights, "key", "kv_heads", "head_dim")
    v = _product(h_BTE, weights, "value", "kv_heads", "head_dim")
    q = constrain(rotate(q, angles), "batch", "length", "heads", "head_dim")
    k = constrain(rotate(k, angles), "batch", "length", "kv_heads", "head_dim")
    v = constrain(v, "batch", "length", "kv_heads", "head_dim")
    q, k, v = checkpoint_name((q, k, v), "qkv")
    mixed = attention(
        q, k, v, causal=True, segment_ids=segment_ids, implementation=config.attention
    )
    mixed = constrain(mixed, "batch", "length", "heads", "head_dim")
    out = use_param(weights["out"], "heads", "head_dim", "embed")
    return constrain_gradient(project(mixed, out, 2), WORK)


def _feed_forward(
    config: DecoderConfig,
    weights: Mapping[str, jax.Array],
    h_BTE: jax.Array,
    token_weights: jax.Array | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the dense branch, the chosen experts, or the sum of both."""
    if config.experts is None:
        return _dense_branch(weights, h_BTE), {}
    y, sums = mixture(config, weights, h_BTE, token_weights)
    if config.dense_width:
        y = y + _dense_branch(weights, constrain(h_BTE, *WORK, into=("mlp",)))
    return y, sums


def _dense_branch(weights: Mapping[str, jax.Array], h_BTE: jax.Array) -> jax.Array:
    gate = constrain(_product(h_BTE, weights, "gate", "mlp"), "batch", "length", "mlp")
    up = constrain(_product(h_BTE, weights, "up", "mlp"), "batch", "length", "mlp")
    gate, up = checkpoint_name((gate, up), "mlp_hidden")
    down = use_param(weights["down"], "mlp", "embed")
    return constrain_gradient(_swiglu_down(gate, up, down), WORK)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _swiglu_down(gate_BTF: jax.Array, up_BTF: jax.Array, down: jax.Array) -> jax.Array:
    """SwiGLU and the product after it; the wide array between them is cheap to recompute."""
    return project(jax.nn.silu(gate_BTF) * up_BTF, down)
