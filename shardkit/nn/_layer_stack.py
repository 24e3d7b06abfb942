"""`sk.nn.layer_stack`: a loss as first → layers → last, which a pipeline can cut into stages."""

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._core.errors import Problem, StepError
from .._core.source import Frame
from .._core.tree import list_leaves
from .._core.types import Batch, Key, Mean, Params, PyTree
from .._core.without_gradient import WEIGHT, without_gradient
from ._overridable import overridable
from ._remat import remat

First = Callable[[Any, Any, Any], Any]
Layer = Callable[[Any, Any, Any, Any], Any]
Last = Callable[[Any, Any, Any, Any], Any]
"""The user's, which takes no key, with a key behind: for what draws beside the model (adapters)."""


class StackKeys(NamedTuple):
    """Keys of the parts of a layer stack; all None for no key."""

    first: Any = None  # key[]
    layers: Any = None  # key[layers]
    last: Any = None  # key[]


def layer_stack(
    first: First,
    layer: Layer,
    last: Callable[[Any, Any, Any], Any],
    outer_params: Params,
    layers: Params,
    batch: Batch,
    key: Key | None = None,
) -> Any:
    """Computes a loss in three parts: `first` before the layers, the layers, `last` after them.

    By itself it is `first`, a `jax.lax.scan` of `layer` under `sk.nn.remat`, and `last`. A strategy
    may override it by the name `"layer_stack"`: with `sk.strategies.pipeline()` each device holds
    some of the layers, and `first` and `last` run where the first and the last layer are.

    The functions must take every parameter, and inside a `jax.jit` or scan of your own every
    traced array, as an argument: arrays that they close over get no gradient. Gradients flow
    through the loss (the `total` of a `Mean`) and not through the metrics; a weight that depends on
    the parameters, or a metric that decides the loss, is refused.

    Args:
      first: `(outer_params, batch, key) -> x`, a pytree of floating-point arrays `[rows, ...]`
        whose shapes and dtypes every layer keeps.
      layer: `(weights of one layer, x, batch, key) -> x`.
      last: `(outer_params, x, batch) -> loss`, or `-> (loss, metrics)`; each number, and each side
        of a `Mean`, is a mean of rows or a sum over them.
      outer_params: pytree of the parameters of `first` and `last`.
      layers: pytree of parameters `[layers, ...]`.
      batch: pytree of `[rows, ...]`.
      key: key[] for dropout; None for none. Each layer and `first` get a key of their own.

    Returns:
      What `last` returns.

    >>> import jax, jax.numpy as jnp
    >>> weights = {"first": jnp.ones((3, 4)), "layers": jnp.ones((2, 4, 4)) / 4}
    >>> float(layer_stack(
    ...     lambda outer, batch, key: batch @ outer["first"],
    ...     lambda w, x, batch, key: jnp.tanh(x @ w),
    ...     lambda outer, x, batch: x.mean(),
    ...     weights, weights["layers"], jnp.ones((2, 3))))  # doctest: +ELLIPSIS
    0.759...
    """
    arrays = {"outer_params": outer_params, "layers": layers, "batch": batch, "key": key}

    def keyed_last(outer_params: Params, x: PyTree, batch: Batch, key: Key | None) -> Any:
        del key
        return last(outer_params, x, batch)

    return overridable("layer_stack", _run_layer_stack, takes_weights=True)(
        first, layer, keyed_last, **arrays
    )


def split_layer_keys(key: Key | None, layers: int) -> StackKeys:
    """Returns keys of their own for `first`, each layer and `last`."""
    if key is None:
        return StackKeys()
    first, last = (jax.random.fold_in(key, layers + n) for n in (0, 1))
    return StackKeys(first, jax.random.split(key, layers), last)


def scan_layers(layer: Layer, x: PyTree, layers: Params, batch: Batch, keys: Key | None) -> PyTree:
    """Applies layers, stacked along dim 0 of `layers` and `keys`, to `x` one after another.

    Raises:
      StepError: a layer returns another shape or dtype than that of `x`.
    """

    def body(x: PyTree, weights_and_key: tuple[Params, Key | None]) -> tuple[PyTree, None]:
        weights, key = weights_and_key
        out = layer(weights, x, batch, key)
        _check_layer(layer, x, out)
        return out, None

    with jax.named_scope("layers"):
        x, _ = jax.lax.scan(remat(body, scanned=True), x, (layers, keys))
    return x


def _check_layer(layer: Layer, x: PyTree, out: PyTree) -> None:
    given, taken = (
        [str(leaf.within("x")) for leaf in list_leaves(jax.tree.map(jnp.asarray, tree))]
        for tree in (out, x)
    )
    if given != taken:
        pairs = itertools.zip_longest(given, taken, fillvalue="nothing")
        made, wanted = next(pair for pair in pairs if len(set(pair)) == 2)
        why = f"returns {made} where it takes {wanted}{_defined_at(layer)}"
        fix = "the shapes and dtypes that it takes; if float32 arrays come in, y.astype(x.dtype)"
        raise StepError.of("A layer must return what the next one takes.", "layer", why, fix)


def _defined_at(function: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f" ({Frame(code.co_filename, code.co_firstlineno, code.co_qualname)})" if code else ""


def stop_aux_gradients(out: Any) -> Any:
    """Returns what `last` returned; a gradient through anything but the loss is refused."""
    loss, *metrics = out if isinstance(out, tuple) else (out,)
    if isinstance(loss, Mean):
        loss = Mean(loss.total, jax.lax.stop_gradient(loss.weight))
    unused = functools.partial(without_gradient, _METRIC, unless_unused=True)
    return (loss, *jax.tree.map(unused, metrics)) if metrics else loss


_METRIC = Problem(
    "the metrics of sk.nn.layer_stack",
    "are a part of the loss, and have no gradient",
    "a `last` whose loss has this term: return loss + 0.1 * term, {'term': term}",
)


def _run_layer_stack(
    first: First,
    layer: Layer,
    last: Last,
    outer_params: Params,
    layers: Params,
    batch: Batch,
    key: Key | None,
) -> Any:
    keys = split_layer_keys(key, len(jax.tree.leaves(layers)[0]))
    x = scan_layers(layer, first(outer_params, batch, keys.first), layers, batch, keys.layers)
    out = last(outer_params, x, batch, keys.last)
    loss = out[0] if isinstance(out, tuple) else out
    if isinstance(loss, Mean):
        loss = Mean(loss.total, without_gradient(WEIGHT, loss.weight))
    return stop_aux_gradients((loss, *out[1:]) if isinstance(out, tuple) else loss)
