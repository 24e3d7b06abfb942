"""From a declaration and its layout to the pure functions that are compiled."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from .._precision import cast_floats
from .._remat import Policy, active, apply_policy, policy, regathering
from ..state import TrainState
from ._declaration import Declaration
from ._gradients import GradientFn, Plan, gradients, lane_draws
from ._layout import Layout, compressing, initial_optimizer, initial_state
from ._manual_plan import kept_axes
from ._manual_survey import evaluated_on_shards, gradients_on_shards
from ._objective import Objective, objective
from ._update import Metrics, check_form, evaluation_step, gradient_step, training_step


@dataclasses.dataclass(frozen=True)
class Functions:
    """The functions of one declaration. Each call builds a new one, as JAX caches by identity.

    Attributes:
      declaration: what was asked.
      layout: abstract state and batch, and their shardings.
    """

    declaration: Declaration
    layout: Layout

    def __post_init__(self) -> None:
        """Refuses parameters that no gradient can be taken of."""
        self.declaration.check_params(self.layout.state.params)

    @property
    def given(self) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
        """What the user wrote, with abstract arguments: `{name: (function, arguments)}`."""
        d, state = self.declaration, self.layout.state
        low = jax.eval_shape(self._low, state.params)
        loss = (
            objective(d.loss_fn, d.built_mesh),
            (low, state.extra, self.layout.batch, state.key),
        )
        return {"init": (d.init, (state.key,)), "loss_fn": loss}

    @property
    def by_lanes(self) -> bool:
        """Whether the loss is differentiated one lane of the batch at a time."""
        return _plan(self.declaration, self.layout).by_lanes

    def init_model(self) -> Callable[[Any], TrainState]:
        """Builds `key → state` without optimizer state."""
        d = self.declaration
        return initial_state(d.init, d.precision, compressing(d.strategy, d.built_mesh))

    def init_optimizer(self) -> Callable[[Any], Any]:
        """Builds `params → optimizer state`."""
        return initial_optimizer(self.declaration.optimizer)

    def train(self) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
        """Builds `(state, batch) → (state, metrics)`, whose state keeps its form.

        Raises (while it is traced):
          StepError: a leaf of the state changes its shape or dtype, which would compile again.
        """
        d = self.declaration
        update = training_step(self._gradient, d.optimizer, self.layout.update, d.on_nonfinite)

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
        d = self.declaration
        loss = objective(d.loss_fn, d.built_mesh, evaluate=True)
        if d.mode == "shard_map":
            loss = self._planned(evaluated_on_shards, loss)
        return evaluation_step(loss, self._low)

    def _low(self, params: Any) -> Any:
        return cast_floats(params, self.declaration.precision.compute)

    @functools.cached_property
    def _gradient(self) -> GradientFn:
        """The differentiated loss.

        Raises:
          StepError: the loss does not return what a step can use, or draws randomness that
            cannot be split by lane.
        """
        state, batch = self.layout.state, self.layout.batch
        low = jax.eval_shape(self._low, state.params)
        loss = _under_policy(self.declaration, (low, state.extra, batch, state.key))
        if self.declaration.mode == "shard_map":
            return self._planned(gradients_on_shards, loss)
        plan = _plan(self.declaration, self.layout)
        if plan.by_lanes:
            plan = dataclasses.replace(plan, draws=lane_draws(loss, plan, low, state.extra, batch))
        return gradients(loss, plan)

    def _planned(self, on_shards: Callable[..., Any], loss: Objective) -> Any:
        low = jax.eval_shape(self._low, self.layout.state.params)
        with active(layer_policy(self.declaration, self.layout)):
            return on_shards(self.declaration, self.layout, loss, low)


def layer_policy(declaration: Declaration, layout: Layout) -> Policy | None:
    """The remat policy that marked layers follow."""
    named = policy(declaration.strategy.remat)
    kept = kept_axes(declaration)
    over = tuple(axis for axis in layout.storing if axis not in kept)
    return regathering(named, over) if declaration.mode == "shard_map" and over else named


def _plan(declaration: Declaration, layout: Layout) -> Plan:
    return Plan(
        mesh=declaration.built_mesh,
        accumulate=declaration.accumulate,
        precision=declaration.precision,
        axes=layout.lane_axes,
        inner=tuple(axis for axis in layout.row_axes if axis not in layout.lane_axes),
        params=layout.shardings.params,
        gradients=layout.gradients,
        batch=layout.batch_shardings,
        rows=layout.rows,
    )


def _under_policy(declaration: Declaration, args: tuple[Any, ...]) -> Objective:
    """The loss; as a whole under the remat policy where it marks no layer of its own."""
    loss = objective(declaration.loss_fn, declaration.built_mesh)
    return apply_policy(loss, policy(declaration.strategy.remat), *args)
