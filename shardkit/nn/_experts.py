"""A mixture of experts: tokens choose some of many feed-forward branches.

Dims: B batch, T length, E embed, X experts, K choices of each token (`top_k`), F expert_mlp.

Everything that decides about a token is decided within its own row of the batch: the order in
which tokens take an expert's slots, the number of slots, and the shares that losses are made of.
So neither the mesh, nor accumulation, nor the other rows of a batch change any token's result.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._core.errors import Problem, StepError, raise_all
from ._expert_dispatch import collect, combine, dispatch, even, in_order, ragged, slots
from ._overridable import overridable

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
    return overridable("experts", _experts)(x_BTE, choice_BTK, share_BTK, weights, mlp, capacity)


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
    raise_all(StepError, "sk.nn.experts cannot be carried out.", problems)
