"""Converts everything that a loss may return to one type, `LossOutput`.

A loss returns a scalar or `Mean`, alone or with a dict of metrics, and the new `model_state` if it
is stateful.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .._core.errors import Problem, StepError, raise_all
from .._core.precision import widen
from .._core.tree import describe_type, short_type
from .._core.types import Batch, Key, Loss, Mean, Params, PyTree, Scalar
from .._core.without_gradient import WEIGHT, without_gradient
from ._unbound_axes import bind_batch_axes, explain_unbound_axes

RESERVED = ("loss", "grad_norm", "skipped")
_NUMBERS = (jax.Array, np.ndarray, np.generic, int, float, complex)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossOutput:
    """One evaluation of a loss on some rows of a batch."""

    loss: Mean  # `Mean`, f32[] or f64[] each; a plain scalar loss has weight 1
    metrics: dict[str, Mean]  # `{name: Mean}`
    model_state: PyTree  # mutable model state after the evaluation


# `(params, model_state, batch, key) -> (total, output)`.
Objective = Callable[[Params, PyTree, Batch, Key], tuple[Scalar, LossOutput]]


def build_objective(
    loss_fn: Callable[..., Any], mesh: Mesh | None = None, *, evaluate: bool = False
) -> Objective:
    """Wraps a user's loss as `(params, model_state, batch, key) -> (total, output)`.

    Differentiate `total` (`value_and_grad`) and divide by the summed weight: that is the gradient
    of the mean, however the rows were split. Its trace raises StepError if the loss is not a scalar
    or `Mean`, metrics are not a dict of scalars, a metric has a reserved name, or a collective of
    the loss names an axis that `mesh` does not have.
    """
    loss = loss_fn if isinstance(loss_fn, Loss) else Loss(loss_fn, loss_fn)
    call = bind_batch_axes(loss.evaluate if evaluate else loss.train, mesh)

    def run(
        params: Params, model_state: PyTree, batch: Batch, key: Key
    ) -> tuple[Scalar, LossOutput]:
        with jax.named_scope("loss"), explain_unbound_axes(mesh), _explain_no_batch(batch):
            if loss.stateful:
                value, metrics, model_state = _split_stateful_output(
                    call(params, batch, key, model_state)
                )
            else:
                value, metrics = _split_output(call(params, batch, key))
        _check_output(value, metrics)
        if isinstance(value, Mean):
            value = Mean(value.total, without_gradient(WEIGHT, value.weight))
        mean = to_mean(value)
        named = {name: to_mean(metric) for name, metric in metrics.items()}
        return mean.total, LossOutput(mean, named, model_state)

    return run


@contextlib.contextmanager
def _explain_no_batch(batch: Batch) -> Iterator[None]:
    """Raises StepError where a loss reads a leaf of a batch that has none."""
    try:
        yield
    except (AttributeError, LookupError, TypeError) as error:
        if jax.tree.leaves(batch):
            raise
        why = f"is {batch!r}, without a leaf; the loss raises {type(error).__name__}: {error}"
        fix = "batch=next(iter(data)), one batch; a loss without data takes batch={}"
        raise StepError.of("The loss cannot be traced.", "batch", why, fix) from error


def value_and_grad(
    objective: Objective,
    common: Callable[[Scalar], Scalar] = lambda weight: weight,
    *,
    whole: bool = False,
    of_means: bool = False,
) -> Callable[..., tuple[LossOutput, Params]]:
    """Differentiates an objective: `(params, model_state, batch, key) -> (output, gradients)`.

    Gradients of a sum over many tokens leave the range of float16 where those of their mean do not.
    So what is differentiated is the total over a power of two near `common(weight)`, equal on all
    devices that sum gradients within it, which costs no rounding; and the gradients are multiplied
    by it again, in f32 or wider.

    Where all rows are together (`whole`), what is differentiated is the mean itself, and gradients
    are its own: derivative rules of the user's own that are not linear, as clipping is, get the
    gradients that they get in plain JAX. Where micro-batches are taken as wholes (`of_means`),
    these are the gradients of each one's mean, multiplied by the weight: exact but for a rounding.
    """

    def scaled(*args: Any) -> tuple[Scalar, tuple[LossOutput, Scalar | None]]:
        total, output = objective(*args)
        if whole:
            return divide_mean(output.loss), (output, None)
        size = common(output.loss.weight)
        if of_means:
            size = jnp.where(size == 0, 1, size)
        else:
            size = jnp.maximum(jnp.abs(size), 1)
            size = jax.lax.reduce_precision(size, jnp.finfo(size.dtype).nexp, 0)
        return total / size.astype(total.dtype), (output, size)

    def run(*args: Any) -> tuple[LossOutput, Params]:
        (_, (output, size)), grads = jax.value_and_grad(scaled, has_aux=True)(*args)
        grads = jax.tree.map(widen, grads)
        if size is not None:
            grads = jax.tree.map(lambda g: scale_gradient(g, size), grads)
        return output, grads

    return run


def scale_gradient(gradient: jax.Array, factor: Scalar) -> jax.Array:
    """A gradient times a real factor, in the gradient's dtype."""
    return gradient * factor.astype(jnp.finfo(gradient.dtype).dtype)


def to_mean(value: Any) -> Mean:
    """Converts a scalar or `Mean` to a `Mean` with a constant weight, in f32 or wider."""
    if isinstance(value, Mean):
        weight = jax.lax.stop_gradient(widen(jnp.asarray(value.weight)))
        return Mean(widen(jnp.asarray(value.total)), weight)
    total = widen(jnp.asarray(value))
    return Mean(total, jnp.ones((), total.dtype))


def divide_mean(mean: Mean) -> Scalar:
    """`total / weight`; 0 if the weight is 0, so that an empty batch changes nothing."""
    return mean.total * inverse_weight(mean.weight)


def inverse_weight(weight: Scalar) -> Scalar:
    """`1 / weight`, or 0 if the weight is 0."""
    return jnp.where(weight == 0, 0.0, 1.0 / jnp.where(weight == 0, 1.0, weight))


def _check_output(value: Any, metrics: Mapping[str, Any]) -> None:
    problems = _scalar_problems("loss", value)
    for name, metric in metrics.items():
        if not isinstance(name, str):
            problems.append(Problem(f"metrics[{name!r}]", f"is named by {type(name).__name__}"))
        if name in RESERVED:
            problems.append(Problem(f"metrics[{name!r}]", "is a name that the step uses itself"))
        problems += _scalar_problems(f"metrics[{name!r}]", metric)
    fix = "return loss, or (loss, {name: scalar}); a loss is a scalar or sk.Mean(total, weight)"
    raise_all(StepError, "The loss does not return what a step can use.", problems, fix)


def _scalar_problems(subject: str, value: Any) -> list[Problem]:
    parts = (
        {".total": value.total, ".weight": value.weight} if isinstance(value, Mean) else {"": value}
    )
    problems = [
        Problem(subject + part, why)
        for part, x in parts.items()
        if (why := _explain_unfit(x, floating=subject == "loss" and part != ".weight"))
    ]
    for part, x in () if problems else parts.items():
        if isinstance(value, Mean) and jnp.result_type(x) == jnp.float16:
            why = "is f16[], which holds no sum above 65504"
            fix = "jnp.sum(losses, dtype=jnp.float32), or bfloat16"
            problems.append(Problem(subject + part, why, fix))
    return problems


def _explain_unfit(x: Any, *, floating: bool) -> str:
    """Why a step cannot use a value as a scalar; "" if it can.

    What is not differentiated, a weight (a count of rows or tokens) or a metric, may be an integer.
    """
    expected = "a floating-point scalar" if floating else "a real scalar"
    if not isinstance(x, _NUMBERS):
        return f"is of type {type(x).__name__}, not {expected}"
    dtype = jnp.result_type(x)
    real = not jnp.issubdtype(dtype, jnp.complexfloating)
    if jnp.shape(x) == () and (jnp.issubdtype(dtype, jnp.floating) if floating else real):
        return ""
    return f"is {short_type(jnp.shape(x), dtype)}, not {expected}"


def _split_output(out: Any) -> tuple[Any, Mapping[str, Any]]:
    if isinstance(out, tuple):
        if len(out) == 2 and isinstance(out[1], Mapping):
            return out[0], out[1]
        raise _output_error(out, "loss, or (loss, metrics dict)")
    return out, {}


def _split_stateful_output(out: Any) -> tuple[Any, Mapping[str, Any], Any]:
    if isinstance(out, tuple) and len(out) == 3 and isinstance(out[1], Mapping):
        return out
    raise _output_error(out, "(loss, metrics dict, model_state)")


def _output_error(out: Any, expected: str) -> StepError:
    types = map(describe_type, out if isinstance(out, tuple) else (out,))
    why = f"returned ({', '.join(types)}); expected {expected}"
    fix = "return loss, {'accuracy': accuracy}"
    return StepError.of("The loss does not return what a step can use.", "loss_fn", why, fix)
