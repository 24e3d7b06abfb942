"""Builds the pure functions of a step from a spec and its layout."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh, NamedSharding

from .._core.errors import Problem, StepError, first_line, raise_all
from .._core.precision import cast_floats
from .._core.train_state import TrainState
from .._core.types import Accumulate, Batch, Mean, Params, PyTree
from ..nn._remat import Policy, apply_policy, parse_policy, regathering_policy, use_policy
from ._bound_spec import BoundSpec
from ._gradients import (
    GradientFn,
    GradientPlan,
    LossArgs,
    TracedLoss,
    build_gradients,
    keep_convolutions,
    plan_draws,
)
from ._layout import StepLayout
from ._objective import Objective, build_objective
from ._split_checks import add_up_parts, check_fixed_state, check_partial_rows, check_split_rows
from ._update import (
    Metrics,
    build_eval_step,
    build_gradient_step,
    build_train_step,
    check_state_types,
)
from .self_check import build_plain_objective, build_training_loss, hold_targets
from .shard_map._build import build_on_shards
from .shard_map._plan import kept_axes

if TYPE_CHECKING:
    from ._spec import StepSpec


@dataclasses.dataclass(frozen=True)
class StepFunctions:
    """Builds the functions of one spec on one mesh, anew per call, since JAX caches by identity."""

    bound: BoundSpec  # the spec and its mesh
    layout: StepLayout  # abstract state and batch, and their shardings

    def check_key_reuse(
        self,
        around_init: Callable[[], contextlib.AbstractContextManager[None]],
        around_loss: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        """Raises StepError for functions that use a key twice, which draws equal numbers.

        JAX's checker traces `init` and the loss under the mesh and the rules that `around_init` and
        `around_loss` enter.
        """
        loss = build_objective(self.bound.spec.loss_fn, self.bound.mesh)
        functions = (
            ("init", around_init, self.bound.spec.init, (self.layout.state.key,)),
            ("loss_fn", around_loss, loss, self._loss_args),
        )
        problems = []
        for name, around, run, args in functions:
            try:
                with around(), jax.debug_key_reuse(True):
                    # The checker runs only on what is traced for a jit, which caches by identity.
                    jax.jit(lambda *args, run=run: run(*args)).trace(*args)
            except jax.errors.KeyReuseError as error:
                why = f"uses a random key twice: {first_line(error)}"
                problems.append(Problem(name, why))
        fix = "first, second = jax.random.split(key)"
        raise_all(StepError, "Random numbers would repeat.", problems, fix)

    @property
    def per_shard_accumulation(self) -> bool:
        """Whether gradients are kept apart by gradient shard."""
        return GradientPlan(self.bound, self.layout).per_shard_accumulation

    def train(self) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        """Builds `(state, batch) → (state, metrics)`.

        Its trace raises StepError if a leaf of the state changes its shape or dtype, so that the
        next call would compile again.
        """
        spec, shardings = self.bound.spec, self.layout.update
        update = build_train_step(
            self._gradient_fn,
            spec.optimizer,
            self.layout.partition,
            shardings,
            on_nonfinite=spec.on_nonfinite,
            arg_shardings=self._update_shardings,
            owners=spec.owners,
        )

        def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            after, metrics = update(state, batch)
            check_state_types(self.layout.state, after)
            return after, metrics

        return run

    @property
    def _update_shardings(self) -> tuple[PyTree, PyTree, PyTree, NamedSharding]:
        """Of gradients, optimizer state, parameters and loss, as the update gets them."""
        shardings, update = self.layout.shardings, self.layout.update
        update = self.layout.trained_shardings if update is None else update
        return update, shardings.opt_state, update, shardings.step

    def gradients(self) -> Callable[[TrainState, Batch], tuple[Metrics, Params]]:
        """Builds `(state, batch) → (metrics, gradients)`."""
        return build_gradient_step(self._gradient_fn)

    def check_partial_rows(self) -> dict[str, int]:
        """Raises StepError if `evaluate` cannot be computed on fewer rows; see there."""
        loss = build_objective(self.bound.spec.loss_fn, self.bound.mesh, evaluate=True)
        proved = self.bound.spec.independent_rows
        return check_partial_rows(self.layout, loss, self._loss_args, proved=proved)

    def evaluate(self) -> Callable[[TrainState, Batch], tuple[Metrics, dict[str, Mean]]]:
        """Builds `(state, batch) → (metrics, the same as totals and weights)`."""
        spec = self.bound.spec
        loss = build_objective(spec.loss_fn, self.bound.mesh, evaluate=True)
        traced = check_split_rows(self.bound, self.layout, loss, self._loss_args, gradients=False)
        if spec.mode == "shard_map":
            loss = add_up_parts(loss, traced, self.layout)
            loss = self._build_on_shards(loss, accumulate=Accumulate())
        else:
            loss = keep_convolutions(loss, self.bound, self.layout)
        return build_eval_step(loss, self._to_compute_params)

    def training_loss(
        self, policy: str | None, start: Params | None = None
    ) -> Callable[[TrainState, Batch], Any]:
        """Builds `(state, batch) → (total, weight)` of the training loss.

        It sees the parameters in the dtype `policy`; None: as they are stored. With `start`, what
        is behind `stop_gradient` is that of these parameters.
        """
        spec, loss = self.bound.spec, build_plain_objective(self.bound.spec.loss_fn)
        loss = add_up_parts(loss, self._traced, self.layout)
        on_shards = spec.mode == "shard_map"
        if not on_shards:
            loss = keep_convolutions(loss, self.bound, self.layout)
        loss = self._build_on_shards(loss) if on_shards else loss
        if start is not None:
            loss = hold_targets(loss, cast_floats(start, policy))
        return build_training_loss(
            loss,
            lambda params: cast_floats(params, policy),
            self.layout,
            spec.accumulate.micro_batches,
            per_shard=self.per_shard_accumulation and not on_shards,
        )

    def _to_compute_params(self, params: Params) -> Params:
        return cast_floats(params, self.bound.spec.precision.compute_dtype)

    @functools.cached_property
    def _gradient_fn(self) -> GradientFn:
        """The gradients of the loss.

        Raises StepError if it does not return what a step can use, or draws randomness that cannot
        be split by gradient shard.
        """
        loss = add_up_parts(self._training_objective, self._traced, self.layout)
        plan = GradientPlan(self.bound, self.layout, self._traced)
        on_shards = self.bound.spec.mode == "shard_map"
        if plan.micro_batches > 1 if on_shards else plan.per_shard_accumulation:
            check_fixed_state(self.bound, self._loss_args)
        if on_shards:
            return self._build_on_shards(loss, gradients=True)
        if plan.per_shard_accumulation:
            plan = plan_draws(loss, plan, self._loss_args)
        return build_gradients(loss, plan)

    @functools.cached_property
    def _training_objective(self) -> Objective:
        """The training loss, checkpointed as a whole if it marks no layers with `sk.nn.remat`."""
        loss = build_objective(self.bound.spec.loss_fn, self.bound.mesh)
        return apply_policy(loss, parse_policy(self.bound.spec.strategy.remat), *self._loss_args)

    @functools.cached_property
    def _traced(self) -> TracedLoss | None:
        """The training loss on whole arrays, checked; see `check_split_rows`."""
        loss = self._training_objective
        return check_split_rows(self.bound, self.layout, loss, self._loss_args)

    def _build_on_shards(self, loss: Objective, **options: Any) -> Any:
        options = {"accumulate": self.bound.spec.accumulate, **options}
        with use_policy(layer_policy(self.bound, self.layout)):
            return build_on_shards(self.bound, self.layout, loss, self._loss_args, **options)

    @functools.cached_property
    def _loss_args(self) -> LossArgs:
        """Abstract arguments of the loss, with the rows of the global batch."""
        state = self.layout.state
        compute_params = jax.eval_shape(self._to_compute_params, state.params)
        return compute_params, state.model_state, self.layout.batch, state.key


def find_mixed_rows(spec: "StepSpec", mesh: Mesh, layout: StepLayout) -> str:
    """What mixes rows of a loss where its step splits them, whatever `independent_rows` says.

    Returns the operation and its line; "" if nothing does, or if it cannot be read.
    """
    bound = BoundSpec(spec.replace(independent_rows=False), mesh)
    args = StepFunctions(bound, layout)._loss_args
    try:
        check_split_rows(bound, layout, build_objective(spec.loss_fn, mesh), args)
    except StepError as error:
        return str(error).splitlines()[1].strip()
    except Exception:  # a user's code, which failed in some way already
        return ""
    return ""


def layer_policy(bound: BoundSpec, layout: StepLayout) -> Policy | None:
    """The remat policy of marked layers; in `shard_map` mode it also gathers weights again."""
    remat_policy = parse_policy(bound.spec.strategy.remat)
    kept = kept_axes(bound)
    regathered = tuple(axis for axis in layout.storage_axes if axis not in kept)
    if bound.spec.mode == "shard_map" and regathered:
        return regathering_policy(remat_policy, regathered)
    return remat_policy
