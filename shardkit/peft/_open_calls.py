"""Makes a call that a trace left open (`nn._deferred`) with other weights than those of the trace.

Functions among its arguments are called with these weights by whatever computes the part, in a
stage of a pipeline or on the device of an expert. They are traced there and evaluated.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ..nn._deferred import OpenCall, call_open, is_array, substitute, trace

PRODUCT = "product"
"""Name of the call of a function that a part gives to the model's, such as `dot` of experts."""


Evaluate = Callable[[core.ClosedJaxpr, list[Any], jax.Array | None], Sequence[Any]]
"""`(program of a function, its operands, key that the function gets) → results`, arrays."""


@dataclasses.dataclass(frozen=True)
class WeightForm:
    """A form of weights that takes the place of arrays."""

    is_weight: Callable[[Any], bool]  # whether a node of a pytree is such a weight
    floats: Callable[[Any], Any]  # the array that it stands for, abstract or not


def call_again(
    call: OpenCall,
    operands: Sequence[Any],
    form: WeightForm,
    evaluate: Evaluate,
    key: jax.Array | None = None,
) -> list[Any]:
    """Makes a call, as it was traced, with functions that take the new weights; returns its arrays.

    `evaluate` computes each of the model's functions; `key` is for those that take one, where the
    model gives them None.
    """
    closed, args, kwargs = call.split(operands)
    hidden = key is not None and kwargs.get("key", key) is None
    kwargs |= {"key": key} if hidden else {}

    def rewrite(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*own: Any) -> Any:
            given = own[-1] if _is_key(own[-1]) else None
            own = (*own[:-1], None) if hidden and given is not None else own
            leaves, tree = jax.tree.flatten(own, is_leaf=is_leaf)
            plain = [plain_leaf(x) for x in leaves]
            program, shapes = trace(function, jax.tree.unflatten(tree, plain), {})
            values = [x for x, like in zip(leaves, plain, strict=True) if is_array(like)]
            results = evaluate(substitute(program, closed), values, given)
            return jax.tree.unflatten(jax.tree.structure(shapes), results)

        return run

    def is_leaf(x: Any) -> bool:
        return callable(x) or form.is_weight(x)

    def plain_leaf(x: Any) -> Any:
        if form.is_weight(x):
            return form.floats(x)
        return functools.partial(call_open, PRODUCT, x, x) if callable(x) else x

    args, kwargs = jax.tree.map(
        lambda x: rewrite(x) if callable(x) else x, (args, kwargs), is_leaf=is_leaf
    )
    return call.call(*args, **kwargs)


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
