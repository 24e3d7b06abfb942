"""A mixture of experts: tokens choose some of many feed-forward branches.

Dims: B batch, T length, E embed, X experts, K choices of each token (`top_k`), F expert_mlp.

Everything that decides about a token is decided within its own row of the batch: the order in
which tokens take an expert's slots, the number of slots, and the shares that losses are made of.
So neither the mesh, nor accumulation, nor the other rows of a batch change any token's result.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .._constrain import constrain
from .._errors import Problem, StepError, raise_all
from .._regions import region
from .._slots import collect, combine, dispatch, even, in_order, places, ragged, slots
from .._weight import weight
from ._config import DecoderConfig

Dot = Callable[[jax.Array, jax.Array], jax.Array]
Mlp = Callable[[Any, jax.Array, Dot], jax.Array]


def experts(
    x_BTE: jax.Array,
    choice_BTK: jax.Array,
    share_BTK: jax.Array,
    weights: Any,
    mlp: Mlp,
    capacity: int | None = None,
) -> jax.Array:
    """Returns for each token the weighted sum of what its chosen experts make of it.

    It is the region `"experts"`: `strategies.expert` carries it out by moving tokens to the
    devices that hold their experts, and back.

    Args:
      x_BTE: tokens, [batch, length, embed].
      choice_BTK: i32[batch, length, k], the experts that each token chose.
      share_BTK: f32[batch, length, k], the weight of each choice.
      weights: pytree of arrays whose dim 0 counts experts.
      mlp: `(weights, rows, dot) -> rows`, what one expert computes; `dot(rows, w)` multiplies
        every row with the matrix `w[e]`, [in, out], of its own expert e. Anything else that it
        does must work element by element.
      capacity: tokens of one row of the batch that an expert takes, the first of the row; the
        others pass it by and get nothing from it. None: every expert takes all that come.

    Returns:
      [batch, length, embed] in the dtype of `x`.

    Raises:
      StepError: shapes that do not fit together.

    >>> x = jnp.array([[[1.0], [2.0], [3.0]]])
    >>> scale = {"w": jnp.array([[[10.0]], [[100.0]]])}
    >>> choice, share = jnp.array([[[0], [1], [1]]]), jnp.ones((1, 3, 1))
    >>> def scaled(weights, rows, dot):
    ...     return dot(rows, weights["w"])
    >>> experts(x, choice, share, scale, scaled)[..., 0].tolist()
    [[10.0, 200.0, 300.0]]
    >>> experts(x, choice, share, scale, scaled, capacity=1)[..., 0].tolist()
    [[10.0, 200.0, 0.0]]
    """
    _check(x_BTE, choice_BTK, share_BTK, weights, capacity)
    return region("experts", _experts)(x_BTE, choice_BTK, share_BTK, weights, mlp, capacity)


def _experts(
    x_BTE: jax.Array,
    choice_BTK: jax.Array,
    share_BTK: jax.Array,
    weights: Any,
    mlp: Mlp,
    capacity: int | None,
) -> jax.Array:
    batch, length, chosen = choice_BTK.shape
    number = jax.tree.leaves(weights)[0].shape[0]
    if capacity is not None:
        slot, row = slots(choice_BTK.reshape(batch, -1), number, capacity)
        h = dispatch(x_BTE, row, slot, chosen).reshape(batch, number, capacity, -1)
        y = mlp(weights, h, even).reshape(batch, number * capacity, -1)
        return combine(collect(y, row, slot), share_BTK)
    wanted = choice_BTK.reshape(1, 1, -1)
    row, slot, sizes = in_order(wanted, number)
    h = dispatch(x_BTE.reshape(1, 1, batch * length, -1), row, slot, chosen)
    y = collect(mlp(weights, h, lambda a, w: ragged(a, w, sizes)), row, slot)
    return combine(y.reshape(batch, length * chosen, -1), share_BTK)


def route(logits_BTX: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """Chooses each token's `top_k` experts, in f32.

    Args:
      logits_BTX: the router's output, [..., experts].
      top_k: choices of each token.

    Returns:
      i32[..., k], the chosen experts, best first; and f32[..., k], their probabilities, made to
      sum to 1 over the chosen. With one choice the probability stays as it is (Fedus et al.
      2021): a share of always 1 would teach the router nothing.

    >>> choice, share = route(jnp.log(jnp.array([0.1, 0.3, 0.6])), 2)
    >>> choice.tolist(), [round(float(x), 3) for x in share]
    ([2, 1], [0.667, 0.333])
    """
    p = jax.nn.softmax(logits_BTX.astype(jnp.float32))
    left, choices, shares = jax.lax.stop_gradient(p), [], []
    for _ in range(top_k):  # `jax.lax.top_k` of a split array is one of the whole, on CPU
        best = jnp.argmax(left, -1)
        taken = jax.nn.one_hot(best, p.shape[-1], dtype=bool)
        choices.append(best.astype(jnp.int32))
        shares.append(jnp.where(taken, p, 0).sum(-1))
        left = jnp.where(taken, -1.0, left)
    choice, share = jnp.stack(choices, -1), jnp.stack(shares, -1)
    return choice, share / share.sum(-1, keepdims=True) if top_k > 1 else share


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
        router = weight(weights["router"], "embed", None).astype(jnp.float32)
        logits = jnp.matmul(h_BTE.astype(jnp.float32), router, precision="highest")
        logits = constrain(logits, "batch", "length", None)
        choice, share = route(logits, config.top_k)
        choice = constrain(choice, "batch", "length", "choices")
        capacity = expert_capacity(config, h_BTE.shape[1])
        sums = router_statistics(logits, choice, capacity, counted_BT)
    # The router's gradients are whole on every shard of `expert_mlp`, those of the experts parts.
    rows = constrain(h_BTE, "batch", "length", "embed", into=("expert_mlp",))
    share = constrain(share, "batch", "length", "choices", into=("expert_mlp",))
    wide, tall = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")
    own = {name: weight(weights[f"expert_{name}"], *wide) for name in ("gate", "up")}
    own["down"] = weight(weights["expert_down"], *tall)
    with jax.named_scope("experts"):
        return experts(rows, choice, share, own, swiglu, capacity), sums


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
    took_BX = jnp.einsum("bt,btx->bx", counted, took)
    p_BX = jnp.einsum("bt,btx->bx", counted, p)
    tokens = counted.sum(1)
    lost = jnp.zeros((batch, length))
    if capacity is not None:
        place = places(choice_BTK.reshape(batch, -1), number).reshape(choice_BTK.shape)
        lost = (place >= capacity).mean(-1)
    pairs = (took_BX * p_BX).sum(1) / jnp.where(tokens == 0, 1, tokens)
    return {
        "balance": number * pairs,
        "z": (counted * jax.nn.logsumexp(logits, -1) ** 2).sum(1),
        "entropy": -(counted[..., None] * p * log_p).sum((1, 2)),
        "max_load": number * took_BX.max(1),
        "dropped": (counted * lost).sum(1),
    }


def _check(
    x: jax.Array, choice: jax.Array, share: jax.Array, weights: Any, capacity: int | None
) -> None:
    problems = []
    if choice.shape != share.shape or choice.ndim != 3 or choice.shape[:2] != x.shape[:2]:
        why = f"x is {x.shape}, choice {choice.shape}, share {share.shape}"
        fix = "x [batch, length, embed], choice and share [batch, length, k]"
        problems.append(Problem("choice, share", why, fix))
    numbers = sorted({leaf.shape[:1] for leaf in jax.tree.leaves(weights)})
    if len(numbers) != 1 or not numbers[0]:
        why = f"leaves have {numbers} experts in dim 0"
        problems.append(Problem("weights", why, "the same number of experts in every leaf"))
    if capacity is not None and capacity < 1:
        problems.append(Problem(f"capacity={capacity}", "must be at least 1", "capacity=None"))
    raise_all(StepError, "sk.experts cannot be carried out.", problems)
