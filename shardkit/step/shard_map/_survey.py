"""Plans how a loss runs on shards, from a trace of it on whole arrays and traces of it on parts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from ..._core.split_rng import RandomDraws, draws_of, grown
from ..._core.types import Accumulate
from ...nn._manual_axis_rules import pvary
from .._activations import Activations
from .._bound_spec import BoundSpec
from .._layout import Layout
from .._objective import Objective
from ._gradients import mapped, seen, shard_gradients, shard_objective
from ._plan import ManualPlan, plan_of
from ._problems import check_declared


def gradients_on_shards(
    bound: BoundSpec, layout: Layout, objective: Objective, low: Any
) -> Callable[..., Any]:
    """The gradients of a loss as the step's spec has them; see `shard_plan`."""
    plan = shard_plan(bound, layout, objective, low, bound.spec.accumulate)
    return shard_gradients(objective, plan)


def evaluated_on_shards(
    bound: BoundSpec, layout: Layout, objective: Objective, low: Any
) -> Objective:
    """A loss of the whole batch, without micro-batches or gradients; see `shard_plan`."""
    plan = shard_plan(bound, layout, objective, low, Accumulate())
    return shard_objective(objective, plan)


def training_on_shards(
    bound: BoundSpec, layout: Layout, objective: Objective, low: Any
) -> Objective:
    """A loss of one micro-batch, with the draws of its gradient; see `shard_plan`."""
    plan = shard_plan(bound, layout, objective, low, bound.spec.accumulate)
    return shard_objective(objective, plan)


def shard_plan(
    bound: BoundSpec, layout: Layout, objective: Objective, low: Any, accumulate: Accumulate
) -> ManualPlan:
    """Plans how a loss runs on shards.

    Args:
      bound: the spec and its mesh.
      layout: every sharding.
      objective: the loss.
      low: abstract parameters as the loss sees them.
      accumulate: micro-batches.

    Raises:
      ShardingError: a constraint of the model cannot be met.
      StepError: explicit collectives cannot carry this out.
    """
    check_declared(bound, layout)
    args = (low, layout.state.model_state, layout.batch, layout.state.key)
    whole = jax.make_jaxpr(objective)(*args)
    rules = bound.spec.strategy.activations
    Activations(bound.mesh, rules, layout.row_axes).check(whole)
    plan = plan_of(bound, layout, whole, accumulate)
    return dataclasses.replace(plan, draws=_shard_draws(objective, plan, args, whole))


def _shard_draws(
    objective: Objective, plan: ManualPlan, args: tuple[Any, ...], whole: Any
) -> RandomDraws:
    """Finds which draws of a loss grow, from abstract `(params, model_state, batch, key)`.

    The loss on shards is traced on a micro-batch and on one whose every device has all of its
    rows; and, where a device also holds a slice of the length, on whole arrays.

    Args:
      objective: the loss.
      plan: without draws.
      args: abstract arguments, with the rows of the global batch.
      whole: the loss traced on whole arrays; one without draws is not traced again.

    Raises:
      StepError: the randomness of the loss cannot be split.
    """
    lanes, slices = plan.count(plan.rows), plan.count(plan.tokens)
    if not draws_of(whole.jaxpr):
        return RandomDraws(lanes, slices=slices)
    params, model_state, batch, key = args

    def rows(times: int, over: int) -> Any:
        def cut(x: Any) -> Any:
            shape = (x.shape[0] * times // over, *x.shape[1:]) if x.shape else ()
            return jax.ShapeDtypeStruct(shape, x.dtype)

        return jax.tree.map(cut, batch)

    def local(params: Any, model_state: Any, batch: Any, key: Any) -> jax.Array:
        total, _ = objective(seen(plan, params), model_state, batch, key)
        return pvary(total, plan.mesh.axis_names)[None]

    steps = plan.accumulate.micro_batches
    on_shards = mapped(plan, local, PartitionSpec(plan.mesh.axis_names))
    part = draws_of(jax.make_jaxpr(on_shards)(params, model_state, rows(1, steps), key).jaxpr)
    draws = RandomDraws(lanes, slices=slices)
    if lanes > 1:
        more = draws_of(
            jax.make_jaxpr(on_shards)(params, model_state, rows(lanes, steps), key).jaxpr
        )
        draws = dataclasses.replace(draws, grown=grown(part, more, lanes))
    if slices > 1:
        one = draws_of(
            jax.make_jaxpr(objective)(params, model_state, rows(1, steps * lanes), key).jaxpr
        )
        draws = dataclasses.replace(draws, sliced=grown(part, one, slices))
    return draws
