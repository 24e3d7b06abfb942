"""`CompiledStep`: the executables of one spec on one mesh, and what was proved of them."""

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from .._core.errors import Problem, StateError, format_problems
from .._core.train_state import TrainState
from .._core.types import Batch, Key, Params, Scalar
from ..report import Report
from ._batch_variants import BatchVariant, BatchVariants
from ._bound_spec import BoundSpec
from ._compile import CompiledProgram, no_ambient_mesh
from ._inputs import check_apart, check_given, check_state, fed_rows, put_batch, put_key
from ._memory_check import check_memory
from ._report import inspected
from .self_check import SelfCheck, run_self_check

if TYPE_CHECKING:
    from ..hardware import Chip
    from ..parallel import Strategy
    from ._spec import StepSpec

Metrics = dict[str, Scalar]


class CompiledStep:
    """One training step, compiled for one mesh. Made by `StepSpec.compile` or `compile_step`.

    Attributes:
      spec: the `StepSpec` that it was compiled from.
      mesh: the device mesh.
      layout: abstract state and batch, and the sharding of every leaf.
      program: the executable of the step, with its jaxpr, compiler messages and compile times.
    """

    def __init__(self, spec: "StepSpec", mesh: Mesh) -> None:
        """Resolves, traces, compiles and reads back; see `StepSpec.compile`."""
        self.spec, self.mesh = spec, mesh
        self._bound = BoundSpec(spec, mesh)
        # Abstract arrays carry the mesh that they were made under, so this starts with the first.
        with no_ambient_mesh():
            self._forms = BatchVariants(self._bound)
            self.layout = self._forms.declared.layout
            self.program: CompiledProgram = self._forms.declared.programs.train
        # The state made last is known to be sound; any other one is looked at more closely.
        self._last: weakref.ref[TrainState] | None = None

    @property
    def strategy(self) -> "Strategy":
        """The declared layout."""
        return self.spec.strategy

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

    @functools.cached_property
    def local_rows(self) -> np.ndarray:
        """Rows of a global batch that this process feeds, i64[n]: those of its devices."""
        return fed_rows(self.batch_shardings, self.layout.rows)

    @property
    def gradient_program(self) -> CompiledProgram:
        """The executable of `gradients`, which is compiled when it is first asked for."""
        return self._forms.declared.programs.gradients

    def hlo(self) -> str:
        """Text of the optimized program that each device runs."""
        return self.program.compiled.as_text()

    def init(self, key: Key) -> TrainState:
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
        model, optimizer = self._forms.declared.programs.init
        on_mesh = put_key(key, self.shardings.key)
        made = jax.block_until_ready(model.compiled(on_mesh))
        return dataclasses.replace(made, opt_state=optimizer.compiled(made.params))

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
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
        check_given(state)
        if self._last is None or self._last() is not state:
            check_apart(state)
        made, metrics = self._run(lambda form: form.programs.train, state, batch)
        self._last = weakref.ref(made)
        return made, metrics

    def evaluate(self, state: TrainState, batch: Batch) -> Metrics:
        """Returns the loss and its metrics, f32[] each, without an update; the state stays.

        An `sk.Loss` is evaluated by its `evaluate` form. A plain function is called as in
        training, with a key that no training step uses.

        Raises:
          StateError: the state was consumed already, or belongs to another step.
          BatchError: the batch is not what the step was compiled for.
        """
        check_given(state)
        return self._run(lambda form: form.programs.evaluate, state, batch)

    def gradients(self, state: TrainState, batch: Batch) -> tuple[Metrics, Params]:
        """Returns `(metrics, gradients)`: what the next update would be made from.

        Gradients have the dtype and the shardings of the parameters; clipping, which is the
        optimizer's, is not applied. The state stays.

        Raises:
          StateError: the state was consumed already, or belongs to another step.
          BatchError: the batch is not what the step was compiled for.
        """
        check_given(state)
        return self._run(lambda form: form.programs.gradients, state, batch)

    def self_check(self, state: TrainState, batch: Batch) -> SelfCheck:
        """Holds the compiled gradient to the loss of the same mesh, at any scale.

        No single device is needed: the gradient is compared with difference quotients of the
        loss, the loss with that of its rows on other devices, copies with each other, and one
        update with the optimizer's. It takes six evaluations, a gradient and an update of a copy
        of the state; the state stays. See `docs/self_check.md` for what it can miss.

        Args:
          state: as the next update would get it.
          batch: host arrays, or arrays that `shard_batch` placed.

        Raises:
          StateError: the state was consumed already, or belongs to another step.
          BatchError: the batch is not what the step was compiled for.
        """
        check_given(state)
        form = self._forms.of(batch)
        placed = put_batch(batch, form.layout.batch, form.layout.batch_shardings)
        check_state(state, self.layout.state, self.layout.shardings)
        return run_self_check(self._bound, form.programs, state, placed)

    def shard_batch(self, batch: Batch) -> Batch:
        """Puts a batch on the mesh as declared, wherever it is, for a later call of the step.

        Of several processes each gives `rows` of the global batch; nothing is sent between them.

        Raises:
          BatchError: the batch is not what the step was compiled for.
        """
        layout = self._forms.of(batch).layout
        return put_batch(batch, layout.batch, layout.batch_shardings, move=True)

    def report(self, *, chip: "str | Chip | None" = None) -> Report:
        """Returns what the step became: memory, collectives, FLOPs and findings.

        Everything is read from the compiled program; nothing is run or measured.

        Args:
          chip: name in the hardware table whose figures the time is modelled with; by default
            those of the devices, and no time for CPU devices, of which nothing is known.

        Raises:
          ReportError: there is no such chip.
        """
        made = inspected(self._bound, self.layout, self.program, self._forms.changes)
        return Report.of(made, chip=chip)

    def check_memory(self) -> None:
        """Refuses a step that is larger than its devices, as far as their memory is known.

        Raises:
          StepError: with the bytes of each part, and what would make it fit.
        """
        check_memory(self._bound, self.layout, self.program)

    def replace(self, *, mesh: Mesh | None = None, **changes: Any) -> "CompiledStep":
        """Compiles the same step for another mesh, or with some fields of its spec changed.

        Args:
          mesh: instead of the step's own.
          **changes: fields of `StepSpec`.
        """
        spec = self.spec.replace(**changes)
        return CompiledStep(spec, self.mesh if mesh is None else mesh)

    def _run(
        self, which: Callable[[BatchVariant], CompiledProgram], state: TrainState, batch: Any
    ) -> Any:
        form = self._forms.of(batch)
        placed = put_batch(batch, form.layout.batch, form.layout.batch_shardings)
        program = which(form)
        try:
            return program.compiled(state, placed)
        except (TypeError, ValueError):
            check_state(state, self.layout.state, self.layout.shardings)
            raise
