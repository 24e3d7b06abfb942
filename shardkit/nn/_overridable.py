"""Parts of a model that a strategy may compute in its own way.

A model wraps such a part as `overridable("attention", reference)(...)`, where `reference` is a
plain function of arrays on one device. If the step's strategy has an `Override` of that name, it
computes the same result by other means: attention around a ring of devices, layers in a pipeline,
experts by all-to-all. Otherwise `reference` runs. So the model names no mesh axis and also works
outside a compiled step.
"""

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar, cast

import jax
from jax.extend import core, source_info_util
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from .._core.errors import Problem
from .._core.tracing import TraceContext, record_fact, recorded_facts
from .._core.types import Accumulate
from ..rules import axes_of, spec_from_axes
from ._deferred import call_open
from ._manual_axis_rules import Dims

_P = ParamSpec("_P")
_R = TypeVar("_R")

Names = tuple[str | None, ...]
Ticks = tuple[tuple[str, ...], ...]
"""For each place along a mesh axis a text per tick."""


@dataclasses.dataclass(frozen=True)
class StepContext:
    """What an override knows of the step being traced. Hashable: it is part of JAX's trace keys.

    Attributes:
      mesh: the device mesh.
      row_axes: mesh axes that the rows of the batch are split over.
      spec: `logical axis names of an activation's dims -> its spec` inside the overridable part.
      gradient_shard_axes: those of `row_axes` that `jax.vmap` over gradient shards maps already;
        the rows inside the part are not split over them, and `spec` does not name them.
      moving_row_axes: those of `row_axes` along which an override moves rows between devices.
      gathered: `(path, mesh axes per dim)` of each parameter that its products want less split
        than it is stored.
    """

    mesh: Mesh
    row_axes: tuple[str, ...]
    spec: Callable[[Names], PartitionSpec]
    gradient_shard_axes: tuple[str, ...] = ()
    moving_row_axes: tuple[str, ...] = ()
    gathered: tuple[tuple[str, Dims], ...] = ()

    @property
    def free_row_axes(self) -> tuple[str, ...]:
        """Mesh axes that split the rows inside the part: neither mapped by `vmap` nor manual."""
        taken = {*self.gradient_shard_axes, *manual_axes()}
        return tuple(axis for axis in self.row_axes if axis not in taken)


def manual_axes() -> tuple[str, ...]:
    """Returns the mesh axes that are manual in the `shard_map` being traced, if any."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def is_partly_manual() -> bool:
    """Whether the `shard_map` being traced leaves some mesh axes to the partitioner."""
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.manual_axes and mesh.auto_axes)


def current_mesh(mesh: Mesh) -> Mesh | AbstractMesh:
    """Returns the mesh that shardings must name here: that of the enclosing `shard_map`, if any."""
    abstract = jax.sharding.get_abstract_mesh()
    return mesh if abstract.empty else abstract


@dataclasses.dataclass(frozen=True)
class Override(abc.ABC):
    """One way to compute an overridable part, over one mesh axis.

    Attributes:
      axis: the mesh axis that the work is divided over. If the mesh lacks it, or it has one
        device, the reference function runs.
    """

    axis: str

    @property
    def moves_rows(self) -> bool:
        """Whether rows leave their device along the axis, so that it cannot bound a shard."""
        return False

    @property
    def row_parts(self) -> int:
        """How many micro-batches it makes of the rows of each device, beside those of the step."""
        return 1

    @abc.abstractmethod
    def __call__(
        self, around: StepContext, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Returns what `plain(*args, **kwargs)` would.

        Args:
          around: the step being traced.
          plain: the reference function.
          *args: as the model passes them.
          **kwargs: as the model passes them.
        """

    def tick_table(self, sizes: Mapping[str, int]) -> tuple[str, Ticks] | None:
        """What each place along the axis does in each tick of a step, where it runs by a table.

        Args:
          sizes: mesh axis → devices along it.

        Returns:
          The table's name, and for each place along the axis a text per tick: `F0` is the forward
          pass of micro-batch 0, `B0` its backward pass, `""` idle. None without a table.
        """
        del sizes
        return None

    def incompatibilities(self, accumulate: Accumulate, reduce_separately: bool) -> list[Problem]:
        """Lists what in the rest of a declaration this override cannot work with.

        Args:
          accumulate: micro-batches of the step.
          reduce_separately: whether gradients stay separate per shard until one reduction, for a
            reduction dtype of their own.
        """
        del accumulate, reduce_separately
        return []


@dataclasses.dataclass(frozen=True)
class ActiveOverrides:
    """The overrides of the step being traced."""

    # `(name of the part, override)`, only those whose axis has several devices
    overrides: tuple[tuple[str, Override], ...]
    step: StepContext  # what they know of the step
    disabled: bool = False  # whether every part runs its reference function for now

    def find_unreached(self, jaxpr: core.Jaxpr) -> dict[str, Override]:
        """Returns the overrides whose part does not occur in a traced program."""
        reached = overridden(jaxpr)
        return {name: override for name, override in self.overrides if name not in reached}


_active = TraceContext[ActiveOverrides]("overrides")
_REACHED = "overridden"


def overridden(jaxpr: core.Jaxpr) -> set[str]:
    """Names of the parts of a traced loss that a strategy computes in its own way."""
    return {str(name) for (name,) in recorded_facts(jaxpr, _REACHED)}


def overridable(
    name: str, reference: Callable[_P, _R], *, takes_weights: bool = False
) -> Callable[_P, _R]:
    """Marks a part of a model that a strategy may compute in its own way.

    Args:
      name: of the part, such as `"attention"`; overrides are declared by it.
      reference: the function of arrays, as one device computes it.
      takes_weights: whether weights and functions of them are among its arguments: then adapters
        and quantized weights take the place of the weights in this call (see `_deferred`).

    Returns:
      A function with the signature and the results of `reference`.

    >>> overridable("attention", lambda q: q + 1)(1)
    2
    """

    @functools.wraps(reference)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        active = _active.value
        if active is None or not is_overridden(name):
            return reference(*args, **kwargs)
        override = dict(active.overrides)[name]
        return record_fact(override(active.step, reference, *args, **kwargs), _REACHED, name)

    def without_override(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with without_overrides():  # shapes do not depend on them
            return reference(*args, **kwargs)

    return functools.partial(call_open, name, call, without_override) if takes_weights else call


def is_overridden(name: str) -> bool:
    """Whether the strategy of the step being traced computes a part in its own way."""
    active = _active.value
    return active is not None and not active.disabled and name in dict(active.overrides)


def gather_stored(path: str, x: jax.Array) -> jax.Array:
    """Gathers a form of a parameter, or of one of its layers, as a step gathers its floats.

    `path` is that of the parameter, `x` has its dims, without the first ones in a loop over layers.
    Returns the same values; outside a compiled step, or where every mesh axis is manual, `x`
    itself.
    """
    active, manual = _active.value, manual_axes()
    dims = dict(active.step.gathered).get(path) if active else None
    if active is None or dims is None or set(manual) >= set(active.step.mesh.axis_names):
        return x
    spec = spec_from_axes([a for a in dim if a not in manual] for dim in dims[-x.ndim :])
    sharding = NamedSharding(cast(Mesh, current_mesh(active.step.mesh)), spec)
    # Of no line of the user's: the parameter's rule and the operation that reads it say why.
    with source_info_util.user_context(None, name_stack=source_info_util.current_name_stack()):
        return jax.lax.with_sharding_constraint(x, sharding)


def shard_mapped(
    function: Callable[..., Any], inputs: tuple[Names, ...], output: Names
) -> Callable[..., Any]:
    """Runs a function on each device's shard of its arguments, whatever the strategy.

    For functions that the partitioner cannot split, such as kernels, and that need no data of
    other devices.

    Args:
      function: a function of arrays that is right for any part of the named dims.
      inputs: logical axes of each argument's dims.
      output: logical axes of the result's dims.

    Returns:
      A function of the whole arrays; outside a compiled step, and on one device, `function`.

    >>> shard_mapped(lambda q: q + 1, (("batch",),), ("batch",))(1)
    2
    """

    def call(*args: jax.Array) -> Any:
        active = _active.value
        if active is None or active.step.mesh.size == 1:
            return function(*args)
        step, manual = active.step, manual_axes()
        auto = frozenset(step.mesh.axis_names) - frozenset(manual)
        if not auto:
            return function(*args)
        return jax.shard_map(
            function,
            mesh=None if manual else step.mesh,
            in_specs=tuple(_restrict_spec(step.spec(names), auto) for names in inputs),
            out_specs=_restrict_spec(step.spec(output), auto),
            axis_names=auto,
            check_vma=False,  # kernels do not say along which axes their results vary
        )(*args)

    return call


@contextlib.contextmanager
def use_overrides(
    overrides: Mapping[str, Override], step: StepContext
) -> Iterator[ActiveOverrides]:
    """Makes overridable parts run these overrides while a step is traced in the block."""
    sizes = step.mesh.shape
    needed = {name: one for name, one in overrides.items() if sizes.get(one.axis, 1) > 1}
    active = ActiveOverrides(tuple(sorted(needed.items())), step)
    with _active.use(active):
        yield active


def without_overrides() -> contextlib.AbstractContextManager[None]:
    """Makes overridable parts run their reference functions, which is enough to learn shapes."""
    active = _active.value
    return _active.use(active and dataclasses.replace(active, disabled=True))


def _restrict_spec(spec: PartitionSpec, axes: frozenset[str]) -> PartitionSpec:
    """A spec without the mesh axes that are not in `axes`, which are manual already."""
    return spec_from_axes([axis for axis in axes_of(entry) if axis in axes] for entry in spec)
