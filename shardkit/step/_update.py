"""Builds the pure functions of a step, over global arrays: train, gradients, evaluate."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from .._core.errors import Problem, StepError, raise_all
from .._core.partition import Partition
from .._core.precision import widen
from .._core.train_state import TrainState
from .._core.tree import describe_type, leaves_by_path
from .._core.types import Batch, Key, Mean, Metrics, Params, PyTree, Scalar
from ._gradients import GradientFn, constrain_tree
from ._nonfinite import SKIPPED, OnNonfinite, is_finite_update, select_state
from ._objective import LossOutput, Objective, divide_mean
from .optim._extra_args import call_update
from .owners import update_by_owners

# Folded into the key in place of a step number, which never reaches it.
_EVALUATE = 0xFFFFFFFF


def build_train_step(
    gradients: GradientFn,
    optimizer: optax.GradientTransformation,
    partition: Partition,
    shardings: PyTree | None,
    *,
    on_nonfinite: OnNonfinite,
    arg_shardings: PyTree | None,
    owners: bool | None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds `(state, batch) → (state, metrics)` from the differentiated loss and any optax chain.

    `shardings` are those of the update, if it is split further than the parameters; these are
    gathered afterwards, by the layout of the results. `arg_shardings` are those of gradients,
    optimizer state, parameters and loss; None if matrices that the optimizer multiplies are not
    moved to owners.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def value_and_grad(moved: Params) -> tuple[Scalar, Params]:
            params = partition.merge(moved, state.params)
            output, grads = gradients(params, state.model_state, batch, step_key(state))
            return divide_mean(output.loss), grads

        output, grads = gradients(state.params, state.model_state, batch, step_key(state))
        metrics = _collect_metrics(output, grads)
        with jax.named_scope("update"):
            before = constrain_tree(partition.trained(state.params), shardings)
            grads = constrain_tree(grads, shardings)
            given = (grads, state.opt_state, before, metrics["loss"])
            owned = None
            if arg_shardings and owners is not False:
                owned = update_by_owners(optimizer, given, arg_shardings, declared=bool(owners))
            updates, opt_state = owned or call_update(
                optimizer, *given, value_and_grad=value_and_grad
            )
            _check_updates(updates, before)
            params = constrain_tree(optax.apply_updates(before, updates), shardings)
            after = dataclasses.replace(
                state,
                step=state.step + 1,
                params=partition.merge(params, state.params),
                opt_state=opt_state,
                model_state=output.model_state,
            )
            if on_nonfinite == "apply":
                return after, metrics
            is_finite = is_finite_update(metrics) & ~state.halted
            metrics[SKIPPED] = 1.0 - is_finite.astype(jnp.float32)
            unchanged = dataclasses.replace(state, params=partition.merge(before, state.params))
            return select_state(is_finite, after, unchanged, on_nonfinite), metrics

    return step


def _check_updates(updates: PyTree, params: Params) -> None:
    """Raises StepError with leaves that updates lack, add, or have in another shape than params."""
    got, want = _leaf_types(updates, "params"), _leaf_types(params, "params")
    shapes = {path: short.partition("[")[2] for path, short in got.items()}
    problems = [
        Problem(path, f"is {want.get(path, 'absent')}; its update is {got.get(path, 'absent')}")
        for path in dict.fromkeys([*want, *got])
        if path not in want or shapes.get(path) != want[path].partition("[")[2]
    ]
    fix = "an optimizer whose update returns a tree like the parameters"
    raise_all(StepError, "The updates do not match the parameters.", problems, fix)


def build_gradient_step(
    gradients: GradientFn,
) -> Callable[[TrainState, Batch], tuple[Metrics, Params]]:
    """Builds `(state, batch) → (metrics, gradients)`."""

    def step(state: TrainState, batch: Batch) -> tuple[Metrics, Params]:
        output, grads = gradients(state.params, state.model_state, batch, step_key(state))
        return _collect_metrics(output, grads), grads

    return step


def build_eval_step(
    objective: Objective, to_compute_params: Callable[[Params], Params]
) -> Callable[[TrainState, Batch], tuple[Metrics, dict[str, Mean]]]:
    """Builds `(state, batch) → (metrics, the same as totals and weights)`."""

    def step(state: TrainState, batch: Batch) -> tuple[Metrics, dict[str, Mean]]:
        key = jax.random.fold_in(state.key, jnp.uint32(_EVALUATE))
        _, output = objective(to_compute_params(state.params), state.model_state, batch, key)
        return _loss_metrics(output), {"loss": output.loss, **output.metrics}

    return step


def step_key(state: TrainState) -> Key:
    """Key of the next step."""
    return jax.random.fold_in(state.key, state.step)


def _collect_metrics(output: LossOutput, grads: Params) -> Metrics:
    with jax.named_scope("grad_norm"):
        norm = optax.tree.norm(jax.tree.map(widen, grads))
    return {**_loss_metrics(output), "grad_norm": norm}


def _loss_metrics(output: LossOutput) -> Metrics:
    return {
        "loss": divide_mean(output.loss),
        **{k: divide_mean(m) for k, m in output.metrics.items()},
    }


def check_state_types(before: TrainState, after: TrainState) -> None:
    """Raises StepError with every leaf of a state whose shape or dtype a step changed."""
    old, new = _leaf_types(before, "state"), _leaf_types(after, "state")
    problems = [
        Problem(path, f"is {old.get(path, 'absent')} before, {new.get(path, 'absent')} after")
        for path in dict.fromkeys([*old, *new])
        if old.get(path) != new.get(path)
    ]
    fix = "make init and the update return the same types, or the next step would compile again"
    raise_all(StepError, "The step changes the types of the state.", problems, fix)


def _leaf_types(tree: PyTree, name: str) -> dict[str, str]:
    """`{path: "f32[4,8]"}` of every leaf."""
    return {path: describe_type(x) for path, x in leaves_by_path(tree, name).items()}
