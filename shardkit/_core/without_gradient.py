"""Values through which a step takes no gradient: a gradient that a model has there is an error."""

import functools
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

from .errors import Problem, StepError, raise_all

WEIGHT = Problem(
    "loss.weight",
    "depends on the parameters, and sk.Mean takes no gradient through its weight",
    "sk.Mean(total, jax.lax.stop_gradient(weight)) if that is meant; or total / weight and the "
    'whole batch at once: mode="auto", accumulate=1, no reduce_dtype',
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def without_gradient(problem: Problem, x: Any) -> Any:
    """Returns `x`, an array, as it is.

    Raises (where it is differentiated, and its gradient is not zero by `stop_gradient`):
      StepError: the problem.
    """
    return x


@functools.partial(without_gradient.defjvp, symbolic_zeros=True)
def _refuse_gradient(problem: Problem, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (tangent,) = primals, tangents
    if not isinstance(tangent, SymbolicZero) and tangent.dtype != jax.dtypes.float0:
        raise_all(StepError, "The gradient of the loss would be another one.", [problem])
    return x, tangent
