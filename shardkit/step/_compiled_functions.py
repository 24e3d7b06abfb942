"""The executables of one spec on one mesh: the step at once, others when they are first used."""

import dataclasses
import functools
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from .._core.errors import Problem, StepError, raise_all
from ..nn._overridable import ActiveOverrides, StepContext, use_overrides
from ..nn._remat import active
from ._activations import Activations, SpecsInLoss
from ._bound_spec import BoundSpec
from ._compile import CompiledProgram, compile_program
from ._debug import check_keys
from ._layout import Layout
from ._readback import check_executable
from ._step_functions import StepFunctions, layer_policy
from .self_check import LossProgram, Probes


class CompiledFunctions:
    """Compiles the functions of a spec for its mesh, each once."""

    def __init__(self, bound: BoundSpec, layout: Layout) -> None:
        """Takes what is to be compiled.

        Raises:
          StepError: the spec does not form a step.
        """
        self._bound, self._layout = bound, layout
        self._functions = StepFunctions(bound, layout)
        if bound.spec.debug:
            check_keys(self._functions.given)
        self._whole = NamedSharding(bound.mesh, PartitionSpec())

    @functools.cached_property
    def train(self) -> CompiledProgram:
        """`(state, batch) → (state, metrics)`, the state donated, read back.

        Raises:
          StepError: the spec does not form a step.
          ShardingError: a constraint of the model cannot be met, or the executable is not what
            was declared.
        """
        layout = self._layout
        results = (layout.shardings, self._whole)
        made = self._on_state_and_batch(
            self._functions.train(), results, self._functions.by_lanes, donate=(0,)
        )
        check_executable(
            made.compiled,
            layout.state,
            layout.shardings,
            layout.batch,
            layout.batch_shardings,
        )
        return made

    @functools.cached_property
    def init(self) -> tuple[CompiledProgram, CompiledProgram]:
        """The model, then the optimizer: what is drawn needs room that the moments take later."""
        state, placed = self._layout.state, self._layout.shardings
        model = self._compile(
            self._functions.init_model(),
            (state.key,),
            (placed.key,),
            dataclasses.replace(placed, opt_state=None),
        )
        optimizer = self._compile(
            self._functions.init_optimizer(), (state.params,), (placed.params,), placed.opt_state
        )
        return model, optimizer

    @functools.cached_property
    def evaluate(self) -> CompiledProgram:
        """`(state, batch) → metrics`."""
        return self._on_state_and_batch(self._functions.evaluate(), self._whole, by_lanes=False)

    @functools.cached_property
    def gradients(self) -> CompiledProgram:
        """`(state, batch) → (metrics, gradients)`."""
        results = (self._whole, self._layout.shardings.params)
        by_lanes = self._functions.by_lanes
        return self._on_state_and_batch(self._functions.gradients(), results, by_lanes)

    @functools.cached_property
    def training_loss(self) -> LossProgram:
        """`(state, batch) → (total, weight)` of the training loss, for `self_check`."""

        def compiled(dtype: str) -> CompiledProgram:
            run = self._functions.training_loss(dtype)
            return self._on_state_and_batch(run, self._whole, by_lanes=False)

        return LossProgram.of(compiled, self._bound.spec.precision.compute_dtype)

    @functools.cached_property
    def probes(self) -> Probes:
        """What `self_check` does to parameters and gradients beside running the loss."""
        return Probes(self._bound.spec, self._layout, self.training_loss.dtype)

    def _on_state_and_batch(
        self, run: Any, results: Any, by_lanes: bool, donate: tuple[int, ...] = ()
    ) -> CompiledProgram:
        layout, names = self._layout, self._names
        args, placed = (layout.state, layout.batch), (layout.shardings, layout.batch_shardings)
        around = StepContext(
            names.mesh,
            layout.row_axes,
            SpecsInLoss(names, by_lanes),
            names.lane_axes if by_lanes else (),
            tuple(axis for axis in layout.row_axes if axis not in layout.lane_axes),
        )
        # Explicit collectives carry out what they can themselves, and refuse the rest.
        manual = self._bound.spec.mode == "shard_map"
        regions = {} if manual else dict(self._bound.spec.strategy.regions)
        with use_overrides(regions, around) as marks:
            return self._compile(run, args, placed, results, donate, marks)

    def _compile(
        self,
        run: Any,
        args: Any,
        placed: Any,
        results: Any,
        donate: tuple[int, ...] = (),
        marks: ActiveOverrides | None = None,
    ) -> CompiledProgram:
        names, options = self._names, self._bound.xla_options

        def check(jaxpr: Any) -> None:
            names.check(jaxpr)
            if marks:
                _check_reached(marks, jaxpr)

        with active(layer_policy(self._bound, self._layout)):
            return compile_program(run, args, placed, results, names, check, donate, options)

    @property
    def _names(self) -> Activations:
        rules = self._bound.spec.strategy.activations
        return Activations(self._bound.mesh, rules, self._layout.lane_axes)


def _check_reached(marks: ActiveOverrides, jaxpr: Any) -> None:
    """Refuses a step whose model has no part that its strategy was to carry out.

    Raises:
      StepError: naming each carrier that nothing was left to.
    """
    problems = [
        Problem(str(carrier), f"the model marks no {name}", f"sk.{name}(...) in the model")
        for name, carrier in marks.unreached(jaxpr.jaxpr).items()
    ]
    raise_all(StepError, "The strategy carries out what the model does not mark.", problems)
