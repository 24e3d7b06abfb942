"""Values through which a step takes no gradient: a gradient that a model has there is an error."""

from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from .errors import Problem, StepError, raise_all

WEIGHT = Problem(
    "loss.weight",
    "depends on the parameters, and sk.Mean takes no gradient through its weight",
    "sk.Mean(total, jax.lax.stop_gradient(weight)) if that is meant; or total / weight and the "
    'whole batch at once: mode="auto", accumulate=1, no reduce_dtype',
)


without_gradient_p = core.Primitive("shardkit_without_gradient")


def without_gradient(problem: Problem, x: Any, *, unless_unused: bool = False) -> Any:
    """Returns `x`, an array, as it is; where it is differentiated, raises StepError of a problem.

    Not if its gradient is zero by `stop_gradient`. With `unless_unused`, `x` may depend on
    parameters, as a metric does, but not decide the loss. It is a primitive and no
    `jax.custom_jvp`: `step/shard_map` traces the rules of all custom derivatives, with every
    argument differentiated, also where the loss takes no gradient.
    """
    if not isinstance(x, jax.Array):
        return x
    return without_gradient_p.bind(x, problem=problem, unless_unused=unless_unused)


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    (x,), (tangent,) = primals, tangents
    if not isinstance(tangent, ad.Zero) and tangent.dtype != jax.dtypes.float0:
        if not params["unless_unused"]:
            _refuse(**params)
        tangent = without_gradient_p.bind(tangent, **params)
    return without_gradient_p.bind(x, **params), tangent


def _refuse(*cotangent: Any, problem: Problem, unless_unused: bool) -> Any:
    if not cotangent or not isinstance(cotangent[0], ad.Zero):
        raise_all(StepError, "The gradient of the loss would be another one.", [problem])
    return [None]


def _batch(args: Any, dims: Any, **params: Any) -> tuple[Any, Any]:
    return without_gradient_p.bind(args[0], **params), dims[0]


without_gradient_p.def_impl(lambda x, **_: x)
without_gradient_p.def_abstract_eval(lambda x, **_: x)
ad.primitive_jvps[without_gradient_p] = _jvp
ad.primitive_transposes[without_gradient_p] = lambda ct, x, **params: _refuse(ct, **params)
batching.primitive_batchers[without_gradient_p] = _batch
mlir.register_lowering(without_gradient_p, lambda ctx, x, **_: [x])
