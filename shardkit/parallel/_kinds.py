"""The kinds of parallelism that planner and sweeps know, and that specs are compared with."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

from ..report import PlacedLeaf, SplitPart
from ._data import Data
from ._fsdp import Fsdp
from ._kind import Kind
from ._tensor import Tensor
from ._zero import ZeroUpdate
from .context._context import Context
from .expert._expert import Expert
from .pipeline._pipeline import Pipeline

# Each as it is tried, on the axis that its strategy uses by default; in mesh order.
_SHIPPED = (
    Pipeline("pipe"),
    Data("data"),
    ZeroUpdate("data"),
    Fsdp("fsdp"),
    Context("context"),
    Expert("expert"),
    Tensor("tensor", sequence=True),
)
_registered: contextvars.ContextVar[tuple[Kind, ...]] = contextvars.ContextVar("kinds", default=())


@contextlib.contextmanager
def register_kind(kind: Kind) -> Iterator[None]:
    """Makes one more kind known to planner and sweeps, on its mesh axis, the last in the mesh.

    Args:
      kind: as it is to be tried.
    """
    token = _registered.set((*_registered.get(), kind))
    try:
        yield
    finally:
        _registered.reset(token)


def known_kinds() -> tuple[Kind, ...]:
    """The shipped and the registered kinds, in mesh order."""
    return (*_SHIPPED, *_registered.get())


def planned_kinds() -> tuple[Kind, ...]:
    """Those that a planner tries."""
    return _planned(_registered.get())


# A plan asks for each of a hundred thousand layouts.
@functools.lru_cache(maxsize=8)
def _planned(registered: tuple[Kind, ...]) -> tuple[Kind, ...]:
    return tuple(kind for kind in (*_SHIPPED, *registered) if kind.planned)


def axes_splitting(*parts: SplitPart) -> tuple[str, ...]:
    """Conventional mesh axes of the kinds that split all of these parts.

    >>> axes_splitting("rows"), axes_splitting("rows", "experts")
    (('data', 'fsdp', 'expert'), ('expert',))
    """
    axes = (kind.axis for kind in known_kinds() if kind.splits.issuperset(parts))
    return tuple(dict.fromkeys(axes))


def gradient_shard_axes() -> tuple[str, ...]:
    """Axes over which rows stay on their device, so that gradients can be kept per device.

    >>> gradient_shard_axes()
    ('data', 'fsdp')
    """
    moving = axes_splitting("rows", "experts")
    return tuple(axis for axis in axes_splitting("rows") if axis not in moving)


def infer_kinds(
    sizes: Mapping[str, int], leaves: Sequence[PlacedLeaf], kinds: Sequence[Kind]
) -> tuple[Kind, ...]:
    """Kinds of the axes for which a strategy names none, where specs determine them.

    An axis that splits the batch is data parallelism if parameters are whole over it, ZeRO if their
    optimizer state is split over it, and FSDP if the parameters themselves are. What an axis that
    splits no batch does depends on the model's products, so it gets no kind.
    """
    named = {kind.axis for kind in kinds}
    inferred = []
    for axis in sorted(axis for axis, size in sizes.items() if size > 1 and axis not in named):
        split = {leaf.part for leaf in leaves if axis in leaf.axes()}
        fitting = [kind for kind in known_kinds() if kind.implied_by and kind.implied_by <= split]
        # Kinds that split more come later in the registry.
        inferred += [dataclasses.replace(kind, axis=axis) for kind in fitting[-1:]]
    return tuple(inferred)
