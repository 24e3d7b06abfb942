"""A mesh axis that a loss uses itself: no layout, only the statement that it is not idle.

Use for collectives that a model writes down itself, as a `jax.lax.psum` under its own `shard_map`.
Do not use for an axis that rows or parameters are split over: its strategy says so already.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, final

from ..report import Program
from ._kind import Kind
from ._names import check_axis
from ._strategy import Strategy


@final
@dataclasses.dataclass(frozen=True)
class Own(Kind):
    """An axis of the author's own.

    Attributes:
      sends: collectives (`"all-reduce"`, …) over it that are meant.
    """

    name: ClassVar[str] = "own"
    by_default = False
    sends: tuple[str, ...] = ()

    @property
    def explains(self) -> frozenset[str]:
        """What its author says that it sends."""
        return frozenset(self.sends)

    @property
    def unmodelled(self) -> str:
        """Nobody but its author knows."""
        return "what the loss does over it is its own"

    def minimum(self, program: Program) -> None:
        """No textbook knows it."""
        del program


def own(axis: str, *, sends: Sequence[str] = ()) -> Strategy:
    """States that the loss uses a mesh axis itself.

    Args:
      axis: name of the mesh axis.
      sends: collectives over it that are meant, and so no findings: `("all-reduce",)`.

    Returns:
      A strategy that lays nothing out.

    >>> own("ring").kinds
    (Own(axis='ring', sends=()),)
    """
    check_axis("own", axis)
    return Strategy(kinds=(Own(axis, tuple(sends)),))
