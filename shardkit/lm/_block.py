"""One decoder block as a pure function of its weights and the residual stream.

Dims: B batch, T length, E embed, N heads, K kv_heads, H head_dim, F mlp.

Logical axes of activations. The residual stream between branches is
`("batch", "residual_length", "embed")`, what a branch works on is `("batch", "length", "embed")`,
so that a strategy may split the stream over length without splitting the length that attention
and products see. Inside: `("batch", "length", "heads", "head_dim")`, the same with `"kv_heads"`,
and `("batch", "length", "mlp")`. With experts see also `_experts.py`.

Names for checkpoint policies: `attn_in` and `mlp_in` (a branch's normed input, which a split
stream gathers), `qkv` (queries, keys and values after rotation), `attn_mix` (what attention
returns), `mlp_hidden` (gate and up products), `attn_out` and `mlp_out` (what a branch adds to
the stream, which split products reduce).
"""

import functools
from collections.abc import Mapping

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
WORK = ("batch", "length", "embed")  # what a branch works on, and its gradients
BIASES = {"attn_out": "out_bias", "mlp_out": "down_bias"}


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Returns x / √(mean(x²) + eps) · scale over the last dim, in f32 inside."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def rotation(length: int, head_dim: int, theta: float) -> Rotation:
    """Returns cosine and sine, f32[length, 1, head_dim / 2], of each position's angles."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTNH: jax.Array, by: Rotation) -> jax.Array:
    """Turns the pairs (i, i + H/2) of every head by its position's angles (arXiv:2104.09864)."""
    cos, sin = by
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, -1).astype(x_BTNH.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of `x` and scales the rest up; all of `x` where key is None."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def block(
    config: DecoderConfig,
    weights: Mapping[str, jax.Array],
    x_BTE: jax.Array,
    by: Rotation,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
    counted: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the residual stream after one block: x + attention(norm x), then + mlp(norm x).

    With experts it also returns what `router_statistics` does; without them an empty dict.

    Args:
      config: the decoder's sizes.
      weights: one layer's arrays, by the names of `Layers`.
      x_BTE: residual stream, [batch, length, embed].
      by: what `rotation` returned for this length.
      segment_ids: i32[batch, length], or None where every row is one segment.
      key: draws dropout; None for none.
      counted: f32[batch, length], how much each token counts in losses; None: each 1.
    """
    keys = (None, None) if key is None else tuple(jax.random.split(key))
    with jax.named_scope("attention"):
        mixed = defer_remat(functools.partial(_mix, config), "attn_out")
        y = mixed(weights, x_BTE, by, segment_ids)
        x_BTE = x_BTE + _branch_output(
            config, weights, "attn_out", y, ("heads", "head_dim"), keys[0]
        )
    with jax.named_scope("mlp"):
        inner = _inner(config)
        into = () if config.experts else inner
        h = _branch_input(config, x_BTE, weights["mlp_norm"], "mlp_in", into)
        y, sums = _feed_forward(config, weights, h, counted)
        x_BTE = x_BTE + _branch_output(config, weights, "mlp_out", y, inner, keys[1])
    return constrain(x_BTE, *STREAM), sums


def _inner(config: DecoderConfig) -> tuple[str, ...]:
    """Logical axes that the last products of the feed-forward branch contract."""
    chosen = () if config.experts is None else ("expert_mlp",)
    return (*(("mlp",) if config.dense_width else ()), *chosen)


def _mix(
    config: DecoderConfig,
    weights: Mapping[str, jax.Array],
    x_BTE: jax.Array,
    by: Rotation,
    segment_ids: jax.Array | None,
) -> jax.Array:
    into = ("heads", "kv_heads")
    h = _branch_input(config, x_BTE, weights["attn_norm"], "attn_in", into)
    return _attend(config, weights, h, by, segment_ids)


def _branch_input(
    config: DecoderConfig, x_BTE: jax.Array, scale: jax.Array, name: str, into: tuple[str, ...]
) -> jax.Array:
    # Stated first, so that what is gathered is the norm's result and not the f32 inside it.
    h = constrain(rms_norm(x_BTE, scale, config.norm_eps), *STREAM)
    return checkpoint_name(constrain(h, *WORK, source=STREAM, into=into), name)


def _branch_output(
    config: DecoderConfig,
    weights: Mapping[str, jax.Array],
    name: str,
    y_BTE: jax.Array,
    partial: tuple[str, ...],
    key: jax.Array | None,
) -> jax.Array:
    """Marks what a branch adds; constrained before anything else, so one reduction is enough.

    The bias comes after it: added to the parts of the sum, it would be added once per device.
    """
    y = checkpoint_name(constrain(y_BTE, *STREAM, source=WORK, partial=partial), name)
    bias = weights.get(BIASES[name])
    return dropout(y if bias is None else y + bias, config.dropout, key)


def _product(
    h_BTE: jax.Array, weights: Mapping[str, jax.Array], name: str, *outputs: str
) -> jax.Array:
    """A product that widens, with its bias if it has one; `outputs` name the dims it makes."""
    y = project(h_BTE, use_param(weights[name], "embed", *outputs))
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias


def _attend(
    config: DecoderConfig,
    weights: Mapping[str, jax.Array],
    h_BTE: jax.Array,
    by: Rotation,
    segment_ids: jax.Array | None,
) -> jax.Array:
    q = _product(h_BTE, weights, "query", "heads", "head_dim")
    k = _product(h_BTE, weights, "key", "kv_heads", "head_dim")
    v = _product(h_BTE, weights, "value", "kv_heads", "head_dim")
    q = constrain(rotate(q, by), "batch", "length", "heads", "head_dim")
    k = constrain(rotate(k, by), "batch", "length", "kv_heads", "head_dim")
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
    counted: jax.Array | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What the dense branch, the chosen experts, or both add."""
    if config.experts is None:
        return _dense_branch(weights, h_BTE), {}
    y, sums = mixture(config, weights, h_BTE, counted)
    if config.dense_width:
        y = y + _dense_branch(weights, constrain(h_BTE, *WORK, into=("mlp",)))
    return y, sums


def _dense_branch(weights: Mapping[str, jax.Array], h_BTE: jax.Array) -> jax.Array:
    gate = constrain(_product(h_BTE, weights, "gate", "mlp"), "batch", "length", "mlp")
    up = constrain(_product(h_BTE, weights, "up", "mlp"), "batch", "length", "mlp")
    gate, up = checkpoint_name((gate, up), "mlp_hidden")
    down = use_param(weights["down"], "mlp", "embed")
    return constrain_gradient(_narrow(gate, up, down), WORK)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _narrow(gate_BTF: jax.Array, up_BTF: jax.Array, down: jax.Array) -> jax.Array:
    """SwiGLU and the product after it; what lies between is cheap, wide, and computed again."""
    return project(jax.nn.silu(gate_BTF) * up_BTF, down)
