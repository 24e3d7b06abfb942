"""A mesh axis that a loss uses itself: declares no layout, only that the axis is not idle.

Use for collectives in the model's own code, such as a `jax.lax.psum` in its own `shard_map`. Do not
use for an axis that rows or parameters are split over: its strategy declares that already.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, final

from ..report import Program
from ._kind import Kind
from ._names import check_strategy
from ._strategy import Strategy


@final
@dataclasses.dataclass(frozen=True)
class Own(Kind):
    """An axis that the loss uses itself."""

    name: ClassVar[str] = "own"
    sweep_by_default = False
    sends: tuple[str, ...] = ()  # collectives (`"all-reduce"`, …) that the loss sends over it

    @property
    def explains(self) -> frozenset[str]:
        """The collectives that are declared."""
        return frozenset(self.sends)

    @property
    def unmodelled_reason(self) -> str:
        """A planner does not see what the loss sends."""
        return "the loss uses the axis itself"

    def minimum(self, program: Program) -> None:
        """There is no textbook minimum for it."""
        del program


def own(axis: str, *, sends: Sequence[str] = ()) -> Strategy:
    """States that the loss uses a mesh axis itself.

    Args:
      axis: name of the mesh axis.
      sends: collectives over it that are intended, and so not findings: `("all-reduce",)`.

    Returns:
      A strategy that declares no layout.

    >>> own("ring").kinds
    (Own(axis='ring', sends=()),)
    """
    check_strategy("own", axis)
    return Strategy(kinds=(Own(axis, tuple(sends)),))
