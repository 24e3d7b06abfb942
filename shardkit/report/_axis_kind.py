"""What a report asks about the kind of parallelism on a mesh axis; `parallel.Kind` answers it."""

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from ._program import Program
    from .communication._ledger import Row

Part = Literal["rows", "length", "layers", "experts", "weights", "heads", "optimizer_state"]


@dataclasses.dataclass(frozen=True)
class AxisKind(abc.ABC):
    """The kind of parallelism on one mesh axis, as far as a report judges it.

    Attributes:
      axis: the mesh axis.
      name: of the kind, without its variant: `"tensor"`.
      splits: what is divided over the axis. "weights" are stored in shards and gathered where
        they are used, "heads" stand for every dim whose products are computed in shards.
      collectives: collectives (`"all-reduce"`, …) that it sends over its axis, with the
        all-reduces of losses and norms.
    """

    axis: str
    name: ClassVar[str]
    splits: ClassVar[frozenset[Part]] = frozenset()
    collectives: ClassVar[frozenset[str]] = frozenset()

    @property
    def explains(self) -> frozenset[str]:
        """Collectives over the axis that are no finding."""
        return self.collectives

    @property
    def gathered_activations(self) -> frozenset[str]:
        """Logical axes of activations that it splits between uses and gathers for each of them."""
        return frozenset()

    @property
    def activation_fix(self) -> str:
        """Code that splits the activations which it leaves whole; empty where there is none."""
        return ""

    @abc.abstractmethod
    def minimum(self, program: "Program") -> float | None:
        """The textbook minimum: the fewest bytes one device must send over the axis per step.

        Args:
          program: its parameters, their layout, and what else is declared; not its collectives.

        Returns:
          Bytes; None where the program does not determine them.
        """

    def excess(
        self, row: "Row", rows: "Sequence[Row]", program: "Program"
    ) -> "Iterator[tuple[str, float]]":
        """Which part of a collective goes beyond the minimum, and why.

        Args:
          row: a collective over the axis, but for what is sent again by recomputation.
          rows: all collectives over the axis.
          program: what is declared.

        Yields:
          (reason, share of the row's bytes); shares of one row add up to 1 at most.
        """
        del row, rows, program
        yield from ()
