"""Bugs of `mode="shard_map"`, for steps that are compiled in that mode."""

import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from .mutations import Mutation


def _first_shard_alone(reduce_gradients: Any) -> Any:
    """What a sum that is missing leaves on the first device, on all of them."""

    def alone(x: jax.Array, axes: Any, numbers: Any) -> jax.Array:
        return jax.lax.psum(jnp.where(jax.lax.axis_index(axes) == 0, x, 0), axes)

    return lambda grads, parameters, dtype, _: reduce_gradients(grads, parameters, dtype, alone)


def _summed_twice(reduce_gradients: Any) -> Any:
    def twice(x: jax.Array, axes: Any, numbers: Any) -> jax.Array:
        once = jax.lax.psum(x, axes)
        return jax.lax.psum(jax.lax.pcast(once, axes, to="varying"), axes)

    return lambda grads, parameters, dtype, _: reduce_gradients(grads, parameters, dtype, twice)


def _types_unchecked(mapped: Any) -> Any:
    """The same code with `check_vma=False`, where a sum's gradient is summed once more."""

    def unchecked(*args: Any) -> Any:
        with mock.patch("jax.shard_map", functools.partial(jax.shard_map, check_vma=False)):
            return mapped(*args)

    return unchecked


def _first_part_only(part_keys: Any) -> Any:
    return lambda words, draws, *place: part_keys(words, draws, 0, 0, 0)


def _not_divided(per_weight: Any) -> Any:
    return lambda totals, weight: per_weight(totals, jnp.ones_like(weight))


def _clipped_on_shards(train: Any) -> Any:
    """The update inside of a `shard_map` that does not check over what its values differ."""

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
        "the first device's gradients stand for the sum over all",
        ("gradients", "grad_norm"),
        ((_STEP + "shard_map._gradients.reduce_gradients", _first_shard_alone),),
    ),
    Mutation(
        "sum of shards doubled",
        "gradients are summed twice over every axis",
        ("gradients", "grad_norm"),
        ((_STEP + "shard_map._gradients.reduce_gradients", _summed_twice),),
    ),
    Mutation(
        "types of shards not checked",
        "sums within layers are summed again in the backward pass",
        ("gradients", "grad_norm"),
        ((_STEP + "shard_map._gradients.mapped", _types_unchecked),),
    ),
    Mutation(
        "one mask on all shards",
        "every device draws the first one's noise",
        ("gradients", "loss"),
        ((_STEP + "shard_map._gradients.part_keys", _first_part_only),),
    ),
    Mutation(
        "weight of shards missing",
        "gradients of the sum are taken for those of the mean",
        ("gradients", "grad_norm"),
        ((_STEP + "shard_map._gradients.per_weight", _not_divided),),
    ),
    Mutation(
        "clipped by the norm of a shard",
        "each device clips by the norm of its own shards",
        ("sgd update",),
        ((_STEP + "_step_functions.StepFunctions.train", _clipped_on_shards),),
    ),
)
