"""The loss and its gradients with explicit collectives: one `shard_map` over the whole mesh.

Inside, every array is one device's shard, and JAX checks of each value over which mesh axes it may
differ (`check_vma=True`): a sum that is missing or made twice is a type error, not a wrong number.
Parameters are typed as differing over the axes that split rows before they are differentiated,
so no gradient is reduced on the way; `reduce_gradients` is the one place that does. Only weights
that layers gather have theirs scattered there, by the transposition of the gather.

The update is not in here: it works on the global arrays that come out, laid out as the
parameters are, so that a norm is the norm of all devices.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ..._core.precision import cast_floats
from ..._core.split_rng import part_keys, threefry_words
from ...nn._manual_axis_rules import gather_dim, pvary, use_manual_axis_rules
from .._gradients import GradientFn, per_weight
from .._objective import LossOutput, Objective
from ._buckets import reduce_gradients
from ._compressed import Summing
from ._outcome import reduce_outcome
from ._plan import ManualPlan


def shard_gradients(objective: Objective, plan: ManualPlan) -> GradientFn:
    """Builds `(params, model_state, batch, key) -> (Outcome, gradients of the mean loss)`.

    Gradients come in the dtype of the parameters, laid out as the parameters are.
    """
    results = (_of_outcome(plan), plan.gradients)
    return mapped(plan, functools.partial(_local_gradients, objective, plan), results)


def shard_objective(objective: Objective, plan: ManualPlan) -> Objective:
    """Builds the loss on shards as a loss on whole arrays, without its gradient."""

    def local(params: Any, model_state: Any, batch: Any, key: Any) -> tuple[jax.Array, LossOutput]:
        low = seen(plan, params)
        _, outcome = objective(low, model_state, batch, _own_key(plan, key))
        outcome = reduce_outcome(outcome, plan.rows)
        return outcome.loss.total, outcome

    return mapped(plan, local, (PartitionSpec(), _of_outcome(plan)))


def _of_outcome(plan: ManualPlan) -> Any:
    """Specs of an `LossOutput`."""
    whole: Any = PartitionSpec()
    return LossOutput(whole, whole, plan.specs[1])


def mapped(plan: ManualPlan, local: Callable[..., Any], results: Any) -> Any:
    """A function of shards as one of whole arrays `(params, model_state, batch, key)`."""

    def run(*args: Any) -> Any:
        with use_manual_axis_rules(plan.meaning):
            return local(*args)

    whole = PartitionSpec()
    arguments = (*plan.specs, whole)
    return jax.shard_map(run, mesh=plan.mesh, in_specs=arguments, out_specs=results)


def _local_gradients(
    objective: Objective, plan: ManualPlan, params: Any, model_state: Any, batch: Any, key: Any
) -> tuple[LossOutput, Any]:
    low = seen(plan, cast_floats(params, plan.bound.spec.precision.compute_dtype))
    outcome, totals = _accumulated(objective, plan, low, model_state, batch, key)
    dtype = plan.bound.spec.precision.reduce_dtype or plan.bound.spec.precision.compute_dtype
    flat, structure = jax.tree.flatten(totals)
    with jax.named_scope("reduce"):
        outcome = reduce_outcome(outcome, plan.rows)
        summing = Summing(plan.bound.spec.strategy.compression, model_state, outcome.loss.weight)
        flat = reduce_gradients(flat, plan.parameters, dtype, summing)
    outcome = dataclasses.replace(outcome, model_state=summing.model_state)
    totals = jax.tree.map(lambda g, p: g.astype(p.dtype), structure.unflatten(flat), params)
    return outcome, per_weight(totals, outcome.loss.weight)


def _accumulated(
    objective: Objective, plan: ManualPlan, params: Any, model_state: Any, batch: Any, key: Any
) -> tuple[LossOutput, Any]:
    """Loss and gradients of this device's rows, over all micro-batches, not reduced."""
    steps = plan.accumulate.micro_batches

    def one(rows: Any, at: Any) -> tuple[LossOutput, Any]:
        run = jax.value_and_grad(objective, has_aux=True)
        (_, outcome), totals = run(params, model_state, rows, _own_key(plan, at))
        return outcome, totals

    if steps == 1:
        return one(batch, jax.random.fold_in(key, 0) if plan.apart else key)

    def part(index: jax.Array) -> Any:
        rows = jax.tree.map(
            lambda x: (
                x.reshape(x.shape[0] // steps, steps, *x.shape[1:])[:, index] if x.ndim else x
            ),
            batch,
        )
        outcome, totals = one(rows, jax.random.fold_in(key, index))
        wide = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), totals)
        return outcome.loss, outcome.metrics, wide

    def body(carry: Any, index: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, part(index)), None

    (loss, metrics, totals), _ = jax.lax.scan(body, _zeros(part), jnp.arange(steps))
    return LossOutput(loss, metrics, model_state), totals


def _zeros(part: Callable[[jax.Array], Any]) -> Any:
    """Zeros of what one micro-batch gives, differing over the mesh axes that it differs over."""
    traced, shapes = jax.make_jaxpr(part, return_shape=True)(jnp.zeros((), jnp.int32))
    zeros = [
        pvary(jnp.zeros(a.shape, a.dtype), tuple(sorted(a.mat.varying))) for a in traced.out_avals
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), zeros)


def seen(plan: ManualPlan, params: Any) -> Any:
    """The parameters as the loss sees them: whole where layers do not gather them themselves."""
    flat, structure = jax.tree.flatten(params)
    made = []
    for x, one in zip(flat, plan.parameters, strict=True):
        for dim, axes in enumerate(one.whole):
            x = gather_dim(x, axes, dim) if axes else x
        made.append(pvary(x, one.differing))
    return structure.unflatten(made)


def _own_key(plan: ManualPlan, key: jax.Array) -> jax.Array:
    """A key whose draws are this device's parts of those of the whole."""
    lane, cut = (jax.lax.axis_index(a) if a else 0 for a in (plan.rows, plan.tokens))
    return part_keys(threefry_words(key), plan.draws, lane, jnp.uint32(0), cut)
