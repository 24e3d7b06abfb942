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


def mutation(name: str, seam: str, *killed_by: str) -> Callable[[Callable[..., Any]], Mutation]:
    """Makes a mutation of a function whose docstring says what is wrong.

    Called in place of the function at the seam, it gets that one before the arguments.
    """

    def make(wrong: Callable[..., Any]) -> Mutation:
        def replace(original: Any) -> Callable[..., Any]:
            # A function, which also takes the place of a method: a partial would not be bound.
            return lambda *args, **options: wrong(original, *args, **options)

        doc = (wrong.__doc__ or "").partition(".")[0]
        return Mutation(name, f"{doc[:1].lower()}{doc[1:]}", killed_by, ((seam, replace),))

    return make


_STEP = "shardkit.step."
_TRAIN, _EVAL = (_STEP + f"_step_functions.build_{name}_step" for name in ("train", "eval"))
_PER_WEIGHT, _MEAN = _STEP + "_gradients.divide_by_weight", _STEP + "_objective.to_mean"


@mutation("gradient doubled", _PER_WEIGHT, "gradients", "grad_norm")
def _gradient_doubled(per_weight: Any, totals: Any, weight: Any) -> Any:
    """Every gradient is doubled."""
    return jax.tree.map(lambda g: 2 * g, per_weight(totals, weight))


@mutation("leaf zeroed", _PER_WEIGHT, "gradients")
def _leaf_zeroed(per_weight: Any, totals: Any, weight: Any) -> Any:
    """The last leaf has no gradient."""
    leaves, structure = jax.tree.flatten(per_weight(totals, weight))
    return structure.unflatten([*leaves[:-1], jnp.zeros_like(leaves[-1])])


@mutation("psum dropped", _STEP + "_gradients._accumulate_per_shard", "gradients", "copies")
def _psum_dropped(by_lanes: Any, objective: Any, plan: Any, *args: Any) -> Any:
    """The gradient of the first leaf is not summed over devices."""
    # Each device keeps the gradient of its own shard for the first leaf, unsummed.
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


@mutation("weights ignored", _MEAN, "loss", "metrics")
def _weights_ignored(as_mean: Any, value: Any) -> Mean:
    """The weighted sum is used as the mean."""
    mean = as_mean(value)
    return Mean(mean.total, jnp.ones_like(mean.weight))


@mutation("mean of means", _MEAN, "loss", "metrics")
def _mean_of_means(as_mean: Any, value: Any) -> Mean:
    """Gradient shards are averaged without their weights."""
    mean = as_mean(value)
    return Mean(mean.total / jnp.maximum(mean.weight, 1e-6), jnp.ones_like(mean.weight))


@mutation("micro-batch skipped", _STEP + "_gradients.micro_batch", "gradients")
def _micro_batch_skipped(micro_batch: Any, batch: Any, steps: Any, index: Any, plan: Any) -> Any:
    """Every micro-batch is the first one."""
    return micro_batch(batch, steps, 0 * index, plan)


@mutation("norm of a shard", _STEP + "_update._collect_metrics", "grad_norm")
def _norm_of_a_shard(metrics_of: Any, outcome: Any, grads: Any) -> Any:
    """The gradient norm omits half of each leaf."""
    half = jax.tree.map(lambda g: g[: (g.shape[0] + 1) // 2] if g.ndim else g, grads)
    return {**metrics_of(outcome, grads), "grad_norm": metrics_of(outcome, half)["grad_norm"]}


@mutation("key not folded", _STEP + "_update.step_key", "k-step loss")
def _key_not_folded(step_key: Any, state: Any) -> Any:
    """Every step draws the noise of step 0."""
    return step_key(dataclasses.replace(state, step=jnp.zeros_like(state.step)))


@mutation("one mask", _STEP + "_gradients.per_shard_keys", "gradients")
def _one_mask(lane_keys: Any, key: Any, draws: Any) -> Any:
    """Every gradient shard draws the noise of the first."""
    return lane_keys(key, draws)[jnp.zeros(draws.gradient_shards, jnp.int32)]


@mutation("moments replicated", _STEP + "_layout.FollowParams", "layout")
def _moments_replicated(follow_params: Any, params: Any, *rest: Any) -> Any:
    """Optimizer state does not follow its parameters."""
    return follow_params(tuple((leaf, PartitionSpec()) for leaf, _ in params), *rest)


@mutation("wrong spec", _STEP + "_layout.resolve_all", "layout")
def _wrong_spec(collect: Any, rule: Any, leaves: Any, mesh: Any, **options: Any) -> Any:
    """The first split leaf is replicated."""
    specs, problems = collect(rule, leaves, mesh, **options)
    split = [path for path, spec in specs.items() if spec != PartitionSpec()]
    return {**specs, **dict.fromkeys(split[:1], PartitionSpec())}, problems


@mutation("update made twice", _STEP + "_update.optax.apply_updates", "sgd update", "k-step state")
def _update_made_twice(apply_updates: Any, params: Any, updates: Any) -> Any:
    """The update is applied twice."""
    return apply_updates(apply_updates(params, updates), updates)


@mutation("init by device count", _STEP + "_compiled_functions.build_model_init", "init")
def _init_by_device_count(initial_state: Any, *args: Any) -> Any:
    """The first state depends on the number of devices."""
    run = initial_state(*args)
    return lambda key: run(jax.random.fold_in(key, jax.device_count()))


@mutation("half an evaluation", _EVAL, "evaluate")
def _half_an_evaluation(evaluation_step: Any, *args: Any) -> Any:
    """An evaluation uses half of the rows."""
    run = evaluation_step(*args)
    return lambda state, batch: run(
        state, jax.tree.map(lambda x: x[: x.shape[0] // 2] if x.ndim else x, batch)
    )


@mutation("evaluation shrunk", _EVAL, "k-step evaluate")
def _evaluation_shrunk(evaluation_step: Any, *args: Any) -> Any:
    """Evaluations after the first update use other parameters."""
    run = evaluation_step(*args)

    def later(state: Any, batch: Any) -> Any:
        factor = jnp.where(state.step == 0, 1.0, 0.9)
        shrunk = jax.tree.map(lambda p: p * factor.astype(p.dtype), state.params)
        return run(dataclasses.replace(state, params=shrunk), batch)

    return later


def _double_later(run: Callable[..., Any], is_wrong: Callable[[str], bool]) -> Any:
    def later(state: Any, batch: Any) -> Any:
        after, metrics = run(state, batch)
        factor = jnp.where(state.step == 0, 1.0, 2.0)
        return after, {k: x * factor if is_wrong(k) else x for k, x in metrics.items()}

    return later


@mutation("later metrics doubled", _TRAIN, "k-step metrics")
def _later_metrics_doubled(train_step: Any, *args: Any, **options: Any) -> Any:
    """The metrics of the loss are right in the first step only."""
    run = train_step(*args, **options)
    return _double_later(run, lambda name: name not in ("loss", "grad_norm"))


@mutation("later norms doubled", _TRAIN, "k-step metrics")
def _later_norms_doubled(train_step: Any, *args: Any, **options: Any) -> Any:
    """The gradient norm is right in the first step only."""
    return _double_later(train_step(*args, **options), lambda name: name == "grad_norm")


@mutation("updates not counted", _TRAIN, "counters")
def _updates_not_counted(train_step: Any, *args: Any, **options: Any) -> Any:
    """The state counts no further than one update."""
    run = train_step(*args, **options)

    def stuck(state: Any, batch: Any) -> Any:
        after, metrics = run(state, batch)
        return dataclasses.replace(after, step=jnp.minimum(after.step, 1)), metrics

    return stuck


@mutation("compiles again", _STEP + "_compiled.put_batch", "compiles once")
def _compiles_again(put_batch: Any, *args: Any, **options: Any) -> Any:
    """Every call compiles another program."""
    jax.jit(lambda: jnp.zeros(()))()  # each call has a new lambda, which no cache knows
    return put_batch(*args, **options)


MUTATIONS: tuple[Mutation, ...] = (
    _gradient_doubled,
    _leaf_zeroed,
    _psum_dropped,
    _weights_ignored,
    _mean_of_means,
    _micro_batch_skipped,
    _norm_of_a_shard,
    _key_not_folded,
    _one_mask,
    _moments_replicated,
    _wrong_spec,
    _update_made_twice,
    _init_by_device_count,
    _half_an_evaluation,
    _evaluation_shrunk,
    _later_metrics_doubled,
    _later_norms_doubled,
    _updates_not_counted,
    _compiles_again,
)


@mutation("update not split", _STEP + "_layout.update_specs", "layout")
def _update_not_split(update_specs: Any, zero: Any, *rest: Any) -> Any:
    """The optimizer state and the update are replicated."""
    return update_specs(None, *rest)


ZERO_MUTATIONS: tuple[Mutation, ...] = (_update_not_split,)
