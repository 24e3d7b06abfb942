"""`verify`: the same steps on one device and on each mesh."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from .._core.errors import Problem, VerificationError, count, format_problems, raise_all
from .._core.tree import short_dtype
from ..mesh import MeshSpec
from ..rules import format_mesh
from ..step import CompiledStep, StepSpec, check_step_spec
from ._compare import Limits, compare
from ._observe import observe
from ._parity_report import ParityReport, Row
from ._record import OWN_PROGRAM, Trial, clipped_sgd, host
from ._reference import Reference, nudged

StepFactory = Callable[[Mesh], CompiledStep]

_NUDGES = 3
_NOTHING = "There is nothing to verify."


class Standard:
    """What one device says, and how far correct programs may be from it.

    Attributes:
      spec: of the step.
      trial: what every mesh is given.
      record: what the reference told.
    """

    def __init__(self, spec: StepSpec, device: Any, trial: Trial) -> None:
        """Runs the reference, and again with nudged parameters to measure noise.

        Raises:
          VerificationError: the loss or its gradient is not finite, or the gradient is all zero.
        """
        self.spec, self.trial = spec, trial
        reference = Reference(spec, device)
        start = reference.start(trial.key)
        metrics, grads, _ = reference.gradients(start, trial.batch(0), 0)
        _check_usable(metrics)
        self._sgd = clipped_sgd(host(start.params), host(grads))
        self.record = reference.run(trial, start, self._sgd)
        compute = spec.precision.compute_dtype
        self._noises = [
            reference.run(trial, nudged(start, compute, seed), self._sgd) for seed in range(_NUDGES)
        ]
        self._limits = Limits.of(compute)

    def rows(self, step: CompiledStep, checks: Collection[str] = OWN_PROGRAM) -> list[Row]:
        """Puts a step through everything that the reference did, and compares.

        Args:
          step: compiled for some mesh.
          checks: which of the checks that take a compilation of their own to make.
        """
        observed = observe(step, self.trial, self._sgd, checks)
        mesh = format_mesh(step.mesh.shape)
        return compare(mesh, observed, self.record, self._noises, self._limits)

    @property
    def title(self) -> str:
        """What is compared, in one line."""
        n = self.spec.accumulate.micro_batches
        micro = f", {n} micro-batches" if n > 1 else ""
        compute = short_dtype(jnp.dtype(self.spec.precision.compute_dtype))
        steps = count(self.trial.steps, "step")
        return f"One device against each mesh: {steps}, compute {compute}{micro}."


def verify(
    spec: StepSpec | StepFactory,
    meshes: Sequence[Mesh | MeshSpec],
    *,
    batches: Sequence[Any] | None = None,
    steps: int = 3,
    key: jax.Array | None = None,
) -> ParityReport:
    """Proves that a step gives on every mesh the numbers of one device.

    The reference is a plain `jax.value_and_grad` of the declared loss on one device, with plain
    loops and plain arithmetic: it shares nothing with the compiled step but the spec. On
    each mesh are compared: where every leaf lives, with the rules resolved anew; the first state,
    bit for bit; loss, metrics, gradient norm and every gradient leaf of step 1; the parameters
    after one clipped SGD update, since Adam would hide a gradient of the wrong scale; losses and
    every state leaf after `steps` updates of the declared optimizer; an evaluation; that all
    copies of a leaf are equal; and that later steps compile nothing.

    A threshold is 8 times the measured noise: what results change by when every parameter is
    nudged by one rounding. In f32 it is at most 1e-5 for everything up to the SGD update.

    Args:
      spec: the step; or a function that compiles it for a mesh, called once for each of `meshes`
        and once for one device with the axis names of the first.
      meshes: meshes, or specs that are built from the first local devices.
      batches: host batches; step t takes the one at t modulo their number. By default two are
        made up from the declared shapes: floats from the normal distribution, integers
        in [0, 8). Give your own where the loss needs others, and with rows of unequal weight
        where it has weights.
      steps: updates with the declared optimizer, at least 2 to see whether the second compiles.
      key: typed PRNG key[] of the initial state; `jax.random.key(0)` by default.

    Returns:
      The certificate; `print` it, ask `.ok`, or `.check()` it.

    Raises:
      VerificationError: nothing can be compared: no spec, mesh or step, a loss that is not finite,
        a gradient that is all zero.

    >>> import jax, jax.numpy as jnp, optax
    >>> from shardkit.parallel import strategies
    >>> from shardkit.step import StepSpec
    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
    >>> spec = StepSpec(
    ...     loss_fn=loss_fn, optimizer=optax.adam(0.1),
    ...     init=lambda key: {"w": jax.random.normal(key, (4, 2))},
    ...     batch={"x": jnp.ones((8, 4)), "y": jnp.ones((8, 2))}, strategy=strategies.data())
    >>> verify(spec, [MeshSpec(data=2)]).check().ok
    True
    """
    compiled = step_factory(spec)
    _check_arguments(meshes, batches, steps)
    built = [_built(mesh) for mesh in meshes]
    one = compiled(one_device(built[0]))
    given = made_up(one) if batches is None else batches
    trial = Trial(given, steps, jax.random.key(0) if key is None else key)
    standard = Standard(one.spec, one.mesh.devices.flat[0], trial)
    rows = [row for mesh in built for row in standard.rows(compiled(mesh))]
    return ParityReport(tuple(rows), standard.title)


def step_factory(given: StepSpec | StepFactory) -> StepFactory:
    """What compiles a step for a mesh: a spec does, and so may a function.

    Raises:
      VerificationError: it is neither; a compiled step has its mesh already.
    """
    if not isinstance(given, StepSpec) and callable(given) and not isinstance(given, CompiledStep):
        return given
    check_step_spec(given, VerificationError, _NOTHING, "a function mesh -> CompiledStep")
    return given.compile


def one_device(mesh: Mesh) -> Mesh:
    """A mesh with the same axis names and the first device only."""
    names = mesh.axis_names
    grid = mesh.devices.reshape(-1)[:1].reshape((1,) * len(names))
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def made_up(step: CompiledStep, seed: int = 0) -> list[Any]:
    """Two batches of a step's shapes: floats normal, integers in [0, 8)."""
    rng = np.random.default_rng(seed)

    def draw(x: Any) -> np.ndarray:
        if jnp.issubdtype(x.dtype, jnp.floating):
            return rng.standard_normal(x.shape).astype(x.dtype)
        top = 2 if x.dtype == bool else 8
        return rng.integers(0, top, x.shape).astype(x.dtype)

    return [jax.tree.map(draw, step.spec.batch) for _ in range(2)]


def _built(mesh: Mesh | MeshSpec) -> Mesh:
    if isinstance(mesh, Mesh):
        return mesh
    open_axes = -1 in mesh.axes.values()
    return mesh.build(devices=None if open_axes else jax.devices()[: mesh.size])


def _check_arguments(meshes: Sequence[Any], batches: Sequence[Any] | None, steps: int) -> None:
    problems = []
    if not meshes:
        problems.append(Problem("meshes", "is empty", "meshes=[sk.MeshSpec(data=2, tensor=4)]"))
    if batches is not None and not batches:
        problems.append(Problem("batches", "is empty", "batches=[batch], or leave it out"))
    if steps < 1:
        problems.append(Problem(f"steps={steps}", "must be at least 1", "steps=3"))
    raise_all(VerificationError, _NOTHING, problems)


def _check_usable(metrics: Any) -> None:
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if np.isfinite(loss) and np.isfinite(norm) and norm > 0:
        return
    why = (
        f"loss {loss:g}, gradient norm {norm:g} on one device: nothing would be proved. Without "
        "batches= they are made up from the shapes, with integers from 0 to 7"
    )
    problem = Problem(
        "batches", why, "verify(..., batches=[...]) with batches that the loss can use"
    )
    raise VerificationError(format_problems("The reference cannot be compared with.", [problem]))
