"""Bugs to inject into steps compiled with `mode="shard_map"`."""

import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from .mutations import Mutation


def _drop_sum(reduce_gradients: Any) -> Any:
    """Every device gets the gradients of the first, as if the sum were missing."""

    def alone(x: jax.Array, axes: Any, numbers: Any) -> jax.Array:
        return jax.lax.psum(jnp.where(jax.lax.axis_index(axes) == 0, x, 0), axes)

    return lambda grads, parameters, _: reduce_gradients(grads, parameters, alone)


def _sum_twice(reduce_gradients: Any) -> Any:
    def twice(x: jax.Array, axes: Any, numbers: Any) -> jax.Array:
        once = jax.lax.psum(x, axes)
        return jax.lax.psum(jax.lax.pcast(once, axes, to="varying"), axes)

    return lambda grads, parameters, _: reduce_gradients(grads, parameters, twice)


def _skip_vma_check(mapped: Any) -> Any:
    """With `check_vma=False` the gradient of a psum is another psum: sums are doubled."""

    def unchecked(*args: Any) -> Any:
        with mock.patch("jax.shard_map", functools.partial(jax.shard_map, check_vma=False)):
            return mapped(*args)

    return unchecked


def _use_first_part_key(part_keys: Any) -> Any:
    return lambda words, draws, *place: part_keys(words, draws, 0, 0, 0)


def _skip_division(per_weight: Any) -> Any:
    return lambda totals, weight: per_weight(totals, jnp.ones_like(weight))


def _clip_shards(train: Any) -> Any:
    """Runs the update in a `shard_map`, whose norms are those of one shard."""

    def wrong(functions: Any) -> Any:
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

    return wrong


_STEP = "shardkit.step."

SHARD_MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "sum of shards dropped",
        "the gradients of the first device are used as the sum",
        ("gradients", "grad_norm"),
        ((_STEP + "shard_map._gradients.reduce_gradients", _drop_sum),),
    ),
    Mutation(
        "sum of shards doubled",
        "gradients are summed twice over every axis",
        ("gradients", "grad_norm"),
        ((_STEP + "shard_map._gradients.reduce_gradients", _sum_twice),),
    ),
    Mutation(
        "types of shards not checked",
        "sums within layers are summed again in the backward pass",
        ("gradients", "grad_norm"),
        ((_STEP + "shard_map._gradients.map_shards", _skip_vma_check),),
    ),
    Mutation(
        "one mask on all shards",
        "every device draws the noise of the first",
        ("gradients", "loss"),
        ((_STEP + "shard_map._gradients.part_keys", _use_first_part_key),),
    ),
    Mutation(
        "weight of shards missing",
        "gradients of the weighted sum are used as those of the mean",
        ("gradients", "grad_norm"),
        ((_STEP + "shard_map._gradients.divide_by_weight", _skip_division),),
    ),
    Mutation(
        "clipped by the norm of a shard",
        "each device clips by the norm of its shards",
        ("sgd update",),
        ((_STEP + "_step_functions.StepFunctions.train", _clip_shards),),
    ),
)
