"""Bugs to inject into a compiled step, to show that the verifier finds them.

A mutation replaces named functions of `shardkit.step` while a step is compiled. The product
holds no hook for it; a seam that is renamed breaks a test, not a user.
"""

import contextlib
import dataclasses
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from .._core.types import Mean
from ..step import _gradients

Seam = tuple[str, Callable[[Any], Any]]


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One bug.

    Attributes:
      name: short.
      what: what goes wrong, in one line.
      killed_by: the checks of the certificate that must find it; others may too.
      seams: `(dotted path of a function, original → what replaces it)`.
    """

    name: str
    what: str
    killed_by: tuple[str, ...]
    seams: tuple[Seam, ...]

    @contextlib.contextmanager
    def apply(self) -> Iterator[None]:
        """Injects the bug into every step that is compiled within the block."""
        with contextlib.ExitStack() as stack:
            for path, replacement in self.seams:
                original = pkgutil.resolve_name(path)
                stack.enter_context(mock.patch(path, replacement(original)))
            yield


def _doubled(per_weight: Any) -> Any:
    return lambda totals, weight: jax.tree.map(lambda g: 2 * g, per_weight(totals, weight))


def _zeroed(per_weight: Any) -> Any:
    def zeroed(totals: Any, weight: Any) -> Any:
        leaves, structure = jax.tree.flatten(per_weight(totals, weight))
        return structure.unflatten([*leaves[:-1], jnp.zeros_like(leaves[-1])])

    return zeroed


def _psum_dropped(by_lanes: Any) -> Any:
    """Each device keeps its own lane's gradient of the first leaf, as if it were the sum."""

    def dropped(objective: Any, plan: Any, *args: Any) -> Any:
        own = jax.shard_map(
            lambda lanes: lanes[0],
            mesh=plan.mesh,
            in_specs=PartitionSpec(plan.axes),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        reduce_lanes = _gradients.reduce_lanes

        def reduce(totals: Any, dtype: Any) -> Any:
            leaves, structure = jax.tree.flatten(totals)
            reduced = structure.flatten_up_to(reduce_lanes(totals, dtype))
            return structure.unflatten([own(leaves[0].astype(dtype)), *reduced[1:]])

        with mock.patch.object(_gradients, "reduce_lanes", reduce):
            return by_lanes(objective, plan, *args)

    return dropped


def _unweighted(as_mean: Any) -> Any:
    def unweighted(value: Any) -> Mean:
        mean = as_mean(value)
        return Mean(mean.total, jnp.ones_like(mean.weight))

    return unweighted


def _mean_of_means(as_mean: Any) -> Any:
    def averaged(value: Any) -> Mean:
        mean = as_mean(value)
        return Mean(mean.total / jnp.maximum(mean.weight, 1e-6), jnp.ones_like(mean.weight))

    return averaged


def _first_twice(micro_batch: Any) -> Any:
    return lambda batch, steps, index, plan: micro_batch(batch, steps, 0 * index, plan)


def _norm_of_a_shard(metrics_of: Any) -> Any:
    def wrong(outcome: Any, grads: Any) -> Any:
        half = jax.tree.map(lambda g: g[: (g.shape[0] + 1) // 2] if g.ndim else g, grads)
        return {**metrics_of(outcome, grads), "grad_norm": metrics_of(outcome, half)["grad_norm"]}

    return wrong


def _never_folded(step_key: Any) -> Any:
    return lambda state: step_key(dataclasses.replace(state, step=jnp.zeros_like(state.step)))


def _first_lane_only(lane_keys: Any) -> Any:
    return lambda key, draws: lane_keys(key, draws)[jnp.zeros(draws.lanes, jnp.int32)]


def _moments_replicated(follow_params: Any) -> Any:
    return lambda params, *rest: follow_params(
        tuple((leaf, PartitionSpec()) for leaf, _ in params), *rest
    )


def _first_replicated(collect: Any) -> Any:
    def wrong(rule: Any, leaves: Any, mesh: Any, *, what: str) -> Any:
        specs, problems = collect(rule, leaves, mesh, what=what)
        split = [path for path, spec in specs.items() if spec != PartitionSpec()]
        return {**specs, **dict.fromkeys(split[:1], PartitionSpec())}, problems

    return wrong


def _twice(apply_updates: Any) -> Any:
    return lambda params, updates: apply_updates(apply_updates(params, updates), updates)


def _other_key(initial_state: Any) -> Any:
    def wrong(*args: Any) -> Any:
        run = initial_state(*args)
        return lambda key: run(jax.random.fold_in(key, jax.device_count()))

    return wrong


def _half_the_rows(evaluation_step: Any) -> Any:
    def wrong(*args: Any) -> Any:
        run = evaluation_step(*args)
        return lambda state, batch: run(
            state, jax.tree.map(lambda x: x[: x.shape[0] // 2] if x.ndim else x, batch)
        )

    return wrong


def _compiling(put_batch: Any) -> Any:
    def wrong(*args: Any, **options: Any) -> Any:
        jax.jit(lambda: jnp.zeros(()))()  # a function made anew is compiled anew
        return put_batch(*args, **options)

    return wrong


_STEP = "shardkit.step."
_PER_WEIGHT, _MEAN = _STEP + "_gradients.per_weight", _STEP + "_objective.as_mean"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "gradient doubled",
        "every gradient is twice what it is",
        ("gradients", "grad_norm"),
        ((_PER_WEIGHT, _doubled),),
    ),
    Mutation(
        "leaf zeroed", "the last leaf has no gradient", ("gradients",), ((_PER_WEIGHT, _zeroed),)
    ),
    Mutation(
        "psum dropped",
        "devices keep their own gradient of the first leaf",
        ("gradients", "copies"),
        ((_STEP + "_gradients._by_lanes", _psum_dropped),),
    ),
    Mutation(
        "weights ignored",
        "the weighted sum is taken for the mean",
        ("loss", "metrics"),
        ((_MEAN, _unweighted),),
    ),
    Mutation(
        "mean of means",
        "lanes are averaged, whatever their weights",
        ("loss", "metrics"),
        ((_MEAN, _mean_of_means),),
    ),
    Mutation(
        "micro-batch skipped",
        "the first micro-batch stands in for all others",
        ("gradients",),
        ((_STEP + "_gradients.micro_batch", _first_twice),),
    ),
    Mutation(
        "norm of a shard",
        "the gradient norm misses half of each leaf",
        ("grad_norm",),
        ((_STEP + "_update._metrics", _norm_of_a_shard),),
    ),
    Mutation(
        "key not folded",
        "every step draws the noise of the first",
        ("k-step loss",),
        ((_STEP + "_update.step_key", _never_folded),),
    ),
    Mutation(
        "one mask",
        "every lane draws the first lane's noise",
        ("gradients",),
        ((_STEP + "_gradients.per_shard_keys", _first_lane_only),),
    ),
    Mutation(
        "moments replicated",
        "optimizer state does not follow its parameters",
        ("layout",),
        ((_STEP + "_layout.FollowParams", _moments_replicated),),
    ),
    Mutation(
        "wrong spec",
        "the first split leaf is whole on every device",
        ("layout",),
        ((_STEP + "_layout.collect", _first_replicated),),
    ),
    Mutation(
        "update made twice",
        "the parameters move twice as far",
        ("sgd update", "k-step state"),
        ((_STEP + "_update.optax.apply_updates", _twice),),
    ),
    Mutation(
        "init by device count",
        "the first state depends on the number of devices",
        ("init",),
        ((_STEP + "_step_functions.initial_state", _other_key),),
    ),
    Mutation(
        "half an evaluation",
        "an evaluation sees half of the rows",
        ("evaluate",),
        ((_STEP + "_step_functions.evaluation_step", _half_the_rows),),
    ),
    Mutation(
        "compiles again",
        "every call compiles a program",
        ("compiles once",),
        ((_STEP + "_compiled.put_batch", _compiling),),
    ),
)


def _arrivals(change: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[Any], Any]:
    """Changes i32[ticks, stages], the slots in which messages are put."""

    def of(ticks: Any) -> Any:
        def wrong(table: Any) -> Any:
            plan = ticks(table)
            changed = {
                name: change(plan.columns[name], plan.slots) for name in ("arrival0", "arrival1")
            }
            return dataclasses.replace(plan, columns={**plan.columns, **changed})

        return wrong

    return of


def _a_tick_late(arrivals: np.ndarray, nowhere: int) -> np.ndarray:
    return np.roll(arrivals, 1, axis=0)


def _last_lost(arrivals: np.ndarray, nowhere: int) -> np.ndarray:
    came = np.argwhere(arrivals != nowhere)
    kept = arrivals.copy()
    for tick, stage in came[-1:]:
        kept[tick, stage] = nowhere
    return kept


def _to_the_wrong_neighbour(ticks: Any) -> Any:
    def wrong(table: Any) -> Any:
        plan = ticks(table)
        stages = plan.columns["branch"].shape[1]
        turned = tuple(
            tuple(tuple((src, (dst + 1) % stages) for src, dst in pairs) for pairs in exchange)
            for exchange in plan.exchanges
        )
        return dataclasses.replace(plan, exchanges=turned)

    return wrong


_TICKS = "shardkit.parallel.pipeline._spmd_program.ticks"

PIPELINE_MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "wrong neighbour",
        "after each tick a stage sends to the one after the one that waits",
        ("gradients", "loss"),
        ((_TICKS, _to_the_wrong_neighbour),),
    ),
    Mutation(
        "a tick late",
        "what a stage is sent is put away one tick after it came",
        ("gradients",),
        ((_TICKS, _arrivals(_a_tick_late)),),
    ),
    Mutation(
        "lost at a boundary",
        "one message between two stages is dropped",
        ("gradients",),
        ((_TICKS, _arrivals(_last_lost)),),
    ),
)


def _update_whole(update_specs: Any) -> Any:
    return lambda zero, *rest: update_specs(None, *rest)


ZERO_MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "update not split",
        "every device holds the whole state of the optimizer and makes the whole update",
        ("layout",),
        ((_STEP + "_layout.update_specs", _update_whole),),
    ),
)
