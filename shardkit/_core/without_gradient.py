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


def without_gradient(problem: Problem, x: Any) -> Any:
    """Returns `x`, an array, as it is.

    It is a primitive and no `jax.custom_jvp`: `step/shard_map` traces the rules of all custom
    derivatives, with every argument differentiated, also where the loss takes no gradient.

    Raises (where it is differentiated, and its gradient is not zero by `stop_gradient`):
      StepError: the problem.
    """
    return without_gradient_p.bind(x, problem=problem) if isinstance(x, jax.Array) else x


def _refuse_gradient(primals: Any, tangents: Any, *, problem: Problem) -> tuple[Any, Any]:
    (x,), (tangent,) = primals, tangents
    if not isinstance(tangent, ad.Zero) and tangent.dtype != jax.dtypes.float0:
        raise_all(StepError, "The gradient of the loss would be another one.", [problem])
    return without_gradient_p.bind(x, problem=problem), tangent


def _batch(args: Any, dims: Any, *, problem: Problem) -> tuple[Any, Any]:
    return without_gradient_p.bind(args[0], problem=problem), dims[0]


without_gradient_p.def_impl(lambda x, *, problem: x)
without_gradient_p.def_abstract_eval(lambda x, *, problem: x)
ad.primitive_jvps[without_gradient_p] = _refuse_gradient
batching.primitive_batchers[without_gradient_p] = _batch
mlir.register_lowering(without_gradient_p, lambda ctx, x, *, problem: [x])
