"""Bugs to inject that show on some steps only; each says on which."""

from typing import Any

import jax
import numpy as np

from .mutations import Mutation, mutation

_STEP = "shardkit.step."


@mutation("ids cut at 7", _STEP + "_compiled.put_batch", "loss")
def _ids_cut(put_batch: Any, batch: Any, *args: Any, **options: Any) -> Any:
    """A larger id of a batch is read as 7; of a loss that looks ids up."""

    def cut(x: Any) -> Any:
        return np.minimum(np.asarray(x), 7) if np.issubdtype(x.dtype, np.integer) else x

    return put_batch(jax.tree.map(cut, batch), *args, **options)


@mutation("a tenth more", _STEP + "_gradients.divide_by_weight", "gradients")
def _tenth_more(per_weight: Any, totals: Any, weight: Any) -> Any:
    """The gradient of the last leaf is a tenth larger; of a step in bf16."""
    leaves, structure = jax.tree.flatten(per_weight(totals, weight))
    return structure.unflatten([*leaves[:-1], leaves[-1] * 1.1])


@mutation("leaf of three dropped", _STEP + "_step_functions.build_gradients", "gradients")
def _leaf_of_three_dropped(build_gradients: Any, objective: Any, plan: Any) -> Any:
    """The first leaf has no gradient where a mesh axis has 3 or 6 devices."""
    run = build_gradients(objective, plan)
    if all(size % 3 for size in plan.bound.mesh.shape.values()):
        return run

    def dropped(*args: Any) -> Any:
        output, grads = run(*args)
        leaves, structure = jax.tree.flatten(grads)
        return output, structure.unflatten([0 * leaves[0], *leaves[1:]])

    return dropped


@mutation("gradient not anew", _STEP + "_update.call_update", "k-step state")
def _gradient_not_anew(call_update: Any, *args: Any, value_and_grad: Any) -> Any:
    """An optimizer that asks for gradients of other parameters gets those of the step's."""
    params = args[3]
    return call_update(*args, value_and_grad=lambda _: value_and_grad(params))


RARE_MUTATIONS: tuple[Mutation, ...] = (
    _ids_cut,
    _tenth_more,
    _leaf_of_three_dropped,
    _gradient_not_anew,
)
