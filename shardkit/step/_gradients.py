"""Gradients of one batch: plainly, or over micro-batches and lanes with one reduction.

Shapes: a batch leaf is `[rows, …]`. A micro-batch of k is `[rows/k, …]`. Split by lanes it is
`[lanes, rows/(k·lanes), …]`, dim 0 over the batch axes, so each device holds its own lane.
Gradients of lanes are `[lanes, *param]`, each device holding the one it computed: nothing has
been reduced until `reduce_lanes`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._core.precision import Precision, cast_floats
from .._core.split_rng import RandomDraws, match_draws, per_shard_keys
from .._core.types import Accumulate
from ..nn._constrain import GRADIENT_SHARDS
from ..rules import axes_of
from ._objective import LossOutput, Objective, inverse

GradientFn = Callable[[Any, Any, Any, Any], tuple[LossOutput, Any]]


@dataclasses.dataclass(frozen=True)
class GradientPlan:
    """How the gradients of a step are split and reduced.

    Attributes:
      mesh: the device mesh.
      accumulate: micro-batches, and when they are reduced.
      precision: compute and reduction dtypes.
      axes: mesh axes that the rows of the batch are split over, as far as lanes are.
      params: `NamedSharding` of each parameter, as a pytree.
      gradients: how each gradient is left for the update: as its parameter, or split further.
      batch: `NamedSharding` of each batch leaf, as a pytree.
      rows: number of rows of the global batch.
      draws: which random draws of the loss grow with its rows.
      inner: mesh axes that the rows of one lane are split over.
    """

    mesh: Mesh
    accumulate: Accumulate
    precision: Precision
    axes: tuple[str, ...]
    params: Any
    gradients: Any
    batch: Any
    rows: int
    draws: RandomDraws = dataclasses.field(default_factory=lambda: RandomDraws(1))
    inner: tuple[str, ...] = ()

    @property
    def by_lanes(self) -> bool:
        """Whether gradients are kept apart by lane until one reduction."""
        apart = self.accumulate.micro_batches > 1 or self.precision.reduces_separately
        return apart and self.accumulate.reduce == "end"

    @property
    def lanes(self) -> int:
        """Equal parts that the rows of a micro-batch are split into: devices along `axes`."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)


def gradients(objective: Objective, plan: GradientPlan) -> GradientFn:
    """Builds `(params, model_state, batch, key) -> (Outcome, gradients of the mean loss)`.

    Gradients come in the dtype of the parameters, laid out as `plan.gradients` says.
    """
    collect = _by_lanes if plan.by_lanes else _by_micro_batch

    def run(params: Any, model_state: Any, batch: Any, key: Any) -> tuple[LossOutput, Any]:
        # Cast before the gather that the use of a sharded parameter causes, not after it.
        low = _place(cast_floats(params, plan.precision.compute_dtype), plan.params)
        outcome, totals = collect(objective, plan, low, model_state, batch, key)
        totals = jax.tree.map(lambda g, p: g.astype(p.dtype), totals, params)
        return outcome, _place(per_weight(totals, outcome.loss.weight), plan.gradients)

    return run


def lane_draws(
    objective: Objective, plan: GradientPlan, params: Any, model_state: Any, batch: Any
) -> RandomDraws:
    """Finds which draws of a loss grow with its rows, from abstract arguments.

    Raises:
      StepError: the randomness of the loss cannot be split by lane.
    """
    rows = plan.rows // plan.accumulate.micro_batches
    key = jax.eval_shape(lambda: jax.random.key(0))

    def of(rows: int) -> tuple[Any, ...]:
        def cut(x: Any) -> Any:
            return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) if x.shape else x

        return params, model_state, jax.tree.map(cut, batch), key

    return match_draws(objective, plan.lanes, of(rows // plan.lanes), of(rows))


def micro_batch(batch: Any, steps: int, index: jax.Array, plan: GradientPlan) -> Any:
    """Rows `index, index+steps, …` of every leaf: local to each device, on any mesh the same."""

    def take(x: jax.Array, sharding: NamedSharding) -> jax.Array:
        if x.ndim == 0 or steps == 1:
            return x
        rows, *rest = x.shape
        entries = _entries(sharding, x.ndim)
        apart = _place_one(
            x.reshape(rows // steps, steps, *rest), plan, (entries[0], None, *entries[1:])
        )
        return jax.lax.dynamic_index_in_dim(apart, index, 1, keepdims=False)

    return jax.tree.map(take, batch, plan.batch)


def split_lanes(rows: Any, plan: GradientPlan) -> Any:
    """`[rows, …] → [lanes, rows/lanes, …]`, dim 0 over the batch axes."""

    def split(x: jax.Array, sharding: NamedSharding) -> jax.Array:
        if x.ndim == 0:
            return x
        apart = x.reshape(plan.lanes, x.shape[0] // plan.lanes, *x.shape[1:])
        return _place_one(
            apart, plan, (plan.axes, plan.inner or None, *_entries(sharding, x.ndim)[1:])
        )

    return jax.tree.map(split, rows, plan.batch)


def reduce_lanes(totals: Any, dtype: str) -> Any:
    """Sums `[lanes, …]` over lanes in `dtype`: the one gradient reduction of the step."""

    def reduce(x: jax.Array) -> jax.Array:
        # `jnp.sum` would widen bf16 to f32, and with it what travels.
        low = x.astype(dtype)
        return jax.lax.reduce(low, jnp.zeros((), dtype), jax.lax.add, (0,))

    return jax.tree.map(reduce, totals)


def per_weight(totals: Any, weight: jax.Array) -> Any:
    """Divides gradients of a weighted sum by the weight; all zero where there is none."""
    scale = inverse(weight)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), totals)


def _by_micro_batch(
    objective: Objective, plan: GradientPlan, params: Any, model_state: Any, batch: Any, key: Any
) -> tuple[LossOutput, Any]:
    """Whole micro-batches, one after another; the partitioner places the reductions."""
    steps = plan.accumulate.micro_batches
    value_and_grad = jax.value_and_grad(objective, has_aux=True)
    if steps == 1:
        (_, outcome), totals = value_and_grad(params, model_state, batch, key)
        return outcome, totals

    def one(model_state: Any, index: jax.Array) -> tuple[LossOutput, Any]:
        rows = micro_batch(batch, steps, index, plan)
        at = jax.random.fold_in(key, index)
        (_, outcome), totals = value_and_grad(params, model_state, rows, at)
        return outcome, _place(_wide(totals), plan.gradients)

    def body(
        carry: tuple[LossOutput, Any], index: jax.Array
    ) -> tuple[tuple[LossOutput, Any], None]:
        return _add(carry, one(carry[0].model_state, index)), None

    outcome, totals = _zeros(one, model_state)
    start = LossOutput(outcome.loss, outcome.metrics, model_state), _place(totals, plan.gradients)
    total, _ = jax.lax.scan(body, start, jnp.arange(steps))
    return total


def _by_lanes(
    objective: Objective, plan: GradientPlan, params: Any, model_state: Any, batch: Any, key: Any
) -> tuple[LossOutput, Any]:
    """Every lane's gradients apart, over all micro-batches, then one reduction."""
    steps = plan.accumulate.micro_batches
    value_and_grad = jax.value_and_grad(objective, has_aux=True)

    def one(index: jax.Array) -> tuple[LossOutput, Any]:
        rows = split_lanes(micro_batch(batch, steps, index, plan), plan)
        keys = per_shard_keys(jax.random.fold_in(key, index), plan.draws)
        over = jax.tree.map(lambda x: 0 if x.ndim else None, rows)
        mapped = jax.vmap(
            value_and_grad,
            in_axes=(None, None, over, 0),
            axis_name=GRADIENT_SHARDS,
            spmd_axis_name=plan.axes or None,
        )
        (_, outcome), totals = mapped(params, model_state, rows, keys)
        return outcome, _place_lanes(_wide(totals), plan)

    def body(carry: Any, index: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, one(index)), None

    if steps == 1:
        outcome, totals = one(jnp.zeros((), jnp.int32))
    else:
        outcome, totals = _zeros(one)
        start = outcome, _place_lanes(totals, plan)
        (outcome, totals), _ = jax.lax.scan(body, start, jnp.arange(steps))
    dtype = plan.precision.reduce_dtype or plan.precision.compute_dtype
    with jax.named_scope("reduce"):
        return jax.tree.map(lambda x: x.sum(0), outcome), reduce_lanes(totals, dtype)


def _add(carry: tuple[LossOutput, Any], new: tuple[LossOutput, Any]) -> tuple[LossOutput, Any]:
    """Adds losses, metrics and gradients; the model state is the newest."""
    (old, old_totals), (outcome, totals) = carry, new
    summed = jax.tree.map(jnp.add, (old.loss, old.metrics), (outcome.loss, outcome.metrics))
    return LossOutput(*summed, outcome.model_state), jax.tree.map(jnp.add, old_totals, totals)


def _zeros(one: Callable[..., Any], *args: Any) -> Any:
    """Zeros of what one micro-batch returns: one more trace, but one program fewer to compile."""
    made = jax.eval_shape(one, *args, jax.ShapeDtypeStruct((), jnp.int32))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)


def _wide(totals: Any) -> Any:
    """Micro-batches are summed in f32 at least, whatever the compute dtype."""
    return jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), totals)


def _entries(sharding: NamedSharding, ndim: int) -> tuple[Any, ...]:
    return (*sharding.spec, *[None] * (ndim - len(sharding.spec)))


def _place(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings)


def _place_one(x: jax.Array, plan: GradientPlan, entries: tuple[Any, ...]) -> jax.Array:
    sharding = NamedSharding(plan.mesh, PartitionSpec(*entries))
    return jax.lax.with_sharding_constraint(x, sharding)


def _place_lanes(totals: Any, plan: GradientPlan) -> Any:
    """`[lanes, *param]`: lanes over the batch axes, the rest as the parameter over the others."""

    def place(x: jax.Array, sharding: NamedSharding) -> jax.Array:
        dims = [axes_of(entry) for entry in _entries(sharding, x.ndim - 1)]
        rest = [tuple(axis for axis in axes if axis not in plan.axes) or None for axes in dims]
        return _place_one(x, plan, (plan.axes, *rest))

    return jax.tree.map(place, totals, plan.params)
