"""Gradients of one batch: at once, or over micro-batches and gradient shards with one reduction.

A gradient shard is the part of a micro-batch whose gradients are kept apart until the reduction:
the rows of one device. With 8 rows, k=2 micro-batches and 2 devices along the batch axes:

    batch leaf        [8, …]     rows 0 … 7
    micro-batch 0     [4, …]     rows 0 2 4 6        `micro_batch`
    gradient shards   [2, 2, …]  rows (0 2) (4 6)    `split_shards`, dim 0 over the batch axes
    their gradients   [2, *param]                    one per device, not reduced yet
    gradients         [*param]                       `reduce_shards`, once per step
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from .._core.draws import list_draws, match_draws
from .._core.precision import Precision, cast_floats, policy_dtype, widen
from .._core.rewriting import rewrite
from .._core.row_dims import map_rows, resize_rows, with_dim
from .._core.split_rng import RandomDraws, per_shard_keys
from .._core.types import Batch, Key, Params, PyTree, Scalar
from ..nn._constrain import GRADIENT_SHARDS
from ..rules import axes_of
from ._bound_spec import BoundSpec
from ._layout import StepLayout
from ._objective import LossOutput, Objective, inverse_weight, scale_gradient, value_and_grad
from ._ordered import refuse_ordered
from ._own_constraints import move_to_shards
from ._shard_convolutions import on_shards, on_their_devices

LossArgs = tuple[Params, PyTree, Batch, Key]  # params, model_state, batch, key
LossAndGradients = tuple[LossOutput, Params]
GradientFn = Callable[[Params, PyTree, Batch, Key], LossAndGradients]
OF_MEAN = 1  # the weight of gradients of a mean


class TracedLoss(NamedTuple):
    """A loss of the whole batch, traced."""

    jaxpr: core.Jaxpr
    output: LossOutput
    # `{"loss" or metric: power of the rows with which it grows}`, where that is not 0
    growth: Mapping[str, int] = {}


@dataclasses.dataclass(frozen=True)
class GradientPlan:
    """How the gradients of a step are split and reduced."""

    bound: BoundSpec  # the spec and its mesh
    layout: StepLayout  # shardings of state, batch and gradients
    traced: TracedLoss | None = None  # the loss; None if the step splits no rows
    # which random draws of the loss grow with its rows
    draws: RandomDraws = dataclasses.field(default_factory=lambda: RandomDraws(1))

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches per step."""
        return self.bound.spec.accumulate.micro_batches

    @property
    def precision(self) -> Precision:
        """Compute and reduction dtypes."""
        return self.bound.spec.precision

    @property
    def per_shard_accumulation(self) -> bool:
        """Whether gradients are kept apart by gradient shard until one reduction."""
        reduce_separately = self.micro_batches > 1 or self.precision.reduces_separately
        return reduce_separately and self.bound.spec.accumulate.reduce == "end"

    @property
    def num_shards(self) -> int:
        """Number of gradient shards of a micro-batch: devices along `shard_axes`."""
        return math.prod(self.bound.mesh.shape[axis] for axis in self.layout.shard_axes)

    @property
    def shards_of_rows(self) -> tuple[list[int], list[int]]:
        """Sizes of the axes of shards in the order that rows have them, and where each one is."""
        in_rows = [axis for axis in self.layout.row_axes if axis in self.layout.shard_axes]
        sizes = [self.bound.mesh.shape[axis] for axis in in_rows]
        return sizes, [in_rows.index(axis) for axis in self.layout.shard_axes]


def build_gradients(objective: Objective, plan: GradientPlan) -> GradientFn:
    """Builds `(params, model_state, batch, key) -> (LossOutput, gradients of the mean loss)`.

    Gradients have the dtype of the parameters and the shardings `plan.layout.gradients`.
    """
    accumulate = _accumulate_per_shard if plan.per_shard_accumulation else _accumulate_whole

    def run(params: Params, model_state: PyTree, batch: Batch, key: Key) -> LossAndGradients:
        # Constrain the cast parameters, so that a gather for their use moves the compute dtype.
        compute_params = cast_floats(params, plan.precision.compute_dtype)
        compute_params = constrain_tree(compute_params, plan.layout.shardings.params)
        partition = plan.layout.partition
        of_trained = partition.of_trained(objective, compute_params)
        args = partition.trained(compute_params), model_state, batch, key
        output, grads = accumulate(of_trained, plan, args)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, partition.trained(params))
        return output, constrain_tree(grads, plan.layout.gradients)

    return run


def plan_draws(objective: Objective, plan: GradientPlan, args: LossArgs) -> GradientPlan:
    """Completes a plan by which random draws of the loss, of abstract `args`, grow with its rows.

    Raises StepError if the randomness of the loss cannot be split by gradient shard.
    """
    if plan.traced is not None and not list_draws(plan.traced.jaxpr):
        return dataclasses.replace(plan, draws=RandomDraws(plan.num_shards))
    params, model_state, batch, key = args
    dims, k, n = plan.layout.row_dims, plan.micro_batches, plan.num_shards

    def args_with(shards: int) -> LossArgs:
        return params, model_state, resize_rows(batch, dims, 1, k * shards), key

    followed = plan.bound.follows_rows
    draws = match_draws(objective, n, args_with(n), args_with(1), folds_followed=followed)
    return dataclasses.replace(plan, draws=draws)


def keep_convolutions(
    run: Callable[..., PyTree], bound: BoundSpec, layout: StepLayout
) -> Callable[..., PyTree]:
    """Keeps convolutions of a function of global arrays from what XLA's partitioner gets wrong.

    Its trace raises StepError for one that is where it cannot be kept from the partitioner.
    """
    return rewrite(run, on_their_devices(bound.mesh, layout.row_axes))


def micro_batch(batch: Batch, steps: int, index: jax.Array, plan: GradientPlan) -> Batch:
    """Rows `index, index+steps, …` of every leaf: local to a device, the same on any mesh."""

    def take(x: jax.Array, dim: int, sharding: NamedSharding) -> jax.Array:
        entries = _full_spec(sharding, x.ndim)
        strided = x.reshape(with_dim(x.shape, dim, x.shape[dim] // steps, steps))
        strided = _constrain_array(strided, plan, with_dim(entries, dim, entries[dim], None))
        return jax.lax.dynamic_index_in_dim(strided, index, dim + 1, keepdims=False)

    layout = plan.layout
    return map_rows(take, batch, layout.row_dims, layout.batch_shardings) if steps > 1 else batch


def split_shards(batch: Batch, plan: GradientPlan) -> Batch:
    """`[rows, …] → [num_shards, rows/num_shards, …]`, the new dim over `shard_axes`.

    Rows that are over `("data", "fsdp")` are those of the same device over `("fsdp", "data")`.
    """
    layout, n = plan.layout, plan.num_shards
    axes = layout.shard_axes, layout.inner_axes or None
    sizes, order = plan.shards_of_rows

    def split(x: jax.Array, dim: int, sharding: NamedSharding) -> jax.Array:
        rows = x.shape[dim] // n
        shards = x.reshape(with_dim(x.shape, dim, *sizes, rows))
        shards = jnp.moveaxis(
            shards, [dim + i for i in order], [dim + i for i in range(len(order))]
        )
        shards = shards.reshape(with_dim(x.shape, dim, n, rows))
        return _constrain_array(shards, plan, with_dim(_full_spec(sharding, x.ndim), dim, *axes))

    return map_rows(split, batch, layout.row_dims, layout.batch_shardings)


def reduce_shards(grads: PyTree, params: Params, dtype: str | None) -> Params:
    """Sums gradients `[num_shards, *param]` of the mean loss over dim 0: a step's one reduction.

    In `dtype`, that of the policy; if None, in that of each of `params`, as they are computed.
    """

    def reduce(x: jax.Array, p: jax.Array) -> jax.Array:
        # `jnp.sum` would sum bf16 in f32, and the all-reduce would move f32.
        x = x.astype(policy_dtype(p.dtype, dtype))
        return jax.lax.reduce(x, jnp.zeros((), x.dtype), jax.lax.add, (0,))

    return jax.tree.map(reduce, grads, params)


def divide_by_weight(totals: Params, weight: Scalar | int) -> Params:
    """Divides gradients of a weighted sum by the weight; zeros if the weight is 0.

    Gradients of a mean have the weight `OF_MEAN`. Nothing multiplies them: the compiler would blame
    that product, and no line of the model, for what it moves between the loss and the optimizer.
    """
    if isinstance(weight, int):
        return totals
    scale = inverse_weight(weight)
    return jax.tree.map(lambda g: scale_gradient(g, scale), totals)


def _accumulate_whole(objective: Objective, plan: GradientPlan, args: LossArgs) -> LossAndGradients:
    """Averages over whole micro-batches; the partitioner places the reductions."""
    params, model_state, batch, key = args
    steps = plan.micro_batches
    differentiate = value_and_grad(objective, whole=steps == 1, of_means=True)
    run_gradient = keep_convolutions(differentiate, plan.bound, plan.layout)
    if steps == 1:
        output, grads = run_gradient(params, model_state, batch, key)
        return output, divide_by_weight(grads, OF_MEAN)

    def run_micro_batch(model_state: PyTree, index: jax.Array) -> LossAndGradients:
        rows = micro_batch(batch, steps, index, plan)
        micro_key = jax.random.fold_in(key, index)
        output, totals = run_gradient(params, model_state, rows, micro_key)
        return output, constrain_tree(totals, plan.layout.gradients)

    def body(carry: LossAndGradients, index: jax.Array) -> tuple[LossAndGradients, None]:
        return _add_micro_batch(carry, run_micro_batch(carry[0].model_state, index)), None

    output, totals = _make_zeros(plan, params)
    start = (
        LossOutput(output.loss, output.metrics, model_state),
        constrain_tree(totals, plan.layout.gradients),
    )
    (output, totals), _ = jax.lax.scan(body, start, jnp.arange(steps))
    return output, divide_by_weight(totals, output.loss.weight)


def _accumulate_per_shard(
    objective: Objective, plan: GradientPlan, args: LossArgs
) -> LossAndGradients:
    """Sums each gradient shard over all micro-batches, then reduces over the shards once.

    The model state is one that the loss does not change; see `check_fixed_state`.
    """
    params, model_state, batch, key = args

    def without_state(*args: Any) -> tuple[Scalar, LossOutput]:
        total, output = objective(*args)
        return total, dataclasses.replace(output, model_state={})

    steps, run_gradient = plan.micro_batches, value_and_grad(without_state)
    axes = plan.layout.shard_axes
    mesh = plan.bound.mesh
    # After derivative rules of the user's own have been applied.
    changes = {**move_to_shards(axes), **on_shards(mesh, axes), **refuse_ordered(mesh)}
    run_shard = rewrite(run_gradient, changes)
    sizes, order = plan.shards_of_rows
    number_of_rows = np.arange(plan.num_shards).reshape(sizes).transpose(order).ravel()

    def run_micro_batch(index: jax.Array) -> tuple[LossOutput, PyTree]:
        rows = split_shards(micro_batch(batch, steps, index, plan), plan)
        own = key if steps == 1 else jax.random.fold_in(key, index)
        keys = per_shard_keys(own, plan.draws)[number_of_rows]
        run_shards = jax.vmap(
            run_shard,
            in_axes=(None, None, jax.tree.structure(rows).unflatten(plan.layout.row_dims), 0),
            axis_name=GRADIENT_SHARDS,
            spmd_axis_name=axes or None,
        )
        output, totals = run_shards(params, model_state, rows, keys)
        return output, _constrain_shards(totals, plan)

    def body(carry: PyTree, index: jax.Array) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, carry, run_micro_batch(index)), None

    if steps == 1:
        output, totals = run_micro_batch(jnp.zeros((), jnp.int32))
    else:
        output, totals = _make_zeros(plan, params, plan.num_shards)
        start = output, _constrain_shards(totals, plan)
        (output, totals), _ = jax.lax.scan(body, start, jnp.arange(steps))
    with jax.named_scope("reduce"):
        output = jax.tree.map(lambda x: x.sum(0), output)
        output = dataclasses.replace(output, model_state=model_state)
        grads = divide_by_weight(totals, output.loss.weight)
        return output, reduce_shards(grads, params, plan.precision.reduce_dtype)


def _add_micro_batch(carry: LossAndGradients, new: LossAndGradients) -> LossAndGradients:
    """Adds losses, metrics and gradients; keeps the newer model state."""
    (old, old_totals), (output, totals) = carry, new
    loss, metrics = jax.tree.map(jnp.add, (old.loss, old.metrics), (output.loss, output.metrics))
    return LossOutput(loss, metrics, output.model_state), jax.tree.map(jnp.add, old_totals, totals)


def _make_zeros(plan: GradientPlan, params: Params, *shards: int) -> LossAndGradients:
    """Zeros to which micro-batches are added, of each shard: losses are scalars in all of them.

    A sum that starts from the first micro-batch would compile the loss a second time.
    """
    assert plan.traced is not None
    output = dataclasses.replace(plan.traced.output, model_state={})
    sums = output, jax.eval_shape(lambda: jax.tree.map(widen, params))
    return jax.tree.map(lambda x: jnp.zeros((*shards, *x.shape), x.dtype), sums)


def _full_spec(sharding: NamedSharding, ndim: int) -> tuple[Any, ...]:
    return (*sharding.spec, *[None] * (ndim - len(sharding.spec)))


def constrain_tree(tree: PyTree, shardings: PyTree | None) -> PyTree:
    """A tree laid out by `NamedSharding`s, or as it is for None."""
    if shardings is None:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings)


def _constrain_array(x: jax.Array, plan: GradientPlan, entries: tuple[Any, ...]) -> jax.Array:
    sharding = NamedSharding(plan.bound.mesh, PartitionSpec(*entries))
    return jax.lax.with_sharding_constraint(x, sharding)


def _constrain_shards(totals: PyTree, plan: GradientPlan) -> PyTree:
    """`[num_shards, *param]`: dim 0 over `shard_axes`, the others as the parameter."""
    shard_axes = plan.layout.shard_axes

    def constrain(x: jax.Array, sharding: NamedSharding) -> jax.Array:
        dims = [axes_of(entry) for entry in _full_spec(sharding, x.ndim - 1)]
        rest = [tuple(axis for axis in axes if axis not in shard_axes) or None for axes in dims]
        return _constrain_array(x, plan, (shard_axes, *rest))

    return jax.tree.map(constrain, totals, plan.layout.trained_shardings)
