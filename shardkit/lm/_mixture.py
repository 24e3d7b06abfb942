"""The decoder's mixture of experts: router, experts, and the sums for its losses and metrics.

Dims: B batch, T length, E embed, X experts, K choices of each token (`top_k`), F expert_mlp.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ..nn._constrain import constrain
from ..nn._dot import einsum, matmul
from ..nn._expert_dispatch import position_in_expert
from ..nn._experts import Dot, experts, route
from ..nn._use_param import use_param
from ._decoder_config import DecoderConfig


def expert_capacity(config: DecoderConfig, length: int) -> int | None:
    """Returns an expert's slots for a row: ⌈capacity_factor · length · top_k / experts⌉.

    >>> sizes = dict(vocab=16, embed_dim=8, num_layers=1, num_heads=1, mlp_dim=8)
    >>> sizes |= dict(experts=4, top_k=2)
    >>> expert_capacity(DecoderConfig(**sizes, capacity_factor=1.25), 10)
    7
    """
    if config.capacity_factor is None:
        return None
    assert config.experts is not None
    return math.ceil(config.capacity_factor * length * config.top_k / config.experts)


def mixture(
    config: DecoderConfig,
    weights: Mapping[str, jax.Array],
    h_BTE: jax.Array,
    weights_BT: jax.Array | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the weighted sum of the chosen experts, and the sums of `router_statistics`.

    The weights are `router` [embed, experts]; `expert_gate`, `expert_up` [experts, embed,
    expert_mlp]; `expert_down` [experts, expert_mlp, embed]. `h_BTE` is the branch's normed input;
    `weights_BT` f32[batch, length] weighs each token in losses, None for 1.
    """
    assert config.experts is not None
    with jax.named_scope("router"):
        router = use_param(weights["router"], "embed", None).astype(jnp.float32)
        logits = matmul(h_BTE.astype(jnp.float32), router, precision="highest")
        logits = constrain(logits, "batch", "length", None)
        choice, share = route(logits, config.top_k, config.normalize_shares)
        choice = constrain(choice, "batch", "length", "choices")
        capacity = expert_capacity(config, h_BTE.shape[1])
        sums = router_statistics(logits, choice, capacity, weights_BT)
    # Over shards of `expert_mlp` gradients from the router are equal, those from experts partial.
    rows = constrain(h_BTE, "batch", "length", "embed", into=("expert_mlp",))
    share = constrain(share, "batch", "length", "choices", into=("expert_mlp",))
    wide, tall = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")
    params = {name: use_param(weights[f"expert_{name}"], *wide) for name in ("gate", "up")}
    params["down"] = use_param(weights["expert_down"], *tall)
    with jax.named_scope("experts"):
        return experts(rows, choice, share, params, swiglu, capacity=capacity), sums


def swiglu(weights: Mapping[str, jax.Array], rows: jax.Array, dot: Dot) -> jax.Array:
    """Computes one expert: down(silu(gate x) · up x)."""
    gate, up = dot(rows, weights["gate"]), dot(rows, weights["up"])
    gate, up = checkpoint_name((gate, up), "mlp_hidden")
    return dot(jax.nn.silu(gate) * up, weights["down"])


STATISTICS = ("balance", "z", "entropy", "max_load", "dropped")


def router_statistics(
    logits_BTX: jax.Array,
    choice_BTK: jax.Array,
    capacity: int | None,
    weights_BT: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Returns sums over the tokens of each row, for losses and metrics, f32[batch] each.

    Their sum over rows divided by the sum of `weights_BT` is a weighted mean over tokens. f is an
    expert's fraction of the choices of a row, and p its mean probability.

    Args:
      logits_BTX: the router's output.
      choice_BTK: i32[batch, length, k], the chosen experts.
      capacity: slots of each expert for a row; None for no limit.
      weights_BT: f32[batch, length], weight of each token; None for 1.

    Returns:
      `balance`: experts · Σ f p, 1 if all experts are used equally (Fedus et al. 2021, eq. 4,
      with a row as the group); `z`: logsumexp(logits)² (Zoph et al. 2022, eq. 5); `entropy` of
      the probabilities in nats; `max_load`: experts · max f, 1 if all are used equally;
      `dropped`: fraction of the choices whose expert was full.
    """
    logits = logits_BTX.astype(jnp.float32)
    batch, length, chosen = choice_BTK.shape
    number = logits.shape[-1]
    w_BT = jnp.ones((batch, length)) if weights_BT is None else weights_BT.astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    f = jax.nn.one_hot(choice_BTK, number).sum(2) / chosen
    f_BX = einsum("bt,btx->bx", w_BT, f)
    p_BX = einsum("bt,btx->bx", w_BT, p)
    tokens = w_BT.sum(1)
    dropped = jnp.zeros((batch, length))
    if capacity is not None:
        place = position_in_expert(choice_BTK.reshape(batch, -1), number).reshape(choice_BTK.shape)
        dropped = (place >= capacity).mean(-1)
    balance = (f_BX * p_BX).sum(1) / jnp.where(tokens == 0, 1, tokens)
    return {
        "balance": number * balance,
        "z": (w_BT * jax.nn.logsumexp(logits, -1) ** 2).sum(1),
        "entropy": -(w_BT[..., None] * p * log_p).sum((1, 2)),
        "max_load": number * f_BX.max(1),
        "dropped": (w_BT * dropped).sum(1),
    }
