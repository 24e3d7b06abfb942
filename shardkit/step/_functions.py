"""From a declaration and its layout to the pure functions that are compiled."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from .._errors import Problem, StepError, raise_all
from .._precision import cast_floats
from .._remat import active, policy
from .._tree import path_str, short_type
from ..state import TrainState
from ._declaration import Declaration
from ._gradients import GradientFn, Plan, gradients, lane_draws
from ._layout import Layout, initial_optimizer, initial_state
from ._objective import Objective, objective
from ._update import Metrics, evaluation_step, gradient_step, training_step


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
    def by_lanes(self) -> bool:
        """Whether the loss is differentiated one lane of the batch at a time."""
        return _plan(self.declaration, self.layout).by_lanes

    def init_model(self) -> Callable[[Any], TrainState]:
        """Builds `key → state` without optimizer state."""
        return initial_state(self.declaration.init, self.declaration.precision)

    def init_optimizer(self) -> Callable[[Any], Any]:
        """Builds `params → optimizer state`."""
        return initial_optimizer(self.declaration.optimizer)

    def train(self) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
        """Builds `(state, batch) → (state, metrics)`, whose state keeps its form.

        Raises (while it is traced):
          StepError: a leaf of the state changes its shape or dtype, which would compile again.
        """
        update = training_step(self._gradient, self.declaration.optimizer, self.layout.update)

        def run(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
            after, metrics = update(state, batch)
            _check_form(self.layout.state, after)
            return after, metrics

        return run

    def gradients(self) -> Callable[[TrainState, Any], tuple[Metrics, Any]]:
        """Builds `(state, batch) → (metrics, gradients)`."""
        return gradient_step(self._gradient)

    def evaluate(self) -> Callable[[TrainState, Any], Metrics]:
        """Builds `(state, batch) → metrics`."""
        loss = objective(self.declaration.loss_fn, evaluate=True)
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
        plan = _plan(self.declaration, self.layout)
        if plan.by_lanes:
            plan = dataclasses.replace(plan, draws=lane_draws(loss, plan, low, state.extra, batch))
        return gradients(loss, plan)


def _plan(declaration: Declaration, layout: Layout) -> Plan:
    return Plan(
        mesh=declaration.mesh,
        accumulate=declaration.accumulate,
        precision=declaration.precision,
        axes=layout.row_axes,
        params=layout.shardings.params,
        gradients=layout.gradients,
        batch=layout.batch_shardings,
        rows=layout.rows,
    )


def _under_policy(declaration: Declaration, args: tuple[Any, ...]) -> Objective:
    """The loss; as a whole under the remat policy where it marks no layer of its own."""
    loss = objective(declaration.loss_fn)
    named = policy(declaration.strategy.remat)
    if named is None:
        return loss
    with active(named) as marks:
        jax.eval_shape(loss, *args)
    return loss if marks.count else jax.checkpoint(loss, policy=named)


def _check_form(before: TrainState, after: TrainState) -> None:
    old, new = (
        {
            path_str(p): short_type(x.shape, x.dtype)
            for p, x in jax.tree_util.tree_leaves_with_path(s)
        }
        for s in (before, after)
    )
    problems = [
        Problem(
            f"state/{path}", f"is {old.get(path, 'absent')} before, {new.get(path, 'absent')} after"
        )
        for path in dict.fromkeys([*old, *new])
        if old.get(path) != new.get(path)
    ]
    fix = "make init and the update agree, or the second step would compile again"
    raise_all(
        StepError, "The state after a step is not of the form of the state before.", problems, fix
    )
