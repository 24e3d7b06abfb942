"""Bugs to inject into a compiled step, to show that `sk.verify` finds them.

A mutation patches functions of the package by name while a step is compiled. The package has no
hooks for this; renaming a patched function breaks a test, not a user.
"""

import contextlib
import dataclasses
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._core.types import Mean
from ..step import _gradients

Seam = tuple[str, Callable[[Any], Any]]


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One bug.

    Attributes:
      name: a few words.
      what: the effect of the bug, in one line.
      killed_by: checks of `sk.verify` that must find it; others can find it too.
      seams: `(dotted path of a function, original -> its replacement)`.
    """

    name: str
    what: str
    killed_by: tuple[str, ...]
    seams: tuple[Seam, ...]

    @contextlib.contextmanager
    def apply(self) -> Iterator[None]:
        """Injects the bug into every step that is compiled in the block."""
        with contextlib.ExitStack() as stack:
            for path, replacement in self.seams:
                original = pkgutil.resolve_name(path)
                stack.enter_context(mock.patch(path, replacement(original)))
            yield


def _double_gradients(per_weight: Any) -> Any:
    return lambda totals, weight: jax.tree.map(lambda g: 2 * g, per_weight(totals, weight))


def _zero_last_leaf(per_weight: Any) -> Any:
    def zeroed(totals: Any, weight: Any) -> Any:
        leaves, structure = jax.tree.flatten(per_weight(totals, weight))
        return structure.unflatten([*leaves[:-1], jnp.zeros_like(leaves[-1])])

    return zeroed


def _drop_psum(by_lanes: Any) -> Any:
    """Each device keeps the gradient of its own shard for the first leaf, unsummed."""

    def dropped(objective: Any, plan: Any, *args: Any) -> Any:
        own = jax.shard_map(
            lambda lanes: lanes[0],
            mesh=plan.bound.mesh,
            in_specs=PartitionSpec(plan.layout.shard_axes),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        reduce_shards = _gradients.reduce_shards

        def reduce(grads: Any, *args: Any) -> Any:
            leaves, structure = jax.tree.flatten(grads)
            first, *others = structure.flatten_up_to(reduce_shards(grads, *args))
            return structure.unflatten([own(leaves[0].astype(first.dtype)), *others])

        with mock.patch.object(_gradients, "reduce_shards", reduce):
            return by_lanes(objective, plan, *args)

    return dropped


def _ignore_weights(as_mean: Any) -> Any:
    def unweighted(value: Any) -> Mean:
        mean = as_mean(value)
        return Mean(mean.total, jnp.ones_like(mean.weight))

    return unweighted


def _average_means(as_mean: Any) -> Any:
    def averaged(value: Any) -> Mean:
        mean = as_mean(value)
        return Mean(mean.total / jnp.maximum(mean.weight, 1e-6), jnp.ones_like(mean.weight))

    return averaged


def _repeat_first_micro_batch(micro_batch: Any) -> Any:
    return lambda batch, steps, index, plan: micro_batch(batch, steps, 0 * index, plan)


def _halve_norm_input(metrics_of: Any) -> Any:
    def wrong(outcome: Any, grads: Any) -> Any:
        half = jax.tree.map(lambda g: g[: (g.shape[0] + 1) // 2] if g.ndim else g, grads)
        return {**metrics_of(outcome, grads), "grad_norm": metrics_of(outcome, half)["grad_norm"]}

    return wrong


def _never_fold_step(step_key: Any) -> Any:
    return lambda state: step_key(dataclasses.replace(state, step=jnp.zeros_like(state.step)))


def _use_first_shard_key(lane_keys: Any) -> Any:
    return lambda key, draws: lane_keys(key, draws)[jnp.zeros(draws.gradient_shards, jnp.int32)]


def _replicate_moments(follow_params: Any) -> Any:
    return lambda params, *rest: follow_params(
        tuple((leaf, PartitionSpec()) for leaf, _ in params), *rest
    )


def _replicate_first_split(collect: Any) -> Any:
    def wrong(rule: Any, leaves: Any, mesh: Any, **options: Any) -> Any:
        specs, problems = collect(rule, leaves, mesh, **options)
        split = [path for path, spec in specs.items() if spec != PartitionSpec()]
        return {**specs, **dict.fromkeys(split[:1], PartitionSpec())}, problems

    return wrong


def _apply_twice(apply_updates: Any) -> Any:
    return lambda params, updates: apply_updates(apply_updates(params, updates), updates)


def _vary_key_by_device_count(initial_state: Any) -> Any:
    def wrong(*args: Any) -> Any:
        run = initial_state(*args)
        return lambda key: run(jax.random.fold_in(key, jax.device_count()))

    return wrong


def _evaluate_half(evaluation_step: Any) -> Any:
    def wrong(*args: Any) -> Any:
        run = evaluation_step(*args)
        return lambda state, batch: run(
            state, jax.tree.map(lambda x: x[: x.shape[0] // 2] if x.ndim else x, batch)
        )

    return wrong


def _evaluate_shrunk(evaluation_step: Any) -> Any:
    def wrong(*args: Any) -> Any:
        run = evaluation_step(*args)

        def later(state: Any, batch: Any) -> Any:
            factor = jnp.where(state.step == 0, 1.0, 0.9)
            shrunk = jax.tree.map(lambda p: p * factor.astype(p.dtype), state.params)
            return run(dataclasses.replace(state, params=shrunk), batch)

        return later

    return wrong


def _double_later(is_wrong: Callable[[str], bool]) -> Callable[[Any], Any]:
    """Doubles some metrics of every step but the first."""

    def replace(train_step: Any) -> Any:
        def wrong(*args: Any, **options: Any) -> Any:
            run = train_step(*args, **options)

            def later(state: Any, batch: Any) -> Any:
                after, metrics = run(state, batch)
                factor = jnp.where(state.step == 0, 1.0, 2.0)
                return after, {k: x * factor if is_wrong(k) else x for k, x in metrics.items()}

            return later

        return wrong

    return replace


def _count_to_one(train_step: Any) -> Any:
    def wrong(*args: Any, **options: Any) -> Any:
        run = train_step(*args, **options)

        def stuck(state: Any, batch: Any) -> Any:
            after, metrics = run(state, batch)
            return dataclasses.replace(after, step=jnp.minimum(after.step, 1)), metrics

        return stuck

    return wrong


def _compile_each_call(put_batch: Any) -> Any:
    def wrong(*args: Any, **options: Any) -> Any:
        jax.jit(lambda: jnp.zeros(()))()  # each call has a new lambda, which no cache knows
        return put_batch(*args, **options)

    return wrong


_STEP = "shardkit.step."
_TRAIN = _STEP + "_step_functions.build_train_step"
_PER_WEIGHT, _MEAN = _STEP + "_gradients.divide_by_weight", _STEP + "_objective.to_mean"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "gradient doubled",
        "every gradient is doubled",
        ("gradients", "grad_norm"),
        ((_PER_WEIGHT, _double_gradients),),
    ),
    Mutation(
        "leaf zeroed",
        "the last leaf has no gradient",
        ("gradients",),
        ((_PER_WEIGHT, _zero_last_leaf),),
    ),
    Mutation(
        "psum dropped",
        "the gradient of the first leaf is not summed over devices",
        ("gradients", "copies"),
        ((_STEP + "_gradients._accumulate_per_shard", _drop_psum),),
    ),
    Mutation(
        "weights ignored",
        "the weighted sum is used as the mean",
        ("loss", "metrics"),
        ((_MEAN, _ignore_weights),),
    ),
    Mutation(
        "mean of means",
        "gradient shards are averaged without their weights",
        ("loss", "metrics"),
        ((_MEAN, _average_means),),
    ),
    Mutation(
        "micro-batch skipped",
        "every micro-batch is the first one",
        ("gradients",),
        ((_STEP + "_gradients.micro_batch", _repeat_first_micro_batch),),
    ),
    Mutation(
        "norm of a shard",
        "the gradient norm omits half of each leaf",
        ("grad_norm",),
        ((_STEP + "_update._collect_metrics", _halve_norm_input),),
    ),
    Mutation(
        "key not folded",
        "every step draws the noise of step 0",
        ("k-step loss",),
        ((_STEP + "_update.step_key", _never_fold_step),),
    ),
    Mutation(
        "one mask",
        "every gradient shard draws the noise of the first",
        ("gradients",),
        ((_STEP + "_gradients.per_shard_keys", _use_first_shard_key),),
    ),
    Mutation(
        "moments replicated",
        "optimizer state does not follow its parameters",
        ("layout",),
        ((_STEP + "_layout.FollowParams", _replicate_moments),),
    ),
    Mutation(
        "wrong spec",
        "the first split leaf is replicated",
        ("layout",),
        ((_STEP + "_layout.resolve_all", _replicate_first_split),),
    ),
    Mutation(
        "update made twice",
        "the update is applied twice",
        ("sgd update", "k-step state"),
        ((_STEP + "_update.optax.apply_updates", _apply_twice),),
    ),
    Mutation(
        "init by device count",
        "the first state depends on the number of devices",
        ("init",),
        ((_STEP + "_compiled_functions.build_model_init", _vary_key_by_device_count),),
    ),
    Mutation(
        "half an evaluation",
        "an evaluation uses half of the rows",
        ("evaluate",),
        ((_STEP + "_step_functions.build_eval_step", _evaluate_half),),
    ),
    Mutation(
        "evaluation shrunk",
        "evaluations after the first update use other parameters",
        ("k-step evaluate",),
        ((_STEP + "_step_functions.build_eval_step", _evaluate_shrunk),),
    ),
    Mutation(
        "later metrics doubled",
        "the metrics of the loss are right in the first step only",
        ("k-step metrics",),
        ((_TRAIN, _double_later(lambda name: name not in ("loss", "grad_norm"))),),
    ),
    Mutation(
        "later norms doubled",
        "the gradient norm is right in the first step only",
        ("k-step metrics",),
        ((_TRAIN, _double_later(lambda name: name == "grad_norm")),),
    ),
    Mutation(
        "updates not counted",
        "the state counts no further than one update",
        ("counters",),
        ((_TRAIN, _count_to_one),),
    ),
    Mutation(
        "compiles again",
        "every call compiles another program",
        ("compiles once",),
        ((_STEP + "_compiled.put_batch", _compile_each_call),),
    ),
)


def _replicate_update(update_specs: Any) -> Any:
    return lambda zero, *rest: update_specs(None, *rest)


ZERO_MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "update not split",
        "the optimizer state and the update are replicated",
        ("layout",),
        ((_STEP + "_layout.update_specs", _replicate_update),),
    ),
)
