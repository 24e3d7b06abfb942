"""`BoundSpec`: a spec and the mesh that it is compiled for, checked against each other."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jax.sharding import AxisType, Mesh

from .._core.errors import Problem, StepError, did_you_mean, raise_all
from .._core.tracing import SETTINGS
from ..mesh import MeshSpec
from ..nn._manual_axis_rules import ShardMapLoss
from ..nn._overridable import Override
from ..parallel import Kind
from ._checked_stages import CheckedStages
from ._program_cache import ProgramCache
from ._saved_programs import SavedPrograms

if TYPE_CHECKING:
    from ._spec import StepSpec


@dataclasses.dataclass(frozen=True)
class BoundSpec:
    """A spec and the device mesh that it is compiled for."""

    spec: "StepSpec"  # the user's declaration
    # the device mesh, all axes of type Auto: those of the mesh it is made of that are Explicit, as
    # `jax.make_mesh` makes them, are taken as Auto
    mesh: Mesh
    saved: SavedPrograms | ProgramCache | None = None  # executables that need not be compiled
    were_explicit: tuple[str, ...] = ()  # those axes

    def __post_init__(self) -> None:
        """Checks the spec against the mesh, before tracing.

        Raises StepError if the mesh is not built, has a Manual axis, or lacks the axis of the
        gradient compression; an override of the strategy does not work with the other options; or a
        setting of JAX changes what executables take.
        """
        headline = "The step cannot be compiled for this mesh."
        raise_all(StepError, headline, _type_problems(self.mesh))
        problems = [*_axis_problems(self.mesh), *self._compression_problems(), *_setting_problems()]
        raise_all(StepError, headline, [*problems, *self._incompatibilities()])
        types = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        explicit = tuple(name for name, kind in types.items() if kind == AxisType.Explicit)
        if explicit:
            auto = (AxisType.Auto,) * len(types)
            object.__setattr__(self, "were_explicit", explicit)
            object.__setattr__(self, "mesh", Mesh(self.mesh.devices, tuple(types), axis_types=auto))

    @property
    def follows_rows(self) -> bool:
        """Whether the loss is read for what it does with rows, where the step splits them."""
        return not (self.spec.independent_rows or isinstance(self.spec.loss_fn, ShardMapLoss))

    @property
    def staged_kinds(self) -> list[Kind]:
        """The kinds of parallelism that put stages of layers on several devices."""
        kinds = self.spec.strategy.kinds
        return [k for k in kinds if "layers" in k.splits and self.mesh.shape.get(k.axis, 1) > 1]

    @property
    def overrides(self) -> dict[str, Override]:
        """What the loss is traced with; those that split rows in stages check what they split."""
        if self.spec.mode == "shard_map":  # the model's own collectives do their work
            return {}
        overrides = dict(self.spec.strategy.overrides)
        for kind in self.staged_kinds if self.follows_rows else ():
            inner = overrides[kind.override]
            overrides[kind.override] = CheckedStages(inner.axis, inner, f"strategies.{kind.name}()")
        return overrides

    @property
    def xla_options(self) -> dict[str, Any]:
        """Options of the compiler; declared ones override those that `deterministic` implies."""
        platform = self.mesh.devices.flat[0].platform
        # Implies xla_gpu_exclude_nondeterministic_ops, and turns off autotuning by timed kernels.
        implied = {"xla_gpu_deterministic_ops": True} if platform in ("gpu", "cuda") else {}
        return {**(implied if self.spec.deterministic else {}), **self.spec.compiler_options}

    def _compression_problems(self) -> Iterator[Problem]:
        compression = self.spec.strategy.compression
        if compression is not None and compression.axis not in self.mesh.shape:
            why = f"mesh axis {compression.axis!r} is not in the mesh."
            why += did_you_mean(compression.axis, self.mesh.shape)
            yield Problem(
                "compression", why, f"sk.GradientCompression({self.mesh.axis_names[0]!r})"
            )

    def _incompatibilities(self) -> Iterator[Problem]:
        """Options that the strategy's overrides on this mesh cannot work with."""
        for _, override in self.spec.strategy.overrides:
            if self.mesh.shape.get(override.axis, 1) > 1:
                yield from override.incompatibilities(
                    self.spec.accumulate, self.spec.precision.reduces_separately
                )


def _type_problems(mesh: object) -> list[Problem]:
    if isinstance(mesh, Mesh):
        return []
    if isinstance(mesh, MeshSpec):
        return [
            Problem("mesh", "is a MeshSpec that is not built yet", f"sk.MeshSpec({mesh}).build()")
        ]
    fix = "sk.MeshSpec(data=2, tensor=4).build()"
    return [Problem("mesh", f"is of type {type(mesh).__name__}", fix)]


def _axis_problems(mesh: Mesh) -> Iterator[Problem]:
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if kind == AxisType.Manual:
            why = f"is of type {kind.name}; the partitioner needs Auto axes"
            fix = "MeshSpec(...).build(), or Mesh(..., axis_types=(AxisType.Auto, ...))"
            yield Problem(f"mesh axis {name!r}", why, fix)


def _setting_problems() -> Iterator[Problem]:
    """Settings of JAX with which an executable has other arguments than (state, batch)."""
    name = "jax_use_simplified_jaxpr_constants"
    if getattr(SETTINGS, name, False):
        why = "is set: arrays that the loss closes over become arguments of the executable"
        yield Problem(name, why, f"jax.config.update({name!r}, False)")
