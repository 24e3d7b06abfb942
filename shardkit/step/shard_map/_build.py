"""Builds a loss or its gradients on shards, from traces on whole arrays and on shards."""

import dataclasses
from collections.abc import Callable

import jax
from jax.extend import core
from jax.sharding import PartitionSpec

from ..._core.draws import Draw, list_draws, match_dims, trace_in_part
from ..._core.row_dims import resize_rows
from ..._core.split_rng import RandomDraws
from ..._core.types import Accumulate, Batch, Key, Params, PyTree
from ...nn._manual_axis_rules import ShardMapLoss, pvary
from .._activations import Activations
from .._bound_spec import BoundSpec
from .._gradients import GradientFn, LossArgs
from .._layout import StepLayout
from .._objective import Objective
from ._gradients import build_local_gradients, build_local_objective, gather_params, map_shards
from ._plan import ShardMapPlan, build_plan
from ._problems import check_supported, own_sharding_problems, raise_problems
from ._typed_loss import type_loops


def build_on_shards(
    bound: BoundSpec,
    layout: StepLayout,
    objective: Objective,
    args: LossArgs,
    *,
    accumulate: Accumulate,
    gradients: bool = False,
) -> Objective | GradientFn:
    """Builds a loss of one micro-batch, or the gradients of all, from traces on whole arrays.

    Arguments are abstract, with the rows of the global batch. Raises ShardingError for a constraint
    of the model that cannot be met, StepError for a spec or model that `shard_map` mode does not
    support.
    """
    check_supported(bound, layout)
    whole = jax.make_jaxpr(objective)(*args)
    if not isinstance(bound.spec.loss_fn, ShardMapLoss):
        raise_problems(bound, list(own_sharding_problems(whole.jaxpr)))
    rules = bound.spec.strategy.activations
    Activations(bound.mesh, rules, layout.row_axes).check(whole)
    plan = build_plan(bound, layout, whole, accumulate)
    is_local = isinstance(bound.spec.loss_fn, ShardMapLoss)
    local = type_loops(objective, bound.mesh, plan.row_axes, whole, is_local=is_local)
    draws = _match_draws(objective, local, plan, args, whole)
    build = build_local_gradients if gradients else build_local_objective
    return build(local, dataclasses.replace(plan, draws=draws))


def _match_draws(
    objective: Objective,
    local: Objective,
    plan: ShardMapPlan,
    args: LossArgs,
    whole: core.ClosedJaxpr,
) -> RandomDraws:
    """Finds which draws of a loss grow with its rows and with their length.

    With 8 rows, 2 micro-batches, 2 gradient shards and 2 slices of a length of 6, it compares the
    draws of one device, `[2, 3]`, with

        `[4, 3]`   on shards, every device having all rows: dim 0 grows with the rows
        `[2, 6]`   on whole arrays, with one device's rows: dim 1 grows with the length

    `whole` is the loss traced on whole arrays; one without draws is not traced again. Raises
    StepError if the randomness of the loss cannot be split.
    """
    shards, slices = plan.count(plan.row_axes), plan.count(plan.token_axes)
    draws = RandomDraws(shards, length_shards=slices)
    if shards == slices == 1 or not list_draws(whole.jaxpr):
        return draws
    params, model_state, batch, key = args

    def total_of(params: Params, model_state: PyTree, batch: Batch, key: Key) -> jax.Array:
        # As the keys that devices get, or JAX takes no gamma draw of what rows decide.
        key = pvary(key, plan.row_axes)
        total, _ = local(gather_params(plan, params), model_state, batch, key)
        return pvary(total, plan.mesh.axis_names)[None]

    def trace_draws(run: Callable[..., PyTree], times: int, over: int) -> list[Draw]:
        """Draws of a function for `times / over` of the global batch."""
        resized = resize_rows(batch, plan.row_dims, times, over)
        return list_draws(trace_in_part(run, (params, model_state, resized, key))[0].jaxpr)

    steps = plan.accumulate.micro_batches
    on_shards = map_shards(plan, total_of, PartitionSpec(plan.mesh.axis_names))
    of_device = trace_draws(on_shards, 1, steps)
    if shards > 1:
        of_all_rows = trace_draws(on_shards, shards, steps)
        followed = plan.bound.follows_rows
        row_dims = match_dims(of_device, of_all_rows, shards, folds_followed=followed)
        draws = dataclasses.replace(draws, row_dims=row_dims)
    if slices > 1:
        of_whole_length = trace_draws(objective, 1, steps * shards)
        draws = dataclasses.replace(
            draws, length_dims=match_dims(of_device, of_whole_length, slices)
        )
    return draws
