"""What a loss may return, brought to one form.

A loss returns a scalar or `Mean`, alone or with a dict of metrics, and with the new `model_state`
when it is stateful. Inside the step all of them are an `LossOutput`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .._core.errors import Problem, StepError, format_problems, raise_all
from .._core.tree import short_type
from .._core.types import Loss, Mean
from ._unbound_axes import naming_axes

RESERVED = ("loss", "grad_norm", "skipped")
_NUMBERS = (jax.Array, np.ndarray, np.generic, int, float, complex)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossOutput:
    """One evaluation of a loss on some rows of a batch.

    Attributes:
      loss: `Mean`, f32[] each; a plain scalar loss has weight 1.
      metrics: `{name: Mean}`.
      model_state: mutable model state after the evaluation.
    """

    loss: Mean
    metrics: dict[str, Mean]
    model_state: Any


Objective = Callable[[Any, Any, Any, Any], tuple[jax.Array, LossOutput]]


def objective(
    loss_fn: Callable[..., Any], mesh: Mesh | None = None, *, evaluate: bool = False
) -> Objective:
    """Wraps a user's loss as `(params, model_state, batch, key) -> (total, Outcome)`.

    `total` is what gradients are taken of; dividing them by the summed weight afterwards gives
    the gradient of the mean, whatever the rows were split into.

    Raises (while it is traced):
      StepError: the loss is no scalar or `Mean`, metrics are no dict of scalars, a metric has a
        name that the step itself uses, or a collective of the loss names an axis that `mesh`
        does not have.
    """
    loss = loss_fn if isinstance(loss_fn, Loss) else Loss(loss_fn, loss_fn)
    call = loss.evaluate if evaluate else loss.train

    def run(params: Any, model_state: Any, batch: Any, key: Any) -> tuple[jax.Array, LossOutput]:
        with jax.named_scope("loss"), naming_axes(mesh):
            if loss.stateful:
                value, metrics, model_state = _three(call(params, batch, key, model_state))
            else:
                value, metrics = _two(call(params, batch, key))
        _check(value, metrics)
        mean = as_mean(value)
        named = {name: as_mean(metric) for name, metric in metrics.items()}
        return mean.total, LossOutput(mean, named, model_state)

    return run


def as_mean(value: Any) -> Mean:
    """Brings a scalar or `Mean` to a `Mean` of f32 scalars, its weight a constant."""
    if isinstance(value, Mean):
        weight = jax.lax.stop_gradient(jnp.asarray(value.weight, jnp.float32))
        return Mean(jnp.asarray(value.total, jnp.float32), weight)
    return Mean(jnp.asarray(value, jnp.float32), jnp.ones((), jnp.float32))


def value_of(mean: Mean) -> jax.Array:
    """`total / weight`; 0 where there is no weight, so that an empty batch changes nothing."""
    return mean.total * inverse(mean.weight)


def inverse(weight: jax.Array) -> jax.Array:
    """`1 / weight`, and 0 for a weight of 0."""
    return jnp.where(weight == 0, 0.0, 1.0 / jnp.where(weight == 0, 1.0, weight))


def _check(value: Any, metrics: Mapping[str, Any]) -> None:
    problems = _scalar_problems("loss", value)
    for name, metric in metrics.items():
        if name in RESERVED:
            problems.append(Problem(f"metrics[{name!r}]", "is a name that the step itself uses"))
        problems += _scalar_problems(f"metrics[{name!r}]", metric)
    fix = "return loss, or (loss, {name: scalar}); a loss is a scalar or sk.Mean(total, weight)"
    raise_all(StepError, "The loss does not return what a step can use.", problems, fix)


def _scalar_problems(subject: str, value: Any) -> list[Problem]:
    parts = (
        {".total": value.total, ".weight": value.weight} if isinstance(value, Mean) else {"": value}
    )
    return [
        Problem(subject + part, why) for part, x in parts.items() if (why := _unfit(subject, x))
    ]


def _unfit(subject: str, x: Any) -> str:
    """Why a value is no scalar that a step can use, or nothing."""
    if not isinstance(x, _NUMBERS):
        return f"is of type {type(x).__name__}, not a floating-point scalar"
    floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
    if jnp.shape(x) == () and (floating or subject != "loss"):
        return ""
    wanted = "a floating-point scalar" if subject == "loss" else "a scalar"
    return f"is {short_type(jnp.shape(x), jnp.result_type(x))}, not {wanted}"


def _two(out: Any) -> tuple[Any, Mapping[str, Any]]:
    if isinstance(out, tuple):
        if len(out) == 2 and isinstance(out[1], Mapping):
            return out[0], out[1]
        raise StepError(_form(out, "loss, or (loss, metrics dict)"))
    return out, {}


def _three(out: Any) -> tuple[Any, Mapping[str, Any], Any]:
    if isinstance(out, tuple) and len(out) == 3 and isinstance(out[1], Mapping):
        return out
    raise StepError(_form(out, "(loss, metrics dict, model_state)"))


def _form(out: Any, wanted: str) -> str:
    kinds = [type(x).__name__ for x in out] if isinstance(out, tuple) else [type(out).__name__]
    problem = Problem("loss_fn", f"returned ({', '.join(kinds)}); wanted {wanted}")
    return format_problems(
        "The loss does not return what a step can use.",
        [problem],
        "return loss, {'accuracy': accuracy}",
    )
