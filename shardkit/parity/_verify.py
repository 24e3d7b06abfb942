"""`verify`: the same steps on one device and on each mesh."""

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from .._core.errors import Problem, VerificationError, count, format_problems, raise_all
from .._core.options import check_arguments
from .._core.row_dims import RowDims
from .._core.tree import short_dtype
from .._core.types import Batch, Key
from ..mesh import MeshSpec
from ..rules import format_mesh
from ..step import CompiledStep, StepSpec, check_step_spec, find_partition
from ._compare import ErrorLimits, compare_with_reference
from ._observe import observe
from ._parity_report import ParityReport, ParityRow
from ._record import OWN_PROGRAM, ParityInputs, clipped_sgd, copy_to_host
from ._reference import Reference, nudge_params

StepFactory = Callable[[Mesh], CompiledStep]

_NUDGES = 3
_HEADLINE = "There is nothing to verify."


class ReferenceResults:
    """The results of one device, and how far a correct step may be from them.

    Attributes:
      spec: of the step.
      inputs: that the reference and every mesh run on.
      record: of the reference.
    """

    def __init__(
        self, spec: StepSpec, device: Any, inputs: ParityInputs, row_dims: RowDims | None = None
    ) -> None:
        """Runs the reference, and again with nudged parameters to measure noise.

        Args:
          spec: of the step.
          device: that it runs on.
          inputs: that it runs on.
          row_dims: see `Reference`.

        Raises:
          VerificationError: the loss or its gradient is not finite, or the gradient is all zero.
        """
        self.spec, self.inputs = spec, inputs
        reference = Reference(spec, device, row_dims)
        start = reference.init(inputs.key)
        metrics, grads, _ = reference.gradients(start, inputs.batch(0), 0)
        _check_usable(metrics)
        self._sgd = clipped_sgd(
            copy_to_host(find_partition(spec, start.params).trained(start.params)),
            copy_to_host(grads),
        )
        self.record = reference.run(inputs, start, self._sgd)
        compute = spec.precision.compute_dtype
        self._noise_records = [
            reference.run(inputs, nudge_params(start, compute, seed), self._sgd)
            for seed in range(_NUDGES)
        ]
        self._dtypes = spec.precision.compute_dtypes(start.params)
        self._limits = ErrorLimits.of(self._dtypes.lowest)

    def compare(self, step: CompiledStep, checks: Collection[str] = OWN_PROGRAM) -> list[ParityRow]:
        """Runs a step on the same inputs and compares.

        Args:
          step: compiled for some mesh.
          checks: which of the checks that compile a program of their own to run.
        """
        mesh = format_mesh(step.mesh.shape)
        observed = observe(step, self.inputs, self._sgd, checks)
        return compare_with_reference(
            mesh, observed, self.record, self._noise_records, self._limits
        )

    @property
    def title(self) -> str:
        """What is compared, in one line."""
        n = self.spec.accumulate.micro_batches
        micro = f", {n} micro-batches" if n > 1 else ""
        compute = short_dtype(jnp.dtype(self._dtypes.lowest))
        steps = count(self.inputs.steps, "step")
        return f"One device against each mesh: {steps}, compute {compute}{micro}."


def verify(
    spec: StepSpec | StepFactory,
    meshes: Sequence[Mesh | MeshSpec],
    *,
    batches: Sequence[Batch] | None = None,
    steps: int = 3,
    key: Key | None = None,
) -> ParityReport:
    """Proves that a step gives the results of one device on every mesh.

    The reference is a plain `jax.value_and_grad` of the declared loss on one device, with plain
    loops and plain arithmetic: it shares only the spec with the compiled step. On each mesh are
    compared:

    - the layout of every leaf, with the rules resolved anew, and the equality of its copies;
    - the first state, bit for bit;
    - loss, metrics, gradient norm and every gradient leaf of step 1, and an evaluation;
    - the parameters after one clipped SGD update (Adam hides a gradient of the wrong scale);
    - losses and every state leaf after `steps` updates, which compile nothing after the first.

    A threshold is 8 times the measured noise: the change of the results when every parameter is
    nudged by one rounding. In f32 it is at most 1e-5 for everything up to the SGD update.

    Args:
      spec: the step; or a function that compiles it for a mesh, called once for each of `meshes`
        and once for a mesh of one device with the axis names of the first.
      meshes: meshes, or specs that are built from the first local devices.
      batches: host batches; step t uses number t modulo `len(batches)`. By default two random
        batches of the declared shapes: normal floats, and integers in [0, 8). Pass your own if
        the loss needs other values, and with rows of different weights if it has weights.
      steps: updates with the declared optimizer; at least 2, to see whether the second compiles.
      key: typed PRNG key[] of the initial state; `jax.random.key(0)` by default.

    Returns:
      The parity report: `print` it, read `.ok`, or call `.check()`.

    Raises:
      VerificationError: nothing can be compared: no spec, mesh or step, a loss that is not finite,
        or a gradient that is all zero.

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
    compile_for = as_step_factory(spec)
    _check_arguments(meshes, batches, steps, key)
    built = [_build_mesh(mesh) for mesh in meshes]
    # A function may make another model for one device; a spec is the same everywhere.
    same = isinstance(spec, StepSpec)
    first = compile_for(built[0] if same else build_one_device_mesh(built[0]))
    batches = make_random_batches(first) if batches is None else batches
    inputs = ParityInputs(batches, steps, jax.random.key(0) if key is None else key)
    device = first.mesh.devices.flat[0]
    reference = ReferenceResults(first.spec, device, inputs, first.layout.row_dims)
    steps_to_compare = itertools.chain([first] if same else [], map(compile_for, built[same:]))
    rows = [row for step in steps_to_compare for row in reference.compare(step)]
    return ParityReport(tuple(rows), reference.title)


def as_step_factory(spec: StepSpec | StepFactory) -> StepFactory:
    """Returns a function that compiles a step for a mesh: of a spec, or the given function.

    Raises:
      VerificationError: `spec` is neither, such as a compiled step, whose mesh is fixed.
    """
    if not isinstance(spec, StepSpec) and callable(spec) and not isinstance(spec, CompiledStep):
        return spec
    check_step_spec(spec, VerificationError, _HEADLINE, "a function mesh -> CompiledStep")
    return spec.compile


def build_one_device_mesh(mesh: Mesh) -> Mesh:
    """A mesh of the first device only, with the same axis names."""
    names = mesh.axis_names
    devices = mesh.devices.reshape(-1)[:1].reshape((1,) * len(names))
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def make_random_batches(step: CompiledStep, seed: int = 0) -> list[Batch]:
    """Two host batches of a step's shapes: normal floats, integers in [0, 8)."""
    rng = np.random.default_rng(seed)

    def draw(x: jax.ShapeDtypeStruct) -> np.ndarray:
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            parts = rng.standard_normal((2, *x.shape))
            return (parts[0] + 1j * parts[1]).astype(x.dtype)
        if jnp.issubdtype(x.dtype, jnp.floating):
            return rng.standard_normal(x.shape).astype(x.dtype)
        end = 2 if x.dtype == bool else 8
        return rng.integers(0, end, x.shape).astype(x.dtype)

    return [jax.tree.map(draw, step.spec.batch) for _ in range(2)]


def _build_mesh(mesh: Mesh | MeshSpec) -> Mesh:
    if isinstance(mesh, Mesh):
        return mesh
    has_open_axis = -1 in mesh.axes.values()
    return mesh.build(devices=None if has_open_axis else jax.devices()[: mesh.size])


def _check_arguments(
    meshes: Sequence[Any], batches: Sequence[Any] | None, steps: int, key: Key | None
) -> None:
    check_arguments(
        VerificationError,
        _HEADLINE,
        meshes=(meshes, Sequence[Mesh | MeshSpec]),
        batches=(batches, Sequence[Any] | None),
        steps=(steps, int),
        key=(key, jax.Array | None),
    )
    problems = []
    if not meshes:
        problems.append(Problem("meshes", "is empty", "meshes=[sk.MeshSpec(data=2, tensor=4)]"))
    if batches is not None and not batches:
        problems.append(Problem("batches", "is empty", "batches=[batch], or omit it"))
    if steps < 1:
        problems.append(Problem(f"steps={steps}", "must be at least 1", "steps=3"))
    raise_all(VerificationError, _HEADLINE, problems)


def _check_usable(metrics: Any) -> None:
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if np.isfinite(loss) and np.isfinite(norm) and norm > 0:
        return
    why = (
        f"loss {loss:g}, gradient norm {norm:g} on one device: a comparison proves nothing. "
        "Without batches= they are random, with integers from 0 to 7"
    )
    fix = "verify(..., batches=[...]) with batches that the loss can use"
    headline = "The reference cannot be compared with."
    raise VerificationError(format_problems(headline, [Problem("batches", why, fix)]))
