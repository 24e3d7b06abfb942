"""Where batches come from: a function of the step, an iterable, or a source that can seek."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from .._core.batch_values import SupportsArray
from .._core.errors import DataError
from .._core.types import PyTree
from ..data import BatchSource, Loader


@runtime_checkable
class DataSource(Protocol):
    """Batches that can be read from any update on. Its `str` names it in errors."""

    def batches(self, start: int) -> Iterator[Any]:
        """Yields the batches of updates `start`, `start + 1`, …, counted from 0.

        Each is a pytree of host arrays, or of arrays that are on their devices already. A
        generator is closed when the run ends.
        """
        ...

    def state(self, step: int) -> Any:
        """Returns what a checkpoint stores of the data after `step` updates, as plain JSON values.

        It must distinguish this data from other data: a run resumes only if it is equal.
        """
        ...


@dataclasses.dataclass(frozen=True)
class _CountedSource:
    """Data whose whole position is the number of the next batch."""

    def state(self, step: int) -> Any:
        """Returns the number of the next batch, counted from 0."""
        return {"batch": step}

    def __str__(self) -> str:
        return "the data"


@dataclasses.dataclass(frozen=True)
class FunctionSource(_CountedSource):
    """Batches from a function `i -> batch`."""

    batch: Callable[[int], Any]

    def batches(self, start: int) -> Iterator[Any]:
        """Calls the function for `start`, `start + 1`, …."""
        return map(self.batch, itertools.count(start))


@dataclasses.dataclass(frozen=True)
class IterableSource(_CountedSource):
    """Batches from an iterable that yields the same ones each time it is iterated."""

    iterable: Iterable[Any]
    resumable: bool = True

    def batches(self, start: int) -> Iterator[Any]:
        """Iterates from the beginning and drops the first `start` batches.

        Raises:
          DataError: the iterable has one iterator for all its uses, and the run may resume.
        """
        batches = iter(self.iterable)
        # These never start anew, and a second one costs nothing; others may start processes.
        plain = type(batches).__module__ in ("builtins", "itertools")
        if self.resumable and plain and iter(self.iterable) is batches:
            raise _make_error(self.iterable, f"gives the same {type(batches).__name__} each time")
        return itertools.islice(batches, start, None)


def to_host_arrays(batch: Any) -> Any:
    """Converts leaves of other libraries, such as torch tensors of a DataLoader, to numpy."""
    known = (jax.Array, np.ndarray, np.generic)
    return jax.tree.map(
        lambda x: np.asarray(x) if isinstance(x, SupportsArray) and not isinstance(x, known) else x,
        batch,
    )


# What users pass: data in any of four forms, and `(step, state) -> metrics` of validation data.
Data = Callable[[int], Any] | Iterable[Any] | BatchSource | DataSource
Evaluate = Callable[[Any, Any], Mapping[str, Any]]


def as_source(data: Data, shardings: Callable[[], PyTree], *, resumable: bool = True) -> DataSource:
    """Wraps a function or an iterable; a source that reads ahead itself is returned as it is.

    A `BatchSource` is read by a `Loader`, for the shardings of the step's batch.

    Raises DataError for an iterator, which yields its batches once, in a run that may resume.
    """
    if isinstance(data, DataSource):
        return data
    if isinstance(data, BatchSource):
        return Loader(data, shardings)
    if callable(data):
        return FunctionSource(data)
    if resumable and isinstance(data, Iterator):
        raise _make_error(data, "is an iterator")
    return IterableSource(data, resumable)


def _make_error(data: Any, why: str) -> DataError:
    why += ": it yields each batch once, and a resumed run starts at the first one"
    fix = "a function i -> batch, a list, or an object whose __iter__ starts anew; or"
    fix += " TrainConfig(checkpoint_every=0)"
    return DataError.of("The data cannot be read again.", f"data: {type(data).__name__}", why, fix)
