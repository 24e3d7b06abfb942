"""`verify`: the same steps on one device and on each mesh."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from .._core.errors import Problem, VerificationError, raise_all
from .._core.options import check_arguments
from .._core.types import Batch, Key
from ..mesh import MeshSpec
from ..parallel import axis_names
from ..step import CompiledStep, StepSpec, check_step_spec
from ._default_meshes import default_meshes
from ._likely_cause import find_likely_cause
from ._parity_report import ParityReport
from ._random_batches import make_random_batches
from ._record import ParityInputs
from ._reference_results import ReferenceResults

StepFactory = Callable[[Mesh], CompiledStep]

_HEADLINE = "There is nothing to verify."


def verify(
    spec: StepSpec | StepFactory,
    meshes: Sequence[Mesh | MeshSpec] | None = None,
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
    - losses, metrics and gradient norms of `steps` updates, every state leaf, the state's counters
      and an evaluation after them; updates compile nothing after the first.

    A threshold is 8 times the measured noise: the change of the results when every parameter is
    nudged by one rounding. In f32 it is at most 1e-5 for everything up to the SGD update, but for
    metrics and evaluations whose own noise is above 1 %. In bf16 no gradient leaf may be scaled by
    more than 8 %, which its rounding averages out to, and a metric may be as far away as nudges of
    8 roundings bring it, as an accuracy moves by whole rows.

    Each mesh costs the compilation of three programs beside the step's own: gradients, the SGD
    update and the evaluation. One device costs as many, and runs everything four times. The report
    names the likely kind of fault of a mesh that fails.

    Args:
      spec: the step; or a function that compiles it for a mesh, called once for each of `meshes`
        and once for a mesh of one device with the axis names of the first.
      meshes: meshes, or specs that are built from the first local devices. By default of all
        devices, of 6 and of 3: of each the most even mesh over the strategy's axes that divides
        rows and leaves.
      batches: host batches; step t uses number t modulo `len(batches)`. By default two random
        batches of the declared shapes: normal floats, and integers that cover all that they look
        up (the whole vocabulary), or else are in [0, 8). Pass your own if the loss needs other
        values, and with rows of different weights if it has weights.
      steps: updates with the declared optimizer; at least 2, to see whether the second compiles.
      key: typed PRNG key[] of the initial state; `jax.random.key(0)` by default.

    Returns:
      The parity report: `print` it, read `.ok`, or call `.check()`.

    Raises:
      VerificationError: nothing can be compared: no spec, mesh or step, no default mesh that
        compiles, a loss that is not finite, or a gradient that is all zero.

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
    if meshes is None and isinstance(spec, StepSpec):
        compile_for = functools.lru_cache(maxsize=4)(compile_for)
        meshes = list(default_meshes(axis_names(spec.strategy), compile_for)) or None
    _check_arguments(meshes, batches, steps, key)
    built = [_build_mesh(mesh) for mesh in meshes or ()]
    # A function may make another model for one device; a spec is the same everywhere.
    same = isinstance(spec, StepSpec)
    first = compile_for(built[0] if same else build_one_device_mesh(built[0]))
    batches = make_random_batches(first) if batches is None else batches
    inputs = ParityInputs(batches, steps, jax.random.key(0) if key is None else key)
    device = first.mesh.devices.flat[0]
    reference = ReferenceResults(first.spec, device, inputs, first.layout.row_dims)
    rows, causes = [], []
    for step in itertools.chain([first] if same else [], map(compile_for, built[same:])):
        compared = reference.compare(step)
        rows += compared
        if cause := find_likely_cause(step, compared):
            causes.append((compared[0].mesh, cause))
    return ParityReport(tuple(rows), reference.title, tuple(causes))


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


def _build_mesh(mesh: Mesh | MeshSpec) -> Mesh:
    if isinstance(mesh, Mesh):
        return mesh
    has_open_axis = -1 in mesh.axes.values()
    return mesh.build(devices=None if has_open_axis else jax.devices()[: mesh.size])


def _check_arguments(
    meshes: Sequence[Any] | None, batches: Sequence[Any] | None, steps: int, key: Key | None
) -> None:
    check_arguments(
        VerificationError,
        _HEADLINE,
        meshes=(meshes, Sequence[Mesh | MeshSpec] | None),
        batches=(batches, Sequence[Any] | None),
        steps=(steps, int),
        key=(key, jax.Array | None),
    )
    problems = []
    if not meshes:
        why = "is not given, and a function or strategy without axes names none"
        why = "is empty" if meshes is not None else why
        problems.append(Problem("meshes", why, "meshes=[sk.MeshSpec(data=2, tensor=4)]"))
    if batches is not None and not batches:
        problems.append(Problem("batches", "is empty", "batches=[batch], or omit it"))
    if steps < 1:
        problems.append(Problem(f"steps={steps}", "must be at least 1", "steps=3"))
    raise_all(VerificationError, _HEADLINE, problems)
