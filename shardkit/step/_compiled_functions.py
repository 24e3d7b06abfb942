"""Compiles the functions of one spec on one mesh, each on first use."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping

from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from .._core.errors import StepError
from .._core.train_state import TrainState
from .._core.types import Batch, Key, Params, PyTree
from ..nn._overridable import ActiveOverrides, StepContext, use_overrides
from ..nn._remat import use_policy
from ..parallel import check_overrides_called
from ._activations import Activations, SpecsInLoss
from ._bound_spec import BoundSpec
from ._compile import CompiledProgram, compile_program, save_compiled
from ._layout import build_model_init, build_optimizer_init, count_residual_copies, resolve_layout
from ._readback import check_executable
from ._step_functions import StepFunctions, layer_policy
from .self_check import LossProgram, Probes


class CompiledFunctions:
    """The executables of a spec on its mesh, each compiled on first use.

    Attributes:
      layout: abstract state and batch, and the sharding of every leaf.
    """

    def __init__(self, bound: BoundSpec) -> None:
        """Resolves the layout.

        Raises:
          ShardingError: every leaf that cannot be laid out.
          StepError: the spec does not form a step.
        """
        self._bound = bound
        with Activations(bound.mesh, bound.spec.strategy.activations, ()).around_init():
            self.layout = resolve_layout(bound.spec, bound.mesh)
        self._functions = StepFunctions(bound, self.layout)
        if bound.spec.debug:
            self._functions.check_key_reuse(self._names.around_init, self._names.around_loss)
        self._replicated = NamedSharding(bound.mesh, PartitionSpec())

    @functools.cached_property
    def train(self) -> CompiledProgram:
        """`(state, batch) → (state, metrics)`, the state donated; its layouts are read back.

        Raises StepError if the spec does not form a step, ShardingError if a constraint of the
        model cannot be met, or the executable differs from the declaration.
        """
        program = self._compile_on_batch(
            self._functions.train,
            (self.layout.shardings, self._replicated),
            self._functions.per_shard_accumulation,
            donate=(0,),
        )
        check_executable(program.compiled, self.layout)
        return program

    @functools.cached_property
    def init(self) -> CompiledProgram:
        """`key → state` without moments.

        These have a program of their own, so that random draws and moments do not need memory at
        the same time.
        """
        return self._compile_init(has_params=True)

    @functools.cached_property
    def init_beside(self) -> CompiledProgram:
        """`key → state` without parameters and moments, for given parameters: draws none."""
        return self._compile_init(has_params=False)

    @functools.cached_property
    def init_optimizer(self) -> CompiledProgram:
        """`params → opt_state`."""
        shardings = self.layout.shardings
        return self._compile(
            build_optimizer_init(self._bound.spec),
            args=(self.layout.state.params,),
            in_shardings=(shardings.params,),
            out_shardings=shardings.opt_state,
        )

    def _compile_init(self, has_params: bool) -> CompiledProgram:
        spec, shardings = self._bound.spec, self.layout.shardings
        draw = build_model_init(spec, count_residual_copies(spec.strategy, self._bound.mesh))
        absent: dict[str, None] = {"opt_state": None} | ({} if has_params else {"params": None})

        def run(key: Key) -> TrainState:
            return dataclasses.replace(draw(key), **absent)

        return self._compile(
            run,
            args=(self.layout.state.key,),
            in_shardings=(shardings.key,),
            out_shardings=dataclasses.replace(shardings, **absent),
        )

    @functools.cached_property
    def partial_growth(self) -> Mapping[str, int] | str:
        """The powers of the rows with which metrics grow; or why these need all rows of a batch."""
        try:
            with self._names.around_loss():
                return self._functions.check_partial_rows()
        except StepError as error:
            return str(error)

    @functools.cached_property
    def evaluate(self) -> CompiledProgram:
        """`(state, batch) → (metrics, the same as totals and weights)`."""
        return self._compile_on_batch(self._functions.evaluate, self._replicated, False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the executables of `init`, `train` and `evaluate`; see `CompiledStep.save`."""
        programs = (self.train, self.evaluate, self.init, self.init_optimizer)
        save_compiled(path, programs, self._bound.mesh)

    @functools.cached_property
    def gradients(self) -> CompiledProgram:
        """`(state, batch) → (metrics, gradients)`."""
        results = (self._replicated, self.layout.trained_shardings)
        per_shard = self._functions.per_shard_accumulation
        return self._compile_on_batch(self._functions.gradients, results, per_shard)

    @functools.cached_property
    def training_loss(self) -> LossProgram:
        """`(state, batch) → (total, weight)` of the training loss, for `self_check`."""

        def compiled(policy: str | None) -> CompiledProgram:
            build = functools.partial(self._functions.training_loss, policy)
            return self._compile_on_batch(build, self._replicated, False)

        precision = self._bound.spec.precision
        lowest = precision.compute_dtypes(self.layout.state.params).lowest
        return LossProgram.of(compiled, precision.compute_dtype, lowest)

    @functools.cached_property
    def held_loss(self) -> CompiledProgram:
        """`(state, batch, params) → (total, weight)`; see `_held_targets`."""

        def build() -> Callable[..., PyTree]:
            def run(state: TrainState, batch: Batch, start: Params) -> PyTree:
                return self._functions.training_loss(self.training_loss.policy, start)(state, batch)

            return run

        return self._compile_on_batch(build, self._replicated, False, with_params=True)

    @functools.cached_property
    def probes(self) -> Probes:
        """What `self_check` does to parameters and gradients beside running the loss."""
        return Probes(self._bound.spec, self.layout, self.training_loss.policy, self._bound.saved)

    def _compile_on_batch(
        self,
        build: Callable[[], Callable[..., PyTree]],
        out_shardings: PyTree,
        per_shard: bool,
        donate: tuple[int, ...] = (),
        with_params: bool = False,
    ) -> CompiledProgram:
        """Compiles a function of `(state, batch)`; `per_shard`: its loss sees gradient shards.

        `with_params`: of `(state, batch, params)`.
        """
        layout, names = self.layout, self._names
        params = (layout.state.params,) if with_params else ()
        param_shardings = (layout.shardings.params,) if with_params else ()
        around = StepContext(
            names.mesh,
            layout.row_axes,
            SpecsInLoss(names, per_shard, self._bound.spec.strategy.names),
            gradient_shard_axes=names.shard_axes if per_shard else (),
            moving_row_axes=layout.inner_axes,
            gathered=layout.gathered_dims(self._bound.spec.strategy.kinds),
        )
        with names.around_loss():
            run = build()
        with use_overrides(self._bound.overrides, around) as marks:
            return self._compile(
                run,
                args=(layout.state, layout.batch, *params),
                in_shardings=(layout.shardings, layout.batch_shardings, *param_shardings),
                out_shardings=out_shardings,
                donate=donate,
                marks=marks,
            )

    def _compile(
        self,
        run: Callable[..., PyTree],
        *,
        args: tuple[PyTree, ...],
        in_shardings: tuple[PyTree, ...],
        out_shardings: PyTree,
        donate: tuple[int, ...] = (),
        marks: ActiveOverrides | None = None,
    ) -> CompiledProgram:
        names = self._names

        def check(jaxpr: core.ClosedJaxpr) -> None:
            names.check(jaxpr)
            if marks:
                check_overrides_called(self._bound.spec.strategy, marks.find_unreached(jaxpr.jaxpr))

        with use_policy(layer_policy(self._bound, self.layout)):
            return compile_program(
                run,
                args,
                in_shardings=in_shardings,
                out_shardings=out_shardings,
                surroundings=names.around_loss if marks else names.around_init,
                check=check,
                donate=donate,
                options=self._bound.xla_options,
                saved=self._bound.saved,
                on_miscompiled=self._bound.spec.on_miscompiled,
            )

    @property
    def _names(self) -> Activations:
        rules = self._bound.spec.strategy.activations
        return Activations(self._bound.mesh, rules, self.layout.shard_axes)
