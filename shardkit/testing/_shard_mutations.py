"""Bugs to inject into steps compiled with `mode="shard_map"`."""

import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from .mutations import Mutation, mutation

_STEP = "shardkit.step."
_SHARDS = _STEP + "shard_map._gradients."


@mutation("sum of shards dropped", _SHARDS + "reduce_gradients", "gradients", "grad_norm")
def _sum_dropped(reduce_gradients: Any, grads: Any, parameters: Any, _: Any) -> Any:
    """The gradients of the first device are used as the sum."""

    def alone(x: jax.Array, axes: Any, numbers: Any) -> jax.Array:
        return jax.lax.psum(jnp.where(jax.lax.axis_index(axes) == 0, x, 0), axes)

    return reduce_gradients(grads, parameters, alone)


@mutation("sum of shards doubled", _SHARDS + "reduce_gradients", "gradients", "grad_norm")
def _sum_doubled(reduce_gradients: Any, grads: Any, parameters: Any, _: Any) -> Any:
    """Gradients are summed twice over every axis."""

    def twice(x: jax.Array, axes: Any, numbers: Any) -> jax.Array:
        once = jax.lax.psum(x, axes)
        return jax.lax.psum(jax.lax.pcast(once, axes, to="varying"), axes)

    return reduce_gradients(grads, parameters, twice)


@mutation("types of shards not checked", _SHARDS + "map_shards", "gradients", "grad_norm")
def _types_not_checked(mapped: Any, *args: Any) -> Any:
    """Sums within layers are summed again in the backward pass."""
    # With `check_vma=False` the gradient of a psum is another psum.
    with mock.patch("jax.shard_map", functools.partial(jax.shard_map, check_vma=False)):
        return mapped(*args)


@mutation("one mask on all shards", _SHARDS + "part_keys", "gradients", "loss")
def _one_mask(part_keys: Any, words: Any, draws: Any, *place: Any) -> Any:
    """Every device draws the noise of the first."""
    return part_keys(words, draws, 0, 0, 0)


@mutation("weight of shards missing", _SHARDS + "divide_by_weight", "gradients", "grad_norm")
def _weight_missing(per_weight: Any, totals: Any, weight: Any) -> Any:
    """Gradients of the weighted sum are used as those of the mean."""
    return per_weight(totals, jnp.ones_like(weight))


@mutation(
    "clipped by the norm of a shard", _STEP + "_step_functions.StepFunctions.train", "sgd update"
)
def _clipped_by_shard(train: Any, functions: Any) -> Any:
    """Each device clips by the norm of its shards."""
    specs = jax.tree.map(lambda s: s.spec, functions.layout.shardings)
    chain = functions.bound.spec.optimizer
    update = jax.shard_map(
        chain.update,
        mesh=functions.bound.mesh,
        in_specs=(specs.params, specs.opt_state, specs.params),
        out_specs=(specs.params, specs.opt_state),
        check_vma=False,
    )

    def on_shards(updates: Any, state: Any, params: Any = None) -> Any:
        return update(updates, state, params)

    optimizer = optax.GradientTransformation(chain.init, on_shards)
    spec = functions.bound.spec.replace(optimizer=optimizer)
    bound = dataclasses.replace(functions.bound, spec=spec)
    return train(dataclasses.replace(functions, bound=bound))


SHARD_MUTATIONS: tuple[Mutation, ...] = (
    _sum_dropped,
    _sum_doubled,
    _types_not_checked,
    _one_mask,
    _weight_missing,
    _clipped_by_shard,
)
