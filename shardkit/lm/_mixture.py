"""The decoder's mixture of experts: its router, its experts, and the sums its losses are made of.

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
    """Slots of each expert for one row: capacity_factor · length · top_k / experts, rounded up.

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
    counted_BT: jax.Array | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns what the chosen experts add, and the sums that `router_statistics` describes.

    Args:
      config: the decoder's sizes.
      weights: `router` [embed, experts]; `expert_gate`, `expert_up` [experts, embed,
        expert_mlp]; `expert_down` [experts, expert_mlp, embed].
      h_BTE: normed input of the branch.
      counted_BT: f32[batch, length], how much each token counts in losses; None: each 1.
    """
    assert config.experts is not None
    with jax.named_scope("router"):
        router = use_param(weights["router"], "embed", None).astype(jnp.float32)
        logits = matmul(h_BTE.astype(jnp.float32), router, precision="highest")
        logits = constrain(logits, "batch", "length", None)
        choice, share = route(logits, config.top_k)
        choice = constrain(choice, "batch", "length", "choices")
        capacity = expert_capacity(config, h_BTE.shape[1])
        sums = router_statistics(logits, choice, capacity, counted_BT)
    # The router's gradients are whole on every shard of `expert_mlp`, those of the experts parts.
    rows = constrain(h_BTE, "batch", "length", "embed", into=("expert_mlp",))
    share = constrain(share, "batch", "length", "choices", into=("expert_mlp",))
    wide, tall = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")
    own = {name: use_param(weights[f"expert_{name}"], *wide) for name in ("gate", "up")}
    own["down"] = use_param(weights["expert_down"], *tall)
    with jax.named_scope("experts"):
        return experts(rows, choice, share, own, swiglu, capacity=capacity), sums


def swiglu(weights: Mapping[str, jax.Array], rows: jax.Array, dot: Dot) -> jax.Array:
    """What one expert computes: down(silu(gate x) · up x)."""
    gate, up = dot(rows, weights["gate"]), dot(rows, weights["up"])
    gate, up = checkpoint_name((gate, up), "mlp_hidden")
    return dot(jax.nn.silu(gate) * up, weights["down"])


STATISTICS = ("balance", "z", "entropy", "max_load", "dropped")


def router_statistics(
    logits_BTX: jax.Array,
    choice_BTK: jax.Array,
    capacity: int | None,
    counted_BT: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Sums over the tokens of each row that losses and metrics are made of, f32[batch] each.

    Summed over rows and divided by the sum of `counted` they are means over the tokens that
    count. f is the share of a row's choices that each expert got, and p its mean probability.

    Args:
      logits_BTX: the router's output.
      choice_BTK: i32[batch, length, k], the chosen experts.
      capacity: slots of each expert for one row; None: no bound.
      counted_BT: f32[batch, length], how much each token counts; None: each 1.

    Returns:
      `balance`: experts · Σ f p, 1 where all experts are used alike (Fedus et al. 2021, eq. 4,
      with a row as the group); `z`: logsumexp(logits)² (Zoph et al. 2022, eq. 5); `entropy` of
      the probabilities in nats; `max_load`: experts · max f, 1 where all are used alike;
      `dropped`: share of choices that found their expert full.
    """
    logits = logits_BTX.astype(jnp.float32)
    batch, length, chosen = choice_BTK.shape
    number = logits.shape[-1]
    counted = jnp.ones((batch, length)) if counted_BT is None else counted_BT.astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    took = jax.nn.one_hot(choice_BTK, number).sum(2) / chosen
    took_BX = einsum("bt,btx->bx", counted, took)
    p_BX = einsum("bt,btx->bx", counted, p)
    tokens = counted.sum(1)
    lost = jnp.zeros((batch, length))
    if capacity is not None:
        place = position_in_expert(choice_BTK.reshape(batch, -1), number).reshape(choice_BTK.shape)
        lost = (place >= capacity).mean(-1)
    pairs = (took_BX * p_BX).sum(1) / jnp.where(tokens == 0, 1, tokens)
    return {
        "balance": number * pairs,
        "z": (counted * jax.nn.logsumexp(logits, -1) ** 2).sum(1),
        "entropy": -(counted[..., None] * p * log_p).sum((1, 2)),
        "max_load": number * took_BX.max(1),
        "dropped": (counted * lost).sum(1),
    }
