"""Bugs to inject that show on some steps only; each says on which."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .mutations import Mutation


def _cut_ids(put_batch: Any) -> Any:
    def cut(x: Any) -> Any:
        return np.minimum(np.asarray(x), 7) if np.issubdtype(x.dtype, np.integer) else x

    return lambda batch, *args, **options: put_batch(jax.tree.map(cut, batch), *args, **options)


def _scale_last_leaf(per_weight: Any) -> Any:
    def scaled(totals: Any, weight: Any) -> Any:
        leaves, structure = jax.tree.flatten(per_weight(totals, weight))
        return structure.unflatten([*leaves[:-1], leaves[-1] * 1.1])

    return scaled


def _drop_leaf_of_three(build_gradients: Any) -> Any:
    def wrong(objective: Any, plan: Any) -> Any:
        run = build_gradients(objective, plan)
        if all(size % 3 for size in plan.bound.mesh.shape.values()):
            return run

        def dropped(*args: Any) -> Any:
            output, grads = run(*args)
            leaves, structure = jax.tree.flatten(grads)
            return output, structure.unflatten([0 * leaves[0], *leaves[1:]])

        return dropped

    return wrong


def _keep_first_gradient(call_update: Callable[..., Any]) -> Any:
    def wrong(*args: Any, value_and_grad: Any) -> Any:
        params = args[3]
        return call_update(*args, value_and_grad=lambda _: value_and_grad(params))

    return wrong


_STEP = "shardkit.step."

RARE_MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "ids cut at 7",
        "a larger id of a batch is read as 7; of a loss that looks ids up",
        ("loss",),
        ((_STEP + "_compiled.put_batch", _cut_ids),),
    ),
    Mutation(
        "a tenth more",
        "the gradient of the last leaf is a tenth larger; of a step in bf16",
        ("gradients",),
        ((_STEP + "_gradients.divide_by_weight", _scale_last_leaf),),
    ),
    Mutation(
        "leaf of three dropped",
        "the first leaf has no gradient where a mesh axis has 3 or 6 devices",
        ("gradients",),
        ((_STEP + "_step_functions.build_gradients", _drop_leaf_of_three),),
    ),
    Mutation(
        "gradient not anew",
        "an optimizer that asks for gradients of other parameters gets those of the step's",
        ("k-step state",),
        ((_STEP + "_update.call_update", _keep_first_gradient),),
    ),
)
