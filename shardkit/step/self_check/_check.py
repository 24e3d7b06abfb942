"""Runs the checks of `CompiledStep.self_check` in order, and counts what they cost."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._core.draws import list_draws
from ..._core.errors import StepError
from ..._core.tracing import equations
from ..._core.train_state import TrainState
from ..._core.tree import list_leaves, path_ends
from ..._core.types import Batch, Loss, Params
from .._ambient import no_ambient_mesh
from ..optim._extra_args import LossAskedError
from ._gradient import GradientTest, Limits, choose_direction
from ._result import Check, SelfCheck

if TYPE_CHECKING:
    from .._bound_spec import BoundSpec
    from .._compile import CompiledProgram
    from .._compiled_functions import CompiledFunctions

# Primitives by which what a row contributes depends on its place among the rows: experts' slots.
_ORDERED = {"cumsum", "cumlogsumexp", "cumprod", "cummax", "cummin", "sort", "top_k"}


def run_self_check(
    bound: "BoundSpec", programs: "CompiledFunctions", state: TrainState, batch: Batch
) -> SelfCheck:
    """Makes every check of a batch on the mesh; the state, as the next update gets it, stays."""
    began = time.perf_counter()
    with no_ambient_mesh():
        run = _Run(bound, programs, state, batch)
        checks = tuple(run.checks())
    return SelfCheck(
        checks=checks,
        mesh=", ".join(f"{axis}={n}" for axis, n in bound.mesh.shape.items()),
        evaluations=run.evaluations,
        seconds=time.perf_counter() - began,
        compile_seconds=run.compile_seconds,
    )


class _Run:
    """One self check under way."""

    def __init__(
        self, bound: "BoundSpec", programs: "CompiledFunctions", state: TrainState, batch: Batch
    ) -> None:
        self._spec, self._programs, self._probes = bound.spec, programs, programs.probes
        self._state, self._batch, self.evaluations = state, batch, 0
        self._rows = programs.layout.rows
        words = np.asarray(jax.random.key_data(state.key)).ravel()
        self._rng = np.random.default_rng([int(x) for x in (*words, state.step)])
        known = {name for name in ("gradients", "training_loss") if name in vars(programs)}
        self._gradient_program, loss = programs.gradients, programs.training_loss
        self._loss_program = loss.program
        dtypes = bound.spec.precision.compute_dtypes(state.params)
        self._limits = Limits.of(
            dtypes.lowest,
            loss.lowest,
            lossy=bound.spec.strategy.compression is not None,
            reduce_dtype=bound.spec.precision.reduce_dtype,
        )
        compiled = {"gradients": self._gradient_program, "training_loss": self._loss_program}
        self.compile_seconds = sum(
            sum(program.seconds) for name, program in compiled.items() if name not in known
        )

    def checks(self) -> Iterator[Check]:
        """The checks, in order."""
        metrics, grads = self._gradient_program.compiled(self._state, self._batch)
        values = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        if not np.isfinite([*values.values()]).all():
            # What becomes of such an update is declared: `on_nonfinite`.
            text = ", ".join(f"{name} is {value}" for name, value in values.items())
            yield Check.skipped("gradient", f"nothing is finite to compare: {text}")
            return
        yield from self._check_losses(float(metrics["loss"]))
        yield self._check_gradient(float(metrics["loss"]), grads)
        yield self._check_norm(float(metrics["grad_norm"]))
        yield self._check_copies(grads)
        yield self._check_update(metrics, grads)

    def _totals(self, state: TrainState, batch: Batch) -> tuple[float, float]:
        """One evaluation: total and weight."""
        self.evaluations += 1
        total, weight = self._loss_program.compiled(state, batch)
        return float(total), float(weight)

    def _probe(self, name: str) -> Callable[..., Any]:
        """A probe; the time of the first call of each is that of compiling it."""
        is_new, probe = name not in vars(self._probes), getattr(self._probes, name)
        if not is_new:
            return probe

        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            result = jax.block_until_ready(probe(*args))
            self.compile_seconds += time.perf_counter() - began
            return result

        return timed

    def _check_losses(self, loss: float) -> Iterator[Check]:
        """The gradient's loss against the loss program's: of its rows, and of rearranged ones."""
        reason = self._order_matters()
        spec, rows = self._spec, self._rows
        # Its loss must then be a mean over rows.
        splits = spec.accumulate.micro_batches > 1 or spec.precision.reduces_separately
        splits = splits or spec.mode == "shard_map"
        if reason or not (splits and rows % 2 == 0):
            yield self._compare_loss("loss", loss, [self._totals(self._state, self._batch)])
        else:
            yield Check.skipped("loss", "rows compares it with the sum over parts")
        if reason:
            yield Check.skipped("rows", reason)
            return
        order = self._rng.permutation(rows)
        parts = [order]
        if splits and rows % 2 == 0:  # each half twice: no other batch shape is compiled
            parts = [np.tile(half, 2) for half in np.split(order, 2)]
        rearranged = [self._probe("rearrange")(self._batch, part) for part in parts]
        yield self._compare_loss("rows", loss, [self._totals(self._state, b) for b in rearranged])

    def _compare_loss(self, name: str, loss: float, pairs: list[tuple[float, float]]) -> Check:
        total, weight = (sum(x) for x in zip(*pairs, strict=True))
        self._weight = weight / len(pairs)
        wanted = total / weight if weight else 0.0
        level = max([abs(loss), *(abs(t / w) for t, w in pairs if w)])
        gap = abs(loss - wanted) / level if level else 0.0
        other = f"rows on other devices{', in two parts,' if len(pairs) > 1 else ''}"
        whose = "the loss alone" if name == "loss" else other
        why = f"the compiled gradient's loss is {loss:.7g}, {whose} give {wanted:.7g}"
        return Check.of(name, gap, self._limits.loss, why=why)

    def _order_matters(self) -> str:
        """Why rearranged rows may rightly have another loss, or nothing."""
        jaxpr = self._loss_program.jaxpr.jaxpr
        # The step's own keys are folds and splits of scalars.
        if any(draw.kind in ("bits", "gamma") for draw in list_draws(jaxpr)):
            return "the loss draws random numbers"
        names = {eqn.primitive.name for eqn in equations(jaxpr)} & _ORDERED
        if names:
            return f"the loss may depend on the order of rows: {', '.join(sorted(names))}"
        loss = self._spec.loss_fn
        if isinstance(loss, Loss) and loss.stateful:
            return "the loss has state, such as statistics of the batch"
        return ""

    def _check_gradient(self, loss: float, grads: Params) -> Check:
        state, probes = self._state, self._probes

        def measure(seeds: np.ndarray) -> np.ndarray:
            return np.asarray(self._probe("measure")(state.params, grads, seeds))

        direction = choose_direction(measure, self._rng, len(probes.paths))
        self._norms = direction.norms

        def predict(amounts: np.ndarray) -> np.ndarray:
            if probes.is_exact:  # one program fewer to compile
                return 2 * amounts * direction.slopes
            return np.asarray(self._probe("predict")(state.params, grads, direction.seeds, amounts))

        def compare(totals: Callable[[TrainState], tuple[float, float]]) -> GradientTest:
            def evaluate(amounts: np.ndarray) -> float:
                params = self._probe("move")(state.params, direction.seeds, amounts)
                total, _ = totals(dataclasses.replace(state, params=params))
                return total / self._weight if self._weight else 0.0

            return GradientTest(direction, evaluate, predict, self._limits, abs(loss))

        test = compare(lambda moved: self._totals(moved, self._batch))
        check, step = test.run()
        if check.verdict != "ok" and self._count("stop_gradient") and (held := self._held_loss()):
            test = compare(lambda moved: self._held_totals(held, moved))
            check, step = test.run()
        return check if check.verdict != "FAILED" else self._name_leaf(test, check, step)

    def _held_loss(self) -> "CompiledProgram | None":
        """The loss with what is behind `stop_gradient` held; None if the model cannot be mapped."""
        known = "held_loss" in vars(self._programs)
        try:
            held = self._programs.held_loss
        except (StepError, TypeError, ValueError, NotImplementedError):
            return None
        self.compile_seconds += 0 if known else sum(held.seconds)
        return held

    def _held_totals(self, held: "CompiledProgram", moved: TrainState) -> tuple[float, float]:
        """`_totals` of moved parameters, with what is behind `stop_gradient` as of the state."""
        self.evaluations += 2
        total, weight = held.compiled(moved, self._batch, self._state.params)
        return float(total), float(weight)

    def _name_leaf(self, test: GradientTest, check: Check, step: float) -> Check:
        """Adds to a check that failed which leaf is off."""
        index, gap = test.worst_leaf(step, check.threshold)
        if index is None:
            why = "the gradient differs from the loss, in no one leaf alone"
            return dataclasses.replace(check, why=why + self._surrogates())
        leaf = str(list_leaves({"params": self._state.params})[index])
        why = f"its gradient is off by {gap:.1e} of its size{self._surrogates()}"
        return dataclasses.replace(check, leaf=leaf, why=why)

    def _count(self, *names: str) -> int:
        """Equations of the loss whose name begins so."""
        found = equations(self._loss_program.jaxpr.jaxpr)
        return sum(eqn.primitive.name.startswith(names) for eqn in found)

    def _surrogates(self) -> str:
        """Where the gradient may rightly differ from the loss: it is not its derivative there."""
        stops, own = self._count("stop_gradient"), self._count("custom_vjp", "custom_jvp")
        if not (stops or own):
            return ""
        return f" (the loss stops gradients {stops} times and has {own} derivatives of its own)"

    def _check_norm(self, norm: float) -> Check:
        own = float(np.sqrt(np.sum(np.square(self._norms))))
        gap = abs(norm - own) / own if own else norm
        why = f"the metric is {norm:.7g}, the norm over all gradients {own:.7g}"
        return Check.of("grad_norm", gap, max(1e-4, self._limits.loss), why=why)

    def _check_copies(self, grads: Params) -> Check:
        differing = np.asarray(self._probe("copies_differ")(self._state, grads))
        at_fault = np.flatnonzero(differing)
        leaf = self._probes.copied_paths[at_fault[0]] if len(at_fault) else ""
        why = f"{int(differing.max(initial=0))} devices hold another copy than the others"
        return Check.of("copies", float(len(at_fault)), 0.0, leaf=leaf, why=why)

    def _check_update(self, metrics: Any, grads: Params) -> Check:
        """The compiled step, of a copy of the state, against `optimizer.update`."""
        if bool(self._state.halted):
            return Check.skipped("update", "the state is halted")
        limits, paths = self._limits, self._probes.updated_paths
        after, told = self._programs.train.compiled(self._probe("copy")(self._state), self._batch)
        for name in ("loss", "grad_norm"):
            got, want = float(told[name]), float(metrics[name])
            if not abs(got - want) <= max(1e-4, limits.loss) * abs(want):
                why = f"the step's {name} is {got:.7g}, its gradient program's {want:.7g}"
                gap = abs(got - want) / abs(want) if want else np.inf
                return Check.of("update", gap, max(1e-4, limits.loss), why=why)
        args = (self._state, grads, metrics["loss"], after, jnp.float32(limits.least))
        try:
            gaps, sizes = np.asarray(self._probe("update_gaps")(*args))
        except LossAskedError:
            return Check.skipped("update", "the optimizer evaluates the loss itself")
        relative = gaps / _floors(sizes, paths, self._probes.paths)
        worst = int(np.argmax(np.where(np.isnan(relative), np.inf, relative)))
        why = "one update is not optimizer.update of the gradients"
        return Check.of("update", float(relative[worst]), limits.update, leaf=paths[worst], why=why)


def _floors(sizes: np.ndarray, paths: tuple[str, ...], params: tuple[str, ...]) -> np.ndarray:
    """Sizes of changes, none below a hundredth of the largest of its own tree.

    `opt_state/0/mu/up/kernel` is of the tree `opt_state/0/mu`, as is every leaf that ends in the
    path of a parameter.
    """
    ends = {path.partition("/")[2] for path in params}
    trees = [p.removesuffix(next((e for e in path_ends(p) if e in ends), "")) for p in paths]
    largest = {
        tree: max(s for s, t in zip(sizes, trees, strict=True) if t == tree) for tree in trees
    }
    floors = np.array([0.01 * largest[tree] for tree in trees])
    return np.maximum(np.maximum(sizes, floors), np.finfo(np.float32).tiny)
