"""`sk.nn.layer_stack`: a loss as first → layers → last, so that a pipeline can carry it out in
stages.
"""

from collections.abc import Callable
from typing import Any

import jax

from .._core.types import Mean
from ._overridable import overridable
from ._remat import remat

First = Callable[[Any, Any, Any], Any]
Layer = Callable[[Any, Any, Any, Any], Any]
Last = Callable[[Any, Any, Any], Any]


def layer_stack(
    first: First, layer: Layer, last: Last, ends: Any, layers: Any, batch: Any, key: Any = None
) -> Any:
    """Computes a loss in three parts: what comes before the layers, the layers, what comes after.

    Plainly it is `first`, a `jax.lax.scan` of `layer` under `sk.nn.remat`, and `last`. It is the
    overridable part `"layer_stack"`: with `sk.strategies.pipeline` each device works on layers of its own, and
    `first` and `last` run where the first and the last layer are.

    The functions must take every parameter as an argument: what they close over gets no gradient.
    In a `jax.jit` or scan of your own they must take every traced array as an argument.
    Gradients flow through the loss (the `total` of a `Mean`) alone, not through weight or metrics.

    Args:
      first: `(ends, batch, key) -> x`, a pytree of floating-point arrays `[rows, ...]` that keeps
        its form from layer to layer.
      layer: `(weights of one layer, x, batch, key) -> x`.
      last: `(ends, x, batch) -> loss`, or `-> (loss, metrics)`; the loss is a `Mean` or a scalar,
        a mean over equal-sized rows.
      ends: pytree of parameters of `first` and `last`.
      layers: pytree of parameters `[layers, ...]`.
      batch: pytree of `[rows, ...]`, as the step's loss got it, or of what it made of it.
      key: draws dropout; None for none. Each layer and `first` get a key of their own.

    Returns:
      What `last` returns.

    >>> import jax, jax.numpy as jnp
    >>> weights = {"first": jnp.ones((3, 4)), "layers": jnp.ones((2, 4, 4)) / 4}
    >>> float(layer_stack(
    ...     lambda ends, batch, key: batch @ ends["first"],
    ...     lambda w, x, batch, key: jnp.tanh(x @ w),
    ...     lambda ends, x, batch: x.mean(),
    ...     weights, weights["layers"], jnp.ones((2, 3))))  # doctest: +ELLIPSIS
    0.759...
    """
    return overridable("layer_stack", _plainly)(first, layer, last, ends, layers, batch, key)


def layer_keys(key: Any, layers: int) -> tuple[Any, Any]:
    """Returns the key of `first`, and those of the layers: key[layers]; None for no key."""
    if key is None:
        return None, None
    return jax.random.fold_in(key, layers), jax.random.split(key, layers)


def scan_layers(layer: Layer, x: Any, layers: Any, batch: Any, keys: Any) -> Any:
    """Returns what layers, stacked along dim 0 of `layers` and `keys`, make of `x` in turn."""

    def body(x: Any, one: tuple[Any, Any]) -> tuple[Any, None]:
        weights, key = one
        return layer(weights, x, batch, key), None

    with jax.named_scope("layers"):
        x, _ = jax.lax.scan(remat(body, scanned=True), x, (layers, keys))
    return x


def stop_aux_gradients(out: Any) -> Any:
    """What `last` returned, with no gradient through anything but the loss."""
    loss, *metrics = out if isinstance(out, tuple) else (out,)
    if isinstance(loss, Mean):
        loss = Mean(loss.total, jax.lax.stop_gradient(loss.weight))
    return (loss, *jax.lax.stop_gradient(metrics)) if metrics else loss


def _plainly(
    first: First, layer: Layer, last: Last, ends: Any, layers: Any, batch: Any, key: Any
) -> Any:
    for_first, keys = layer_keys(key, len(jax.tree.leaves(layers)[0]))
    x = scan_layers(layer, first(ends, batch, for_first), layers, batch, keys)
    return stop_aux_gradients(last(ends, x, batch))
