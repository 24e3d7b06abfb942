"""Regions: parts of a model that a strategy may carry out itself.

A model marks a part with `overridable("attention", plain)(...)`: what is to be computed, as a plain
function of arrays on one device. Where the strategy of the step declares a carrier for that name,
the carrier computes the same by other means (attention round a ring of devices, layers in a
pipeline, experts by all-to-all); everywhere else the plain function runs. So the model still names
no mesh axis, and works outside a compiled step as it stands.
"""

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
from jax.extend import core
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from .._core.errors import Problem
from .._core.tracing import TraceContext, record_fact, recorded_facts
from .._core.types import Accumulate
from ..rules import axes_of, from_axes

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclasses.dataclass(frozen=True)
class StepContext:
    """What a carrier knows of the step that it works in.

    Attributes:
      mesh: the device mesh.
      rows: mesh axes that the rows of the batch are split over.
      spec: logical axis names of an activation's dims → its spec, as the region sees them; with a
        hash, as all of these, since traces are kept by them.
      lanes: those of `rows` that `jax.vmap` over lanes splits already, so that the rows that the
        region sees are not split over them, nor does `spec` name them.
      moving: those of `rows` along which some carrier moves rows between devices.
    """

    mesh: Mesh
    rows: tuple[str, ...]
    spec: Callable[[tuple[str | None, ...]], PartitionSpec]
    lanes: tuple[str, ...] = ()
    moving: tuple[str, ...] = ()

    @property
    def free_rows(self) -> tuple[str, ...]:
        """Axes that split the rows which a region sees: neither lanes nor manual around it."""
        taken = {*self.lanes, *manual_axes()}
        return tuple(axis for axis in self.rows if axis not in taken)


def manual_axes() -> tuple[str, ...]:
    """Mesh axes over which a `shard_map` around what is being traced is manual."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def partly_manual() -> bool:
    """Whether a `shard_map` around what is being traced leaves some axes to the partitioner."""
    around = jax.sharding.get_abstract_mesh()
    return bool(around.manual_axes and around.auto_axes)


def mesh_here(mesh: Mesh) -> Mesh | AbstractMesh:
    """The mesh that shardings name here: inside of a `shard_map` its own, which knows its axes."""
    around = jax.sharding.get_abstract_mesh()
    return mesh if around.empty else around


@dataclasses.dataclass(frozen=True)
class Override(abc.ABC):
    """One way to carry out a region, over one mesh axis.

    Attributes:
      axis: the mesh axis that the work is divided over; on an axis of one device, or without it
        in the mesh, the plain function runs.
    """

    axis: str

    @property
    def moves_rows(self) -> bool:
        """Whether rows leave their device along the axis, so that no lane can end there."""
        return False

    @abc.abstractmethod
    def __call__(
        self, around: StepContext, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Returns what `plain(*args, **kwargs)` would."""

    def incompatibilities(self, accumulate: Accumulate, apart: bool) -> list[Problem]:
        """What of the rest of a declaration this carrier cannot work with; nothing by default.

        Args:
          accumulate: micro-batches of the step.
          apart: whether gradients are kept apart by lane for a reduction dtype of their own.
        """
        del accumulate, apart
        return []


@dataclasses.dataclass(frozen=True)
class ActiveOverrides:
    """The carriers of the step being traced.

    Attributes:
      carriers: (name of a region, its carrier), on mesh axes of several devices alone.
      around: what they know of the step.
      plainly: regions run plainly for now.
    """

    carriers: tuple[tuple[str, Override], ...]
    around: StepContext
    plainly: bool = False

    def unreached(self, jaxpr: core.Jaxpr) -> dict[str, Override]:
        """Carriers of the regions that a program does not have."""
        reached = {name for (name,) in recorded_facts(jaxpr, _REACHED)}
        return {name: one for name, one in self.carriers if name not in reached}


_active = TraceContext[ActiveOverrides]("regions")
_REACHED = "region"


def overridable(name: str, plain: Callable[_P, _R]) -> Callable[_P, _R]:
    """Marks a part of a model that a strategy may carry out itself.

    Args:
      name: of the region: `"attention"`, …; it determines the signature of `plain`.
      plain: the function of arrays that the part is, as one device computes it.

    Returns:
      A function that returns what `plain` does.

    >>> region("attention", lambda q: q + 1)(1)
    2
    """

    @functools.wraps(plain)
    def marked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        marks = _active.value
        carrier = dict(marks.carriers).get(name) if marks and not marks.plainly else None
        if marks is None or carrier is None:
            return plain(*args, **kwargs)
        return record_fact(carrier(marks.around, plain, *args, **kwargs), _REACHED, name)

    return marked


Names = tuple[str | None, ...]


def shard_mapped(
    run: Callable[..., Any], inputs: tuple[Names, ...], output: Names
) -> Callable[..., Any]:
    """Lets each device run a function on its own part of the arrays, whatever the strategy.

    For what the partitioner cannot split, such as a kernel, and what needs no other device's part.

    Args:
      run: a function of arrays that is right for any part of the named dims.
      inputs: logical axes of each argument's dims.
      output: those of the result's.

    Returns:
      A function of the whole arrays; outside a compiled step, and on one device, `run` itself.

    >>> shard_mapped(lambda q: q + 1, (("batch",),), ("batch",))(1)
    2
    """

    def divided(*args: jax.Array) -> Any:
        marks = _active.value
        if marks is None or marks.around.mesh.size == 1:
            return run(*args)
        around = marks.around
        taken = manual_axes()
        free = frozenset(around.mesh.axis_names) - frozenset(taken)
        if not free:
            return run(*args)
        return jax.shard_map(
            run,
            mesh=None if taken else around.mesh,
            in_specs=tuple(_over(around.spec(names), free) for names in inputs),
            out_specs=_over(around.spec(output), free),
            axis_names=free,
            check_vma=False,  # kernels do not say along which axes their results vary
        )(*args)

    return divided


@contextlib.contextmanager
def use_overrides(
    carriers: Mapping[str, Override], around: StepContext
) -> Iterator[ActiveOverrides]:
    """Makes carriers carry out their regions while a step is traced."""
    sizes = around.mesh.shape
    needed = {name: one for name, one in carriers.items() if sizes.get(one.axis, 1) > 1}
    marks = ActiveOverrides(tuple(sorted(needed.items())), around)
    with _active.use(marks):
        yield marks


def without_overrides() -> contextlib.AbstractContextManager[None]:
    """Makes regions run plainly: what a carrier learns from shapes alone does not depend on it."""
    marks = _active.value
    return _active.use(marks and dataclasses.replace(marks, plainly=True))


def _over(spec: PartitionSpec, axes: frozenset[str]) -> PartitionSpec:
    """What a spec says of some axes, the others being manual already."""
    return from_axes([axis for axis in axes_of(entry) if axis in axes] for entry in spec)
