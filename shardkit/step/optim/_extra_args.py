"""Calls an optimizer with everything that a step can give it beside the gradients.

Optimizers of optax ask by keyword: `value` and `grad` are the loss and its gradient;
`value_fn(params)` and `obj_fn(params)` compute the loss of other parameters on the same rows with
the same noise, `grad_fn(params, i)` its gradient. What a function computes that is never called is
not in the program.
"""

import inspect
import traceback
from collections.abc import Callable
from typing import Any

import jax
import optax

from ..._core.errors import Problem, ShardkitError, StepError, first_line, format_problems
from ..._core.types import Params, PyTree, Scalar

ValueAndGrad = Callable[[Params], tuple[Scalar, Params]]

# A chain accepts every keyword and passes all to each link. `sam` takes `grad_fn` alone, and line
# searches refuse what their `value_fn` does not take.
_FEWER = (("value", "grad", "value_fn"), ("grad_fn",), ())
_REFUSED = "nexpected keyword argument"


def call_update(
    optimizer: optax.GradientTransformation,
    grads: Params,
    opt_state: PyTree,
    params: Params,
    value: Scalar,
    *,
    value_and_grad: ValueAndGrad,
) -> tuple[Params, PyTree]:
    """Returns the updates and the new state of an optimizer.

    Args:
      optimizer: any optax chain.
      grads: gradients of the mean loss.
      opt_state: its state.
      params: at which the gradients were computed.
      value: f32[], the mean loss.
      value_and_grad: loss and gradient of other parameters, on the same rows.

    Raises:
      StepError: the optimizer asks for something else, or cannot take gradients of a mean.
    """
    offered = _offer(grads, value, value_and_grad)
    given = {name: x for name, x in offered.items() if _accepts(optimizer.update, name)}
    for names in (tuple(given), *_FEWER):
        extra_args = {name: given[name] for name in names if name in given}
        try:
            return optimizer.update(grads, opt_state, params, **extra_args)
        except ShardkitError:
            raise
        except (TypeError, ValueError, NotImplementedError) as error:
            if names and _REFUSED in str(error):
                continue
            raise StepError(_explain(error, list(offered))) from error
    raise AssertionError("the last attempt, without names, returns or raises")


def _offer(grads: Params, value: Scalar, value_and_grad: ValueAndGrad) -> dict[str, Any]:
    """Everything that an optimizer may ask for, by keyword."""

    @jax.custom_vjp
    def value_fn(params: Params) -> Scalar:
        return value_and_grad(params)[0]

    def backward(grads: Params, cotangent: Scalar) -> tuple[Params]:
        return (jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), grads),)

    value_fn.defvjp(value_and_grad, backward)

    def grad_fn(params: Params, _: Any = None) -> Params:
        return value_and_grad(params)[1]

    functions = {"value_fn": value_fn, "obj_fn": value_fn, "grad_fn": grad_fn}
    return {"value": value, "grad": grads, **functions}


def _accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a function accepts a keyword argument."""
    parameters = inspect.signature(function).parameters
    catches_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return catches_all or name in parameters


def _explain(error: Exception, offered: list[str]) -> str:
    """The message of an optimizer that fails, with the transformation that raised it."""
    names = [frame.f_code.co_qualname for frame, _ in traceback.walk_tb(error.__traceback__)]
    owners = [name.split(".<locals>")[0] for name in names if ".<locals>" in name]
    links = [owner for owner in owners if owner not in ("chain", "with_extra_args_support")]
    reason = first_line(error).rstrip(".").replace(".<locals>.update_fn()", "")
    where = f"optimizer ({links[-1]})" if links else "optimizer"
    why = f"cannot be updated: {reason}. A step gives {', '.join(offered)}, and gradients of a mean"
    fix = "an optimizer that asks for no more, such as optax.adamw(1e-3)"
    return format_problems("The optimizer cannot be driven.", [Problem(where, why, fix)])
