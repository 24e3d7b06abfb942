"""The kinds of parallelism that planner and sweeps try, and that specs are held against."""

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

# Each as it is tried, on the axis that its strategy takes by default; in mesh order.
_SHIPPED = (
    Pipeline("pipe"),
    Data("data"),
    ZeroUpdate("data"),
    Fsdp("fsdp"),
    Context("context"),
    Expert("expert"),
    Tensor("tensor", sequence=True),
)
_further: contextvars.ContextVar[tuple[Kind, ...]] = contextvars.ContextVar("kinds", default=())


@contextlib.contextmanager
def register_kind(kind: Kind) -> Iterator[None]:
    """Lets planner and sweeps try one more kind, on its mesh axis, which comes last in the mesh.

    Args:
      kind: as it is to be tried.
    """
    token = _further.set((*_further.get(), kind))
    try:
        yield
    finally:
        _further.reset(token)


def known_kinds() -> tuple[Kind, ...]:
    """The shipped kinds and those that are registered, in mesh order."""
    return (*_SHIPPED, *_further.get())


def weighed_kinds() -> tuple[Kind, ...]:
    """Those that a planner tries."""
    return _weighed(_further.get())


# A plan asks for each of a hundred thousand layouts.
@functools.lru_cache(maxsize=8)
def _weighed(further: tuple[Kind, ...]) -> tuple[Kind, ...]:
    return tuple(kind for kind in (*_SHIPPED, *further) if kind.weighed)


def axes_splitting(*parts: SplitPart) -> tuple[str, ...]:
    """Conventional mesh axes of the kinds that split all of these parts.

    >>> axes_splitting("rows"), axes_splitting("rows", "experts")
    (('data', 'fsdp', 'expert'), ('expert',))
    """
    axes = (kind.axis for kind in known_kinds() if kind.splits.issuperset(parts))
    return tuple(dict.fromkeys(axes))


def lane_axes() -> tuple[str, ...]:
    """Those over which rows stay on their device, so that a lane of gradients may end there.

    >>> lane_axes()
    ('data', 'fsdp')
    """
    moving = axes_splitting("rows", "experts")
    return tuple(axis for axis in axes_splitting("rows") if axis not in moving)


def kinds_by_specs(
    sizes: Mapping[str, int], leaves: Sequence[PlacedLeaf], kinds: Sequence[Kind]
) -> tuple[Kind, ...]:
    """Kinds of the axes for which a strategy names none, as far as specs alone tell.

    An axis that splits the batch makes gradients of parts of its rows: parameters whole over it
    are data parallelism, with their optimizer state split ZeRO; parameters split over it as well
    are gathered where they are used, which is FSDP. What an axis does that splits no batch
    depends on the model's products, and is not told.

    Args:
      sizes: mesh axis → size.
      leaves: the arguments of the step.
      kinds: those that the strategy names.
    """
    named = {kind.axis for kind in kinds}
    found = []
    for axis in sorted(axis for axis, size in sizes.items() if size > 1 and axis not in named):
        split = {leaf.part for leaf in leaves if axis in leaf.axes()}
        # Those that split more come later in the registry.
        told = [kind for kind in known_kinds() if kind.told_by and kind.told_by <= split]
        found += [dataclasses.replace(kind, axis=axis) for kind in told[-1:]]
    return tuple(found)
