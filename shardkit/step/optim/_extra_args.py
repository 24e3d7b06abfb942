"""Calls an optimizer with everything that a step can give it beside the gradients.

Optimizers of optax ask by keyword: `value` and `grad` are the loss and its gradient;
`value_fn(params)` and `obj_fn(params)` compute the loss of other parameters on the same rows with
the same noise, `grad_fn(params, i)` its gradient. What a function computes that is never called is
not in the program.
"""

import inspect
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import optax

from ..._core.errors import Problem, ShardkitError, StepError, first_line, raise_all
from ..._core.tree import is_numeric, leaves_by_path
from ..._core.types import Params, PyTree, Scalar

ValueAndGrad = Callable[[Params], tuple[Scalar, Params]]

# A chain accepts every keyword and passes all to each link. `sam` takes `grad_fn` alone, and line
# searches refuse what their `value_fn` does not take.
_FEWER = (("value", "grad", "value_fn"), ("grad_fn",), ())
_UNDRIVEN = "The optimizer cannot be driven."
_REFUSED = "nexpected keyword argument"


class LossAskedError(Exception):
    """An optimizer computes the loss itself, as line searches do, where there is none."""


def _refuse_loss(params: Params) -> NoReturn:
    raise LossAskedError


def call_init(optimizer: optax.GradientTransformation, params: Params) -> PyTree:
    """Returns the state that an optimizer starts with, in buffers of its own.

    Raises StepError if it fails on these parameters, or has something else than arrays in it.
    """
    try:
        opt_state = optimizer.init(params)
    except ShardkitError:
        raise
    except Exception as error:
        why = f"cannot be initialised: {_reason(error)}"
        fix = "masks, labels and other trees of the optimizer like the parameters"
        raise StepError.of(_UNDRIVEN, _place(error), why, fix) from error
    fix = "jnp.asarray(...) in its init"
    problems = [
        Problem(path, f"is of type {type(x).__name__}, not an array", fix)
        for path, x in leaves_by_path(opt_state, "opt_state").items()
        if not is_numeric(x)
    ]
    raise_all(StepError, "The state of the optimizer does not consist of arrays.", problems)
    return jax.tree.map(lambda x: jnp.array(x, copy=True), opt_state)


def call_update(
    optimizer: optax.GradientTransformation,
    grads: Params,
    opt_state: PyTree,
    params: Params,
    value: Scalar,
    *,
    value_and_grad: ValueAndGrad = _refuse_loss,
) -> tuple[Params, PyTree]:
    """Returns the updates and the new state of any optax chain, from gradients of the mean loss.

    The loss is `value`, f32[]; `value_and_grad` gives loss and gradient of other parameters, on the
    same rows, or raises LossAskedError by default. Raises StepError if the optimizer asks for
    something else, or cannot take gradients of a mean.
    """
    offered = _offer(grads, value, value_and_grad)
    given = {name: x for name, x in offered.items() if _accepts(optimizer.update, name)}
    for names in (tuple(given), *_FEWER):
        extra_args = {name: given[name] for name in names if name in given}
        try:
            result = optimizer.update(grads, opt_state, params, **extra_args)
        except (ShardkitError, LossAskedError):
            raise
        except Exception as error:
            if names and _REFUSED in str(error):
                continue
            raise _explain(error, list(offered)) from error
        if isinstance(result, tuple) and len(result) == 2:
            return result
        why = f"returns a {type(result).__name__}, not a pair of updates and new state"
        fix = "return updates, state from update"
        raise StepError.of(_UNDRIVEN, "optimizer", why, fix)
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


def _explain(error: Exception, offered: list[str]) -> StepError:
    """The error of an optimizer that fails, with the transformation that raised it."""
    given = f"A step gives {', '.join(offered)}, and gradients of a mean"
    fix = "an optimizer that asks for no more, such as optax.adamw(1e-3)"
    why = f"cannot be updated: {_reason(error)}. {given}"
    return StepError.of(_UNDRIVEN, _place(error), why, fix)


def _place(error: Exception) -> str:
    names = [frame.f_code.co_qualname for frame, _ in traceback.walk_tb(error.__traceback__)]
    owners = [name.split(".<locals>")[0] for name in names if ".<locals>" in name]
    links = [owner for owner in owners if owner not in ("chain", "with_extra_args_support")]
    # The first frame is a function of this file.
    links = [owner for owner in links if not owner.startswith("call_")]
    return f"optimizer ({links[-1]})" if links else "optimizer"


def _reason(error: Exception) -> str:
    return first_line(error).rstrip(".").replace(".<locals>.update_fn()", "")
