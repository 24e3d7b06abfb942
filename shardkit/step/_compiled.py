"""`CompiledStep`: one spec compiled for one mesh."""

import dataclasses
import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from .._core.donation import check_not_donated, check_untraced
from .._core.errors import BatchError, Problem, ShardkitError, StateError, format_problems
from .._core.io._notebook import notebook_html
from .._core.train_state import TrainState
from .._core.tree import format_bytes, list_leaves
from .._core.types import Batch, Key, Metrics, Params, PyTree
from ..report import Report
from ._batch_variants import BatchVariants
from ._bound_spec import BoundSpec
from ._build_report import build_report
from ._compile import CompiledProgram
from ._compiled_functions import CompiledFunctions
from ._inputs import (
    check_buffers_distinct,
    check_state,
    put_batch,
    put_given,
    put_key,
    take_arguments,
    take_batch,
)
from ._memory_check import check_memory
from ._partial_batch import count_partial_rows, fill_batches, join_parts
from .self_check import SelfCheck, run_self_check

if TYPE_CHECKING:
    from ..hardware import Chip
    from ..parallel import Strategy
    from ._program_cache import ProgramCache
    from ._saved_programs import SavedPrograms
    from ._spec import StepSpec


class CompiledStep:
    """A compiled training step, as `StepSpec.compile` and `compile_step` return it.

    Attributes:
      spec: the `StepSpec` that it was compiled from.
      mesh: the device mesh.
      layout: abstract state and batch, and the sharding of every leaf.
      program: the executable, with its jaxpr, compiler messages and compile times.
    """

    def __init__(
        self, spec: "StepSpec", mesh: Mesh, saved: "SavedPrograms | ProgramCache | None" = None
    ) -> None:
        """Resolves, traces, compiles and reads back; see `StepSpec.compile`."""
        self._bound = BoundSpec(spec, mesh, saved)
        self.spec, self.mesh = spec, self._bound.mesh
        self._variants = BatchVariants(self._bound)
        self.layout = self._variants.declared.layout
        self.program: CompiledProgram = self._variants.declared.train
        # No leaf shares a buffer in the state that was returned last; check any other state.
        self._last_state: weakref.ref[TrainState] | None = None

    def describe(self) -> dict[str, str]:
        """Its mesh and state in words, besides what its spec describes."""
        state = self.layout.state
        parts = {"params": state.params, "optimizer state": state.opt_state}
        parts["model state"] = state.model_state
        held = {name: list_leaves(tree) for name, tree in parts.items()}
        sizes = [
            f"{name} {format_bytes(sum(leaf.nbytes for leaf in leaves))} in all"
            for name, leaves in held.items()
            if leaves
        ]
        mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        return {"mesh": mesh, "state": "; ".join(sizes), **self.spec.describe()}

    def __repr__(self) -> str:
        about = self.describe()
        return f"CompiledStep(mesh=({about['mesh']}), state=({about['state']}))"

    def _repr_html_(self) -> str:
        about = "step.report() says what it sends and holds."
        return notebook_html("CompiledStep", self.describe(), about)

    @property
    def strategy(self) -> "Strategy":
        """The strategy of the spec."""
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
    def batch_shardings(self) -> PyTree:
        """Pytree of `NamedSharding`, one per batch leaf."""
        return self.layout.batch_shardings

    @property
    def local_rows(self) -> np.ndarray:
        """Rows of the global batch that this process must pass to the step, i64[n]."""
        return self.layout.local_rows

    @property
    def gradient_program(self) -> CompiledProgram:
        """The executable of `build_gradients`, which is compiled when it is first asked for."""
        return self._variants.declared.gradients

    def hlo(self) -> str:
        """Text of the optimized HLO that each device runs."""
        return self.program.hlo

    def init(
        self, key: Key, *, params: Params | None = None, model_state: PyTree | None = None
    ) -> TrainState:
        """Creates the initial state directly on the devices, every leaf in its declared sharding.

        Args:
          key: typed PRNG key[], `jax.random.key(0)`. The same key gives the same state, bit for
            bit, on every mesh.
          params: pretrained parameters in place of those that `init` draws: every leaf, by path,
            as host arrays or `jax.Array`s in any sharding. The optimizer starts from them, so
            averages and slow copies of the parameters in its state hold them too.
          model_state: the same for the model state.

        Raises:
          StateError: `key` is not a typed key of the implementation that the step was compiled for;
            or with every leaf of `params` and `model_state` that does not fit.
        """
        check_not_donated(key, "key", "The key was donated.")
        expected = self.layout.state.key.dtype
        if not isinstance(key, jax.Array) or key.dtype != expected or key.shape != ():
            what = f"{key.dtype}{list(key.shape)}" if isinstance(key, jax.Array) else repr(key)
            problem = Problem("key", f"is {what}; the step takes one typed key, {expected}[]")
            fix = "step.init(jax.random.key(0))"
            raise StateError(format_problems("The state needs a random key.", [problem], fix))
        functions = self._variants.declared
        given = put_given(params, model_state, self.layout)
        key = put_key(key, self.shardings.key)
        program = functions.init_beside if "params" in given else functions.init
        state = jax.block_until_ready(program.compiled(key))
        if "model_state" in given:  # which lacks what the step keeps there itself
            given["model_state"] = {**state.model_state, **given["model_state"]}
        state = dataclasses.replace(state, **given)
        return dataclasses.replace(state, opt_state=functions.init_optimizer.compiled(state.params))

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Runs one training step.

        Args:
          state: from `init` or the previous call. It is donated: use the returned state afterwards.
          batch: host arrays, or arrays that `shard_batch` placed.

        Returns:
          The next state, and metrics, f32[] each: `loss`, `grad_norm` (before clipping) and those
          that the loss returns.

        Raises:
          StateError: the state was donated already, holds one buffer twice, or belongs to
            another step.
          BatchError: the batch is not what the step was compiled for.
        """
        batch = take_arguments(state, batch)
        if self._last_state is None or self._last_state() is not state:
            check_buffers_distinct(state)
        new_state, metrics = self._run(lambda functions: functions.train, state, batch)
        self._last_state = weakref.ref(new_state)
        return new_state, metrics

    def evaluate(self, state: TrainState, batch: Batch) -> Metrics:
        """Returns the loss and its metrics, f32[] each; the state is not donated.

        An `sk.Loss` is evaluated by its `evaluate` function. A plain loss is called as in
        training, with a key that no training step uses.

        The batch may have fewer rows than declared, such as the last one of a data set, whether
        they divide over the devices or not. The result is that of its rows alone, by the same
        program: rows are repeated and weighted, so the loss and its metrics must be `sk.Mean`s, or
        means or sums of independent rows. With several processes every batch is full.

        Raises:
          StateError: the state was donated already, or belongs to another step.
          BatchError: the batch is not what the step was compiled for, has more rows, or has fewer
            and a loss that depends on them together or draws random numbers.
        """
        batch = take_arguments(state, batch)
        several = jax.process_count() > 1
        given = None if several else count_partial_rows(batch, self.layout)
        if given is None:
            return self._run(lambda functions: functions.evaluate, state, batch)[0]
        total = self.layout.rows
        parts, growth = [], {}
        for rows, filled in fill_batches(batch, self.layout.row_dims, given, total):
            growth = self._variants.find(filled).partial_growth
            if isinstance(growth, str):
                return self._evaluate_as_variant(state, batch, growth)
            means = self._run(lambda functions: functions.evaluate, state, filled)[1]
            parts.append((rows, means))
        share = {name: (given / total) ** power for name, power in growth.items()}
        return join_parts(jax.device_get(parts), share)

    def _evaluate_as_variant(self, state: TrainState, batch: Batch, problem: str) -> Metrics:
        """Evaluates fewer rows by a program of their own; BatchError if there can be none."""
        if self._variants.find(batch) is self._variants.declared:
            raise BatchError(problem)
        return self._run(lambda functions: functions.evaluate, state, batch)[0]

    def gradients(self, state: TrainState, batch: Batch) -> tuple[Metrics, Params]:
        """Returns `(metrics, gradients)` as the next update would use them, before clipping.

        Gradients have the dtype and the shardings of the parameters. The state is not donated.

        Raises:
          StateError: the state was donated already, or belongs to another step.
          BatchError: the batch is not what the step was compiled for.
        """
        batch = take_arguments(state, batch)
        return self._run(lambda functions: functions.gradients, state, batch)

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
        batch = take_arguments(state, batch)
        variant = self._variants.find(batch)
        batch = put_batch(batch, variant.layout)
        check_state(state, self.layout.state, self.layout.shardings)
        return run_self_check(self._bound, variant, state, batch)

    def shard_batch(self, batch: Batch) -> Batch:
        """Moves a batch to the mesh in its declared shardings, from wherever it is.

        With several processes each passes its `local_rows` of the global batch; processes exchange
        no rows.

        Raises:
          BatchError: the batch is not what the step was compiled for.
        """
        batch = take_batch(batch)
        layout = self._variants.find(batch).layout
        return put_batch(batch, layout, move=True)

    def report(self, *, chip: "str | Chip | None" = None, try_fixes: bool = False) -> Report:
        """Reports memory, collectives, FLOPs and findings of the compiled program.

        Everything is read from the program; nothing is run or measured.

        Args:
          chip: name in the hardware table, for the modelled time. By default that of the devices;
            for CPU devices no time is modelled.
          try_fixes: compile the step once more for each other mode or constraint that a finding
            suggests, so that its `fix` and `remaining` tell what the step would send then.

        Raises:
          ReportError: there is no such chip.
        """
        variants = self._variants
        return build_report(
            self._bound, variants.declared, variants.changes, chip=chip, try_fixes=try_fixes
        )

    def check_memory(self) -> None:
        """Checks that the step fits on its devices, if their memory is known.

        Raises:
          StepError: with the bytes of each part, and what would make it fit.
        """
        check_memory(self._bound, self.layout, self.program)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the executables of `init`, the step and `evaluate`, for `sk.load_step`.

        Compiles those that have not been used yet. The file is written whole or not at all; it is
        about as large as the programs, without any array of the state. Load only files that you
        trust: an executable is code.

        Args:
          path: the file; its folder must exist.

        Raises:
          StepError: the file cannot be written, the step calls Python (`jax.debug.print`, a
            callback), or several processes run it.
        """
        self._variants.declared.save(path)

    def replace(self, *, mesh: Mesh | None = None, **changes: Any) -> "CompiledStep":
        """Compiles the step for another mesh, or with some fields of its spec changed.

        Args:
          mesh: the new mesh; by default the step's own.
          **changes: fields of `StepSpec`.
        """
        spec = self.spec.replace(**changes)
        return CompiledStep(spec, self.mesh if mesh is None else mesh)

    def _run(
        self,
        choose: Callable[[CompiledFunctions], CompiledProgram],
        state: TrainState,
        batch: Batch,
    ) -> Any:
        variant = self._variants.find(batch)
        batch = put_batch(batch, variant.layout)
        try:
            program = choose(variant)
        except ShardkitError:
            raise
        except Exception as error:  # of the user's functions
            if variant is self._variants.declared:
                raise
            raise self._variants.explain(batch, error) from error
        try:
            return program.run(state, batch)
        except (TypeError, ValueError) as error:
            check_untraced(error)
            check_state(state, self.layout.state, self.layout.shardings)
            raise
