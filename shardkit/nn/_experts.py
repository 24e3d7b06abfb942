"""A mixture of experts: tokens choose some of many feed-forward branches.

Dims: B batch, T length, E embed, X experts, K choices of each token (`top_k`), F expert_mlp.

A token's result depends on its own row of the batch alone: the order in which tokens take an
expert's slots, the number of slots and the shares in balance losses are all per row. So the mesh,
accumulation and the other rows of a batch do not change it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._core.errors import Problem, StepError, raise_all
from .._core.options import check_arguments, option_problems
from .._core.types import Key, PyTree
from ._expert_dispatch import (
    assign_slots,
    batched_matmul,
    combine,
    dispatch,
    dispatch_words,
    draw_row_words,
    gather_from_slots,
    ragged_matmul,
    row_keys,
    sort_by_expert,
)
from ._overridable import overridable

Dot = Callable[[jax.Array, jax.Array], jax.Array]
Mlp = Callable[[Any, jax.Array, Dot], jax.Array]
KeyedMlp = Callable[[Any, jax.Array, Dot, Key | None], jax.Array]
"""With a key for each row behind: for what draws beside the model (adapters)."""


def experts(
    tokens: jax.Array,
    choices: jax.Array,
    shares: jax.Array,
    weights: PyTree,
    mlp: Mlp,
    *,
    capacity: int | None = None,
) -> jax.Array:
    """Returns the weighted sum of what each token's chosen experts compute from it.

    A strategy may override it by the name `"experts"`: `sk.strategies.expert()` moves tokens to
    the devices that hold their experts, and back.

    Args:
      tokens: [batch, length, embed].
      choices: i32[batch, length, k], the experts that each token chose.
      shares: f32[batch, length, k], the weight of each choice.
      weights: pytree of arrays whose dim 0 counts experts.
      mlp: `(weights, rows, dot) -> rows`, what one expert computes; `dot(rows, w)` multiplies
        every row with the matrix `w[e]`, [in, out], of its own expert e. Anything else that it
        does must work element by element.
      capacity: tokens that an expert takes from one row of the batch, in the row's order; tokens
        beyond it get nothing from this expert. None: no limit.

    Returns:
      [batch, length, embed] in the dtype of `tokens`.

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
    _check(tokens, choices, shares, weights, capacity)

    def keyed_mlp(weights: PyTree, rows: jax.Array, dot: Dot, keys: Key | None) -> jax.Array:
        del keys
        return mlp(weights, rows, dot)

    compute = overridable("experts", _experts, takes_weights=True)
    return compute(tokens, choices, shares, weights, keyed_mlp, capacity=capacity, key=None)


def _experts(
    x_BTE: jax.Array,
    choice_BTK: jax.Array,
    share_BTK: jax.Array,
    weights: PyTree,
    mlp: KeyedMlp,
    capacity: int | None,
    key: Key | None,
) -> jax.Array:
    batch, length, top_k = choice_BTK.shape
    words = draw_row_words(key, choice_BTK)
    num_experts = jax.tree.leaves(weights)[0].shape[0]
    if capacity is not None:
        slot, row = assign_slots(choice_BTK.reshape(batch, -1), num_experts, capacity)
        h: Any = dispatch(x_BTE, row, slot, top_k)
        h = h.reshape(batch, num_experts, capacity, -1)
        keys = row_keys(dispatch_words(words, row), h)
        y = mlp(weights, h, batched_matmul, keys).reshape(batch, num_experts * capacity, -1)
        chosen: Any = gather_from_slots(y, row, slot)
        return combine(chosen, share_BTK)
    row, slot, sizes = sort_by_expert(choice_BTK.reshape(1, 1, -1), num_experts)
    h = dispatch(x_BTE.reshape(1, 1, batch * length, -1), row, slot, top_k)
    keys = row_keys(dispatch_words(words, row), h)
    y = mlp(weights, h, lambda rows, w: ragged_matmul(rows, w, sizes), keys)
    chosen: Any = gather_from_slots(y, row, slot)
    return combine(chosen.reshape(batch, length * top_k, -1), share_BTK)


def route(logits: jax.Array, top_k: int, normalize: bool = True) -> tuple[jax.Array, jax.Array]:
    """Chooses each token's `top_k` experts, in f32.

    Args:
      logits: the router's output, [..., experts].
      top_k: choices of each token.
      normalize: whether the shares of several choices are scaled to sum to 1.

    Returns:
      i32[..., k], the chosen experts, best first; and f32[..., k], their probabilities, scaled to
      sum to 1 over the chosen ones if `normalize`. With one choice the probability is not scaled
      (Fedus et al. 2021): a share that is always 1 would give the router no gradient.

    >>> choice, share = route(jnp.log(jnp.array([0.1, 0.3, 0.6])), 2)
    >>> choice.tolist(), [round(float(x), 3) for x in share]
    ([2, 1], [0.667, 0.333])
    """
    check_arguments(
        StepError, "Tokens cannot be routed.", top_k=(top_k, int), normalize=(normalize, bool)
    )
    p = jax.nn.softmax(logits.astype(jnp.float32))
    remaining, choices, shares = jax.lax.stop_gradient(p), [], []
    # Not `jax.lax.top_k`: on CPU XLA gathers the whole array for it where rows are split.
    for _ in range(top_k):
        best = jnp.argmax(remaining, -1)
        chosen = jax.nn.one_hot(best, p.shape[-1], dtype=bool)
        choices.append(best.astype(jnp.int32))
        shares.append(jnp.where(chosen, p, 0).sum(-1))
        remaining = jnp.where(chosen, -1.0, remaining)
    choice, share = jnp.stack(choices, -1), jnp.stack(shares, -1)
    scaled = normalize and top_k > 1
    return choice, share / share.sum(-1, keepdims=True) if scaled else share


def _check(
    tokens: jax.Array, choices: jax.Array, shares: jax.Array, weights: PyTree, capacity: int | None
) -> None:
    problems = []
    fits = choices.ndim == 3 and choices.shape[:2] == tokens.shape[:2]
    if choices.shape != shares.shape or not fits:
        why = f"tokens is {tokens.shape}, choices {choices.shape}, shares {shares.shape}"
        fix = "tokens [batch, length, embed], choices and shares [batch, length, k]"
        problems.append(Problem("choices, shares", why, fix))
    sizes = sorted({leaf.shape[:1] for leaf in jax.tree.leaves(weights)})
    if len(sizes) != 1 or not sizes[0]:
        why = f"leaves have {sizes} experts in dim 0"
        problems.append(Problem("weights", why, "the same number of experts in every leaf"))
    problems += option_problems(capacity=(capacity, int | None))
    if isinstance(capacity, int) and capacity < 1:
        problems.append(Problem(f"capacity={capacity}", "must be at least 1", "capacity=None"))
    raise_all(StepError, "sk.nn.experts cannot be computed.", problems)
