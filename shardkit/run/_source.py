"""Where the batches of a run come from, whatever form a user has them in."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Source(Protocol):
    """Batches that can be taken up again at any update.

    Its `str` names it in errors.
    """

    def batches(self, start: int) -> Iterator[Any]:
        """Yields the batches of updates `start`, `start + 1`, …, counted from 0.

        Each is a pytree of host arrays, or of arrays that are on their devices already. A
        generator is closed when the run ends.
        """
        ...

    def position(self, step: int) -> Any:
        """What a checkpoint says of the data after `step` updates, as plain JSON values.

        It has to tell this data from other data: a run goes on only where it is the same.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ByStep:
    """Batch `i` is a function of `i`, which is its whole position."""

    batch: Callable[[int], Any]

    def batches(self, start: int) -> Iterator[Any]:
        """Asks for one after the other."""
        return map(self.batch, itertools.count(start))

    def position(self, step: int) -> Any:
        """Returns the number of the next batch."""
        return {"batch": step}

    def __str__(self) -> str:
        """Says what it is."""
        return "the data"


@dataclasses.dataclass(frozen=True)
class InTurn:
    """An iterable that gives the same batches whenever it is begun."""

    of: Iterable[Any]

    def batches(self, start: int) -> Iterator[Any]:
        """Draws and drops what was read before."""
        return itertools.islice(self.of, start, None)

    def position(self, step: int) -> Any:
        """Returns the number of the next batch."""
        return {"batch": step}

    def __str__(self) -> str:
        """Says what it is."""
        return "the data"


# What a user hands over: the data in any of three forms, `(step, state) -> metrics` of held-out
# data, and `(metrics) -> text` for people.
Data = Source | Callable[[int], Any] | Iterable[Any]
Evaluate = Callable[[Any, Any], Mapping[str, Any]]
Describe = Callable[[Mapping[str, float]], str]


def as_source(data: Data) -> Source:
    """Takes data in any of its three forms."""
    if isinstance(data, Source):
        return data
    return ByStep(data) if callable(data) else InTurn(data)
