"""The loss and its gradients inside one `shard_map` over the whole mesh.

Every array is one device's shard, and JAX types each value by the mesh axes over which it varies
(`check_vma=True`): a missing or repeated sum is a type error, not a wrong number. Parameters are
typed as varying over the axes that split rows before they are differentiated, so the backward pass
reduces no gradient and `reduce_gradients` reduces all of them. The exception are weights that
layers gather: the transpose of the gather scatters their gradients.

The update runs outside, on global arrays, so that a norm is the norm over all devices.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ..._core.errors import Problem, StepError, raise_all
from ..._core.precision import cast_floats, policy_dtype
from ..._core.row_dims import map_rows, take_rows, with_dim
from ..._core.split_rng import RandomDraws, part_keys, threefry_words
from ..._core.tree import leaves_by_path
from ..._core.types import Batch, Key, Mean, Params, PyTree, Scalar
from ...nn._manual_axis_rules import Axes, gather_dim, pvary, use_manual_axis_rules, varying_axes
from .._gradients import OF_MEAN, GradientFn, LossAndGradients, LossArgs, divide_by_weight
from .._objective import LossOutput, Objective, value_and_grad
from ._buckets import GradientSum, reduce_gradients
from ._plan import ShardMapPlan
from ._problems import explain_loop_types


def reduce_output(
    output: LossOutput, rows: Axes, model_state: PyTree, equal_state: Sequence[bool]
) -> LossOutput:
    """Sums one device's loss and metrics over those of the rows; values equal on all devices stay.

    `model_state` is what the loss was called with; `equal_state` says for each leaf of the new one
    whether all devices of the rows compute the same. Raises StepError if a result varies over an
    axis that does not split the rows, and needs a psum there; or new state varies over any.
    """
    leaves, structure = jax.tree.flatten(output.model_state)
    new_state = structure.unflatten(
        _typed_equal(x, rows) if equal else x for x, equal in zip(leaves, equal_state, strict=True)
    )
    means = {"loss": output.loss, **output.metrics}
    problems = [p for name, mean in means.items() for p in _varying_problems(name, mean, rows)]
    problems += _state_problems(model_state, new_state)
    headline = "The loss on shards returns values that differ between devices with the same rows."
    raise_all(StepError, headline, problems)
    names_by_axes: dict[Axes, list[str]] = {}
    for name, mean in means.items():
        axes = tuple(axis for axis in rows if axis in varying_axes(mean.total))
        names_by_axes.setdefault(axes, []).append(name)
    summed: dict[str, Mean] = {}
    for axes, names in names_by_axes.items():
        # One collective for [total, weight, total, weight, …].
        scalars = [x for name in names for x in (means[name].total, means[name].weight)]
        flat = jnp.stack([pvary(x, axes) for x in scalars])
        flat = jax.lax.psum(flat, axes) if axes else flat
        sums = [flat[i].astype(like.dtype) for i, like in enumerate(scalars)]
        pairs = zip(names, sums[::2], sums[1::2], strict=True)
        summed |= {name: Mean(total, weight) for name, total, weight in pairs}
    metrics = {name: summed[name] for name in output.metrics}
    return LossOutput(summed["loss"], metrics, new_state)


def _typed_equal(x: jax.Array, rows: Axes) -> jax.Array:
    """Types equal numbers as equal; those made of parameters have the type of their gradients."""
    axes = tuple(axis for axis in rows if axis in varying_axes(x))
    return jax.lax.pmax(x, axes) if axes else x


def _state_problems(before: PyTree, after: PyTree) -> Iterator[Problem]:
    old, new = (leaves_by_path(tree, "model_state") for tree in (before, after))
    for path, x in new.items():
        axes = varying_axes(x) - (varying_axes(old[path]) if path in old else frozenset())
        for axis in sorted(axes):
            fix = f'jax.lax.pmean(x, {axis!r}) of it; or nn.BatchNorm(..., axis_name="batch")'
            yield Problem(path, f"differs per {axis!r} shard: add pmean over {axis!r}", fix)


def _varying_problems(name: str, mean: Mean, rows: Axes) -> Iterator[Problem]:
    for axis in sorted((varying_axes(mean.total) | varying_axes(mean.weight)) - set(rows)):
        fix = f"jax.lax.psum(x, {axis!r}) or pmean before it is returned"
        why = f"differs per {axis!r} shard: add psum/pmean over {axis!r}"
        yield Problem(f"output {name!r}", why, fix)
    for axis in sorted((varying_axes(mean.weight) - varying_axes(mean.total)) & set(rows)):
        why = f"its weight differs per {axis!r} shard, its total does not: add psum over {axis!r}"
        yield Problem(f"output {name!r}", why, f"sk.Mean(total, jax.lax.psum(weight, {axis!r}))")


def build_local_gradients(objective: Objective, plan: ShardMapPlan) -> GradientFn:
    """Builds `(params, model_state, batch, key) -> (LossOutput, gradients of the mean loss)`.

    Gradients have the dtype and the layout of the parameters.
    """
    precision = plan.bound.spec.precision

    def local(params: Params, model_state: PyTree, batch: Batch, key: Key) -> LossAndGradients:
        compute_params = gather_params(plan, cast_floats(params, precision.compute_dtype))
        partition = plan.partition
        of_trained, trained = partition.of_trained(objective, compute_params), partition.trained
        args = trained(compute_params), model_state, batch, key
        output, totals = _accumulate(of_trained, plan, args)
        with jax.named_scope("reduce"):
            output = reduce_output(output, plan.row_axes, model_state, plan.equal_state)
            grads = divide_by_weight(totals, OF_MEAN if _whole(plan) else output.loss.weight)
            flat, structure = jax.tree.flatten(
                jax.tree.map(
                    lambda g, p: g.astype(policy_dtype(p.dtype, precision.reduce_dtype)),
                    grads,
                    trained(compute_params),
                )
            )
            gradient_sum = GradientSum(plan.bound.spec.strategy.compression, output.model_state)
            flat = reduce_gradients(flat, plan.trained, gradient_sum)
        output = dataclasses.replace(output, model_state=gradient_sum.model_state)
        grads = jax.tree.map(
            lambda g, p: g.astype(p.dtype), structure.unflatten(flat), trained(params)
        )
        return output, grads

    return map_shards(plan, local, (_output_specs(plan), plan.gradients))


def build_local_objective(objective: Objective, plan: ShardMapPlan) -> Objective:
    """Builds a loss of whole arrays that runs on shards, without gradients."""

    def local(
        params: Params, model_state: PyTree, batch: Batch, key: Key
    ) -> tuple[Scalar, LossOutput]:
        compute_params = gather_params(plan, params)
        _, output = objective(compute_params, model_state, batch, _device_key(plan, key))
        output = reduce_output(output, plan.row_axes, model_state, plan.equal_state)
        return output.loss.total, output

    return map_shards(plan, local, (PartitionSpec(), _output_specs(plan)))


def _output_specs(plan: ShardMapPlan) -> PyTree:
    """Specs of a `LossOutput`."""
    replicated: Any = PartitionSpec()
    return LossOutput(replicated, replicated, plan.specs[1])


def map_shards(plan: ShardMapPlan, local: Callable[..., Any], out_specs: PyTree) -> Any:
    """Turns a function of shards into one of whole arrays `(params, model_state, batch, key)`."""

    def run(*args: PyTree) -> PyTree:
        with explain_loop_types(), use_manual_axis_rules(plan.axis_rules):
            return local(*args)

    in_specs = (*plan.specs, PartitionSpec())
    return jax.shard_map(run, mesh=plan.mesh, in_specs=in_specs, out_specs=out_specs)


def _whole(plan: ShardMapPlan) -> bool:
    """Whether every device computes the mean of all rows at once."""
    return plan.accumulate.micro_batches == plan.count(plan.row_axes + plan.token_axes) == 1


def _accumulate(objective: Objective, plan: ShardMapPlan, args: LossArgs) -> LossAndGradients:
    """Loss and gradients of this device's rows over all micro-batches, not reduced."""
    params, model_state, batch, key = args
    steps = plan.accumulate.micro_batches
    differentiate = value_and_grad(objective, plan.common_weight, whole=_whole(plan))

    def run_rows(rows: Batch, key: Key) -> LossAndGradients:
        return differentiate(params, model_state, rows, _device_key(plan, key))

    if steps == 1:
        return run_rows(batch, key)

    def take(x: jax.Array, dim: int, index: jax.Array) -> jax.Array:
        strided = x.reshape(with_dim(x.shape, dim, x.shape[dim] // steps, steps))
        return take_rows(strided, dim + 1, index)

    def run_micro_batch(index: jax.Array) -> PyTree:
        rows = map_rows(lambda x, dim: take(x, dim, index), batch, plan.row_dims)
        output, totals = run_rows(rows, jax.random.fold_in(key, index))
        return output.loss, output.metrics, totals

    def body(carry: PyTree, index: jax.Array) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, carry, run_micro_batch(index)), None

    start = _zeros_of_micro_batch(run_micro_batch)
    (loss, metrics, totals), _ = jax.lax.scan(body, start, jnp.arange(steps))
    return LossOutput(loss, metrics, model_state), totals


def _zeros_of_micro_batch(run_micro_batch: Callable[[jax.Array], PyTree]) -> PyTree:
    """Zeros of one micro-batch's results, typed as varying over the same mesh axes."""
    traced, shapes = jax.make_jaxpr(run_micro_batch, return_shape=True)(jnp.zeros((), jnp.int32))
    zeros = [
        pvary(jnp.zeros(a.shape, a.dtype), tuple(sorted(a.mat.varying))) for a in traced.out_avals
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), zeros)


def gather_params(plan: ShardMapPlan, params: Params) -> Params:
    """The parameters as the loss sees them: gathered, except those that layers gather."""
    flat, structure = jax.tree.flatten(params)
    gathered = []
    for x, param in zip(flat, plan.parameters, strict=True):
        for dim, axes in enumerate(param.gathered):
            x = gather_dim(x, axes, dim) if axes else x
        gathered.append(pvary(x, param.varying))
    return structure.unflatten(gathered)


def _device_key(plan: ShardMapPlan, key: Key) -> Key:
    """A key whose draws are this device's slices of the draws for whole arrays."""
    words = threefry_words(key)
    if plan.draws == RandomDraws(1):  # a loss may read the words of a key that is whole
        return jax.random.wrap_key_data(words, impl="threefry2x32")
    rows, length = (jax.lax.axis_index(a) if a else 0 for a in (plan.row_axes, plan.token_axes))
    return part_keys(words, plan.draws, rows, jnp.uint32(0), length)
