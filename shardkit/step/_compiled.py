"""`CompiledStep`: the executables of one declaration, and what was proved of them."""

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._errors import Problem, StateError, format_problems
from .._precision import Precision, cast_floats
from .._remat import active, policy
from .._types import Accumulate
from ..inspect import Report
from ..parallel import Strategy
from ..state import TrainState
from ._activations import Activations
from ._compile import Program, compile_program
from ._declaration import Declaration, declare
from ._functions import gradient_function, step_function
from ._gradients import GradientFn
from ._inputs import check_alive, check_apart, check_state, put_batch
from ._layout import Layout, initial_optimizer, initial_state, resolve_layout
from ._objective import objective
from ._readback import check_executable
from ._report import inspected
from ._update import Metrics, evaluation_step, gradient_step


class CompiledStep:
    """One training step, compiled for one mesh. Made by `compile_step`.

    Attributes:
      declaration: what it was compiled from.
      layout: abstract state and batch, and the sharding of every leaf.
    """

    def __init__(self, declaration: Declaration) -> None:
        """Resolves, traces, compiles and reads back; see `compile_step`."""
        d = self.declaration = declaration
        self.layout: Layout = resolve_layout(
            d.init, d.optimizer, d.batch, d.mesh, d.strategy, d.precision, d.accumulate.steps
        )
        d.check_params(self.layout.state.params)
        run = step_function(d, self.layout, self._gradient_fn)
        self._program = self._compile(run, (self.shardings, self._replicated), donate=(0,))
        check_executable(
            self._program.compiled,
            self.layout.state,
            self.shardings,
            self.layout.batch,
            self.batch_shardings,
        )
        # The state made last is known to be sound; any other one is looked at more closely.
        self._last: weakref.ref[TrainState] | None = None

    @property
    def mesh(self) -> Mesh:
        """The device mesh."""
        return self.declaration.mesh

    @property
    def strategy(self) -> Strategy:
        """The declared layout."""
        return self.declaration.strategy

    @property
    def abstract_state(self) -> TrainState:
        """`TrainState` of `jax.ShapeDtypeStruct`, global shapes."""
        return self.layout.state

    @property
    def shardings(self) -> TrainState:
        """`TrainState` of `NamedSharding`."""
        return self.layout.shardings

    @property
    def batch_shardings(self) -> Any:
        """Pytree of `NamedSharding`, one per batch leaf."""
        return self.layout.batch_shardings

    @property
    def program(self) -> Program:
        """The executable of the step, with its jaxpr, compiler messages and compile times."""
        return self._program

    def hlo(self) -> str:
        """Text of the optimized program that each device runs."""
        return self._program.compiled.as_text()

    def init(self, key: jax.Array) -> TrainState:
        """Makes the first state; every leaf is born on its devices, as declared.

        Args:
          key: typed PRNG key[], `jax.random.key(0)`. The same key gives the same state, bit for
            bit, on every mesh.

        Raises:
          StateError: `key` is no typed key of the implementation that the step was compiled for.
        """
        expected = self.layout.state.key.dtype
        if not isinstance(key, jax.Array) or key.dtype != expected or key.shape != ():
            what = f"{key.dtype}{list(key.shape)}" if isinstance(key, jax.Array) else repr(key)
            problem = Problem("key", f"is {what}; the step takes one typed key, {expected}[]")
            fix = "step.init(jax.random.key(0))"
            raise StateError(format_problems("The state needs a random key.", [problem], fix))
        model, optimizer = self._init
        made = jax.block_until_ready(model.compiled(jax.device_put(key, self._replicated)))
        return dataclasses.replace(made, opt_state=optimizer.compiled(made.params))

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Makes one update.

        Args:
          state: from `init` or the previous call. It is donated: use the returned one afterwards.
          batch: host arrays, or arrays that `put` placed.

        Returns:
          The next state, and metrics: `loss`, `grad_norm` (before any clipping) and the loss's
          own, each f32[].

        Raises:
          StateError: the state was consumed already, holds one buffer twice, or belongs to
            another step.
          BatchError: the batch is not what the step was compiled for.
        """
        check_alive(state)
        if self._last is None or self._last() is not state:
            check_apart(state)
        made, metrics = self._run(self._program, state, batch)
        self._last = weakref.ref(made)
        return made, metrics

    def evaluate(self, state: TrainState, batch: Any) -> Metrics:
        """Returns the loss and its metrics, f32[] each, without an update; the state stays.

        An `sk.Loss` is evaluated by its `evaluate` form. A plain function is called as in
        training, with a key that no training step uses.

        Raises:
          StateError: the state was consumed already, or belongs to another step.
          BatchError: the batch is not what the step was compiled for.
        """
        check_alive(state)
        return self._run(self._evaluate, state, batch)

    def gradients(self, state: TrainState, batch: Any) -> tuple[Metrics, Any]:
        """Returns `(metrics, gradients)`: what the next update would be made from.

        Gradients have the dtype and the shardings of the parameters; clipping, which is the
        optimizer's, is not applied. The state stays.

        Raises:
          StateError: the state was consumed already, or belongs to another step.
          BatchError: the batch is not what the step was compiled for.
        """
        check_alive(state)
        return self._run(self._gradients, state, batch)

    def put(self, batch: Any) -> Any:
        """Puts a batch on the mesh as declared, for a step to be called with later.

        Raises:
          BatchError: the batch is not what the step was compiled for.
        """
        return put_batch(batch, self.layout.batch, self.layout.batch_shardings)

    def report(self) -> Report:
        """Returns what the step became: memory, collectives, FLOPs and findings.

        Everything is read from the compiled program; nothing is run or measured.
        """
        return Report.of(inspected(self.declaration, self.layout, self._program))

    def replace(self, **changes: Any) -> "CompiledStep":
        """Compiles the same declaration with some of its fields changed.

        Args:
          **changes: fields of `Declaration`, and `accumulate`, `remat` or `precision`.
        """
        fields = {
            field.name: getattr(self.declaration, field.name)
            for field in dataclasses.fields(self.declaration)
        }
        return CompiledStep(declare(**{**fields, **changes}))

    def _run(self, program: Program, state: TrainState, batch: Any) -> Any:
        placed = self.put(batch)
        try:
            return program.compiled(state, placed)
        except (TypeError, ValueError):
            check_state(state, self.layout.state, self.layout.shardings)
            raise

    def _compile(self, run: Any, results: Any, donate: tuple[int, ...] = ()) -> Program:
        args = (self.layout.state, self.layout.batch)
        return self._program_of(run, args, (self.shardings, self.batch_shardings), results, donate)

    def _program_of(
        self, run: Any, args: Any, shardings: Any, results: Any, donate: tuple[int, ...] = ()
    ) -> Program:
        names = Activations(self.mesh, self.strategy.activations, self.layout.row_axes)
        with active(policy(self.strategy.remat)):
            return compile_program(run, args, shardings, results, names, names.check, donate)

    @functools.cached_property
    def _replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @functools.cached_property
    def _gradient_fn(self) -> GradientFn:
        return gradient_function(self.declaration, self.layout)

    @functools.cached_property
    def _init(self) -> tuple[Program, Program]:
        """The model, then the optimizer: what is drawn needs room that the moments take later."""
        d, state, placed = self.declaration, self.layout.state, self.shardings
        model = self._program_of(
            initial_state(d.init, d.precision),
            (state.key,),
            (self._replicated,),
            dataclasses.replace(placed, opt_state=None),
        )
        optimizer = self._program_of(
            initial_optimizer(d.optimizer), (state.params,), (placed.params,), placed.opt_state
        )
        return model, optimizer

    @functools.cached_property
    def _evaluate(self) -> Program:
        d = self.declaration
        loss = objective(d.loss_fn, evaluate=True)
        run = evaluation_step(loss, lambda params: cast_floats(params, d.precision.compute))
        return self._compile(run, self._replicated)

    @functools.cached_property
    def _gradients(self) -> Program:
        run = gradient_step(self._gradient_fn)
        return self._compile(run, (self._replicated, self.shardings.params))


def compile_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    init: Callable[[Any], Any],
    batch: Any,
    mesh: Mesh,
    strategy: Strategy | None = None,
    mode: str = "auto",
    accumulate: int | Accumulate | None = None,
    remat: str | None = None,
    precision: str | Precision | None = None,
) -> CompiledStep:
    """Compiles one training step for one mesh, and checks that it is what was declared.

    Args:
      loss_fn: `(params, batch, key) -> loss`. A loss is a floating-point scalar (a mean over
        equal-sized examples) or `sk.Mean(total, weight)`, alone or as `(loss, metrics)` with a
        dict of scalars or `sk.Mean`s. A model with mutable state is an `sk.Loss`.
      optimizer: any optax chain.
      init: `key -> params`, any pytree of floating-point arrays, some of them perhaps `sk.Named`;
        or `key -> sk.Variables(params, extra)`.
      batch: pytree of arrays or `jax.ShapeDtypeStruct`, global shapes; dim 0 counts rows.
      mesh: from `MeshSpec.build`, all axes of type Auto.
      strategy: the layout; by default everything is replicated.
      mode: `"auto"`: the partitioner places the collectives.
      accumulate: overrides `strategy.accumulate`.
      remat: overrides `strategy.remat`.
      precision: overrides `strategy.precision`.

    Returns:
      The step, compiled, its layouts and aliases read back from the executable.

    Raises:
      ShardingError: every leaf of state and batch that cannot be laid out, before anything is
        traced; or every constraint of the model that cannot be met, before it is compiled.
      StepError: an option, the loss or the optimizer does not form a step.

    >>> import jax, jax.numpy as jnp, optax
    >>> from shardkit.mesh import MeshSpec
    >>> from shardkit.parallel import strategies
    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
    >>> step = compile_step(
    ...     loss_fn, optax.sgd(0.1), init=lambda key: {"w": jax.random.normal(key, (4, 1))},
    ...     batch={"x": jnp.ones((8, 4)), "y": jnp.ones((8, 1))},
    ...     mesh=MeshSpec(data=1).build(devices=jax.devices()[:1]), strategy=strategies.data())
    >>> state = step.init(jax.random.key(0))
    >>> state, metrics = step(state, {"x": jnp.ones((8, 4)), "y": jnp.ones((8, 1))})
    >>> int(state.step), sorted(metrics)
    (1, ['grad_norm', 'loss'])
    """
    return CompiledStep(
        declare(
            loss_fn,
            optimizer,
            init,
            batch,
            mesh,
            strategy or Strategy(),
            mode,
            accumulate=accumulate,
            remat=remat,
            precision=precision,
        )
    )
