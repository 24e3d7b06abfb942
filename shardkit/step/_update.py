"""The functions that a step is made of: pure, over global arrays, knowing no layout."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._core.errors import Problem, StepError, raise_all
from .._core.train_state import TrainState
from .._core.tree import leaves_by_path, list_leaves, short_type
from .._core.types import Params
from ._gradients import GradientFn
from ._nonfinite import SKIPPED, OnNonfinite, chosen, is_usable
from ._objective import LossOutput, Objective, value_of

Metrics = dict[str, jax.Array]

# Folded into the key in place of a step number, which never gets this large.
_EVALUATE = 0xFFFFFFFF


def training_step(
    gradients: GradientFn,
    optimizer: optax.GradientTransformation,
    split: Any = None,
    on_nonfinite: OnNonfinite = "apply",
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Builds `(state, batch) → (state, metrics)`.

    Args:
      gradients: the differentiated loss.
      optimizer: any optax chain.
      split: pytree of `NamedSharding` in which the update is computed, where it is split further
        than the parameters are; they are gathered afterwards by the layout of the results.
      on_nonfinite: what is done with an update that is not finite.
    """
    update = optimizer.update
    # Optimizers that look at the loss (`reduce_on_plateau`, `momo`) get it.
    sees_loss = _takes(update, "value")

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        outcome, grads = gradients(state.params, state.model_state, batch, step_key(state))
        metrics = _metrics(outcome, grads)
        with jax.named_scope("update"):
            seen = {"value": metrics["loss"]} if sees_loss else {}
            before, grads = _shards(state.params, split), _shards(grads, split)
            updates, opt_state = update(grads, state.opt_state, before, **seen)
            _check_updates(updates, before)
            params = _shards(optax.apply_updates(before, updates), split)
            after = dataclasses.replace(
                state,
                step=state.step + 1,
                params=params,
                opt_state=opt_state,
                model_state=outcome.model_state,
            )
            if on_nonfinite == "apply":
                return after, metrics
            usable = is_usable(metrics) & ~state.halted
            metrics[SKIPPED] = 1.0 - usable.astype(jnp.float32)
            kept = dataclasses.replace(state, params=before)
            return chosen(usable, after, kept, on_nonfinite), metrics

    return step


def _check_updates(updates: Any, params: Any) -> None:
    """Compares what an optimizer returns with the parameters that it is added to.

    Raises:
      StepError: with every leaf that one of them lacks, or has in another shape.
    """
    got, want = (
        {p: short_type(x.shape, x.dtype) for p, x in leaves_by_path(tree, "params").items()}
        for tree in (updates, params)
    )
    shapes = {path: short.partition("[")[2] for path, short in got.items()}
    problems = [
        Problem(path, f"is {want.get(path, 'absent')}; its update {_or(got, path)}")
        for path in dict.fromkeys([*want, *got])
        if path not in want or shapes.get(path) != want[path].partition("[")[2]
    ]
    fix = "an optimizer whose update returns a tree like the parameters"
    raise_all(StepError, "The updates are not of the form of the parameters.", problems, fix)


def _or(types: Mapping[str, str], path: str) -> str:
    return f"is {types[path]}" if path in types else "is absent"


def _shards(tree: Any, split: Any) -> Any:
    return tree if split is None else jax.tree.map(jax.lax.with_sharding_constraint, tree, split)


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function can be called with a keyword argument."""
    parameters = inspect.signature(function).parameters
    catches_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return catches_all or name in parameters


def gradient_step(gradients: GradientFn) -> Callable[[TrainState, Any], tuple[Metrics, Any]]:
    """Builds `(state, batch) → (metrics, gradients)`: what the update would be made from."""

    def step(state: TrainState, batch: Any) -> tuple[Metrics, Any]:
        outcome, grads = gradients(state.params, state.model_state, batch, step_key(state))
        return _metrics(outcome, grads), grads

    return step


def evaluation_step(objective: Objective, compute: Callable[[Any], Any]) -> Callable[..., Metrics]:
    """Builds `(state, batch) → metrics`, with the parameters cast by `compute`."""

    def step(state: TrainState, batch: Any) -> Metrics:
        key = jax.random.fold_in(state.key, jnp.uint32(_EVALUATE))
        _, outcome = objective(compute(state.params), state.model_state, batch, key)
        return _values(outcome)

    return step


def step_key(state: TrainState) -> jax.Array:
    """Key of the step that a state is about to make."""
    return jax.random.fold_in(state.key, state.step)


def _metrics(outcome: LossOutput, grads: Any) -> Metrics:
    with jax.named_scope("grad_norm"):
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
    return {**_values(outcome), "grad_norm": norm}


def _values(outcome: LossOutput) -> Metrics:
    return {"loss": value_of(outcome.loss), **{k: value_of(m) for k, m in outcome.metrics.items()}}


def check_params(params: Params) -> None:
    """Refuses parameters that no gradient can be taken of.

    Raises:
      StepError: naming each leaf that is not floating-point.
    """
    problems = [
        Problem(str(leaf), "is no floating-point array, so it has no gradient")
        for leaf in list_leaves(params)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    fix = "return sk.Variables(params, model_state) from init, with these leaves in model_state"
    raise_all(StepError, "Some parameters cannot be trained.", problems, fix)


def check_form(before: TrainState, after: TrainState) -> None:
    """Compares the types of a state before and after a step.

    Raises:
      StepError: with every leaf that changed.
    """
    old, new = (
        {p: short_type(x.shape, x.dtype) for p, x in leaves_by_path(state, "state").items()}
        for state in (before, after)
    )
    problems = [
        Problem(path, f"is {old.get(path, 'absent')} before, {new.get(path, 'absent')} after")
        for path in dict.fromkeys([*old, *new])
        if old.get(path) != new.get(path)
    ]
    fix = "make init and the update agree, or the second step would compile again"
    raise_all(
        StepError, "The state after a step is not of the form of the state before.", problems, fix
    )
