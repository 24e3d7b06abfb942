"""From a spec and its layout to the pure functions that are compiled."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from .._core.precision import cast_floats
from .._core.train_state import TrainState
from ..nn._remat import Policy, active, apply_policy, policy, regathering
from ._bound_spec import BoundSpec
from ._gradients import GradientFn, GradientPlan, gradients, lane_draws
from ._layout import Layout, compressing, initial_optimizer, initial_state
from ._objective import Objective, objective
from ._update import (
    Metrics,
    check_form,
    check_params,
    evaluation_step,
    gradient_step,
    training_step,
)
from .self_check._training_loss import plain_objective, training_loss
from .shard_map._plan import kept_axes
from .shard_map._survey import evaluated_on_shards, gradients_on_shards, training_on_shards


@dataclasses.dataclass(frozen=True)
class StepFunctions:
    """The functions of one spec on one mesh. Each call builds a new one, as JAX caches by identity.

    Attributes:
      bound: the spec and its mesh.
      layout: abstract state and batch, and their shardings.
    """

    bound: BoundSpec
    layout: Layout

    def __post_init__(self) -> None:
        """Refuses parameters that no gradient can be taken of."""
        check_params(self.layout.state.params)

    @property
    def given(self) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
        """What the user wrote, with abstract arguments: `{name: (function, arguments)}`."""
        spec, state = self.bound.spec, self.layout.state
        low = jax.eval_shape(self._low, state.params)
        loss = (
            objective(spec.loss_fn, self.bound.mesh),
            (low, state.model_state, self.layout.batch, state.key),
        )
        return {"init": (spec.init, (state.key,)), "loss_fn": loss}

    @property
    def by_lanes(self) -> bool:
        """Whether the loss is differentiated one lane of the batch at a time."""
        return _plan(self.bound, self.layout).by_lanes

    def init_model(self) -> Callable[[Any], TrainState]:
        """Builds `key → state` without optimizer state."""
        spec = self.bound.spec
        copies = compressing(spec.strategy, self.bound.mesh)
        return initial_state(spec.init, spec.precision, copies)

    def init_optimizer(self) -> Callable[[Any], Any]:
        """Builds `params → optimizer state`."""
        return initial_optimizer(self.bound.spec.optimizer)

    def train(self) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
        """Builds `(state, batch) → (state, metrics)`, whose state keeps its form.

        Raises (while it is traced):
          StepError: a leaf of the state changes its shape or dtype, which would compile again.
        """
        spec, split = self.bound.spec, self.layout.update
        update = training_step(self._gradient, spec.optimizer, split, spec.on_nonfinite)

        def run(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
            after, metrics = update(state, batch)
            check_form(self.layout.state, after)
            return after, metrics

        return run

    def gradients(self) -> Callable[[TrainState, Any], tuple[Metrics, Any]]:
        """Builds `(state, batch) → (metrics, gradients)`."""
        return gradient_step(self._gradient)

    def evaluate(self) -> Callable[[TrainState, Any], Metrics]:
        """Builds `(state, batch) → metrics`."""
        spec = self.bound.spec
        loss = objective(spec.loss_fn, self.bound.mesh, evaluate=True)
        if spec.mode == "shard_map":
            loss = self._planned(evaluated_on_shards, loss)
        return evaluation_step(loss, self._low)

    def training_loss(self, dtype: str) -> Callable[[TrainState, Any], Any]:
        """Builds `(state, batch) → (total, weight)` of the training loss, computed in `dtype`."""
        spec, loss = self.bound.spec, plain_objective(self.bound.spec.loss_fn)
        on_shards, precision = spec.mode == "shard_map", spec.precision
        apart = spec.accumulate.micro_batches > 1 or precision.reduces_apart
        return training_loss(
            self._planned(training_on_shards, loss) if on_shards else loss,
            lambda params: cast_floats(params, dtype),
            self.layout.batch_shardings,
            spec.accumulate.micro_batches,
            always_folds=apart and spec.accumulate.reduce == "end",
            own_keys=on_shards,
        )

    def _low(self, params: Any) -> Any:
        return cast_floats(params, self.bound.spec.precision.compute_dtype)

    @functools.cached_property
    def _gradient(self) -> GradientFn:
        """The differentiated loss.

        Raises:
          StepError: the loss does not return what a step can use, or draws randomness that
            cannot be split by lane.
        """
        state, batch = self.layout.state, self.layout.batch
        low = jax.eval_shape(self._low, state.params)
        loss = _under_policy(self.bound, (low, state.model_state, batch, state.key))
        if self.bound.spec.mode == "shard_map":
            return self._planned(gradients_on_shards, loss)
        plan = _plan(self.bound, self.layout)
        if plan.by_lanes:
            plan = dataclasses.replace(
                plan, draws=lane_draws(loss, plan, low, state.model_state, batch)
            )
        return gradients(loss, plan)

    def _planned(self, on_shards: Callable[..., Any], loss: Objective) -> Any:
        low = jax.eval_shape(self._low, self.layout.state.params)
        with active(layer_policy(self.bound, self.layout)):
            return on_shards(self.bound, self.layout, loss, low)


def layer_policy(bound: BoundSpec, layout: Layout) -> Policy | None:
    """The remat policy that marked layers follow."""
    named = policy(bound.spec.strategy.remat)
    kept = kept_axes(bound)
    over = tuple(axis for axis in layout.storing if axis not in kept)
    return regathering(named, over) if bound.spec.mode == "shard_map" and over else named


def _plan(bound: BoundSpec, layout: Layout) -> GradientPlan:
    return GradientPlan(
        mesh=bound.mesh,
        accumulate=bound.spec.accumulate,
        precision=bound.spec.precision,
        axes=layout.lane_axes,
        inner=tuple(axis for axis in layout.row_axes if axis not in layout.lane_axes),
        params=layout.shardings.params,
        gradients=layout.gradients,
        batch=layout.batch_shardings,
        rows=layout.rows,
    )


def _under_policy(bound: BoundSpec, args: tuple[Any, ...]) -> Objective:
    """The loss; as a whole under the remat policy where it marks no layer of its own."""
    loss = objective(bound.spec.loss_fn, bound.mesh)
    return apply_policy(loss, policy(bound.spec.strategy.remat), *args)
