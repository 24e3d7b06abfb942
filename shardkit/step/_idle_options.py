"""Finds options of a step that change nothing in it, or nothing for the better."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from .._core.equations import source_of_equation
from .._core.source import Source
from .._core.tracing import equations, recorded_facts
from ..nn._remat import WHOLE, Policy
from ._bound_spec import BoundSpec

_PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"})
_NARROW = ("bfloat16", "float16")


def find_idle_options(bound: BoundSpec, jaxpr: core.Jaxpr) -> Iterator[tuple[str, str]]:
    """Yields what an option does not do in the traced step, and what to change."""
    remat, precision = bound.spec.strategy.remat, bound.spec.precision.compute_dtype
    whole = bool(recorded_facts(jaxpr, WHOLE))
    own = _own_checkpoint(jaxpr) if whole else None
    if own is not None:
        yield (
            f"remat={remat!r} finds no layer that the model marks, so that it is on top of the "
            f"model's own jax.checkpoint at {own}: what is in it is computed a third time",
            'remat="none", or sk.nn.remat(layer) in place of the model\'s own jax.checkpoint',
        )
    elif whole:
        yield (
            f"remat={remat!r} finds no layer that the model marks, so that the whole loss is "
            "computed again at once: more FLOPs, and as much memory",
            "layer = sk.nn.remat(layer) in the model, around each layer",
        )
    if precision in _NARROW:
        wide, products = _count_wide_products(jaxpr)
        if products and wide == products:
            yield (
                f"compute_dtype={precision!r} casts the parameters, but all {products} products of "
                "the loss have wider operands: the model casts them back, or its inputs are wide",
                f"dtype=jnp.{precision} in the model's modules and inputs of {precision}; or "
                'precision="float32"',
            )


def _own_checkpoint(jaxpr: core.Jaxpr) -> Source | None:
    """The line of a `jax.checkpoint` of the model's own; None if it has none."""
    for eqn in equations(jaxpr):
        if "prevent_cse" in eqn.params and not isinstance(eqn.params["policy"], Policy):
            # A scan drops the line of the checkpoint itself, not those of what is in it.
            inside = itertools.chain(*map(equations, core.jaxprs_in_params(eqn.params)))
            if source := next(filter(None, map(source_of_equation, (eqn, *inside))), None):
                return source
    return None


def _count_wide_products(jaxpr: core.Jaxpr) -> tuple[int, int]:
    """Products of the loss and its gradient with an operand of over 16 bits, and all of them."""
    counts = [0, 0]
    for eqn in equations(jaxpr):
        stack = str(eqn.source_info.name_stack)
        if eqn.primitive.name in _PRODUCTS and ("jvp(" in stack or "transpose(" in stack):
            avals: list[Any] = [value.aval for value in eqn.invars[:2]]
            dtypes = [aval.dtype for aval in avals]
            if all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
                counts[0] += max(dtype.itemsize for dtype in dtypes) > 2
                counts[1] += 1
    return counts[0], counts[1]
