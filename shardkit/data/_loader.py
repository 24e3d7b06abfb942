"""Batches on their devices, read ahead of the step that needs them.

A Grain pipeline whose element `i` is this process's part of batch `i`, so that the state of its
iterator is the step. Grain's thread makes a batch and puts it on the devices; a few wait there.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np

from .._core.errors import BatchError, Problem, raise_all
from .._core.tree import leaves_by_path
from ._batch_source import Data
from ._process import place_rows, rows_of_shardings

# Grain wants to know where a dataset ends; a run does.
_ENDLESS = 2**62


class Loader:
    """Iterates over the batches of a run, each a pytree of global arrays on their devices.

        with sk.data.Loader(data, step.batch_shardings, start=int(state.step)) as batches:
            for batch in batches:
                state, metrics = step(state, batch)

    `sk.Trainer` takes one as its data. Every process makes only the rows that its devices hold,
    and what any process makes of a batch does not depend on how many there are. Batches are
    neither lost nor made twice: the next one is always that of `state`, however far ahead was
    read.

    An error of the data is raised for the batch that it is in, after all batches before it.
    """

    def __init__(
        self,
        data: Data,
        shardings: Any | Callable[[], Any],
        *,
        start: int = 0,
        stop: int | None = None,
        prefetch: int = 2,
    ) -> None:
        """Reads nothing yet.

        Args:
          data: batches by step.
          shardings: pytree of `NamedSharding`, `step.batch_shardings`; or a function that
            returns it, called when the first batch is read.
          start: step of the first batch.
          stop: step to end before; None to go on for ever.
          prefetch: batches that wait on the devices; with 0 each is made when it is asked for.
        """
        self.data, self.prefetch = data, prefetch
        self._shardings, self._step, self._stop = shardings, start, stop
        self._batches: Generator[Any] | None = None
        self._closed = False

    @property
    def state(self) -> dict[str, Any]:
        """Position of the next batch, for a checkpoint; `resume_step` reads it."""
        return self.position(self._step)

    def position(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` updates says of the data."""
        return self.data.position(step)

    def batches(self, start: int) -> Generator[Any]:
        """Yields the batches from a step on; closing the generator ends the thread.

        Raises:
          BatchError: the data has other leaves than the step.
        """
        import grain  # takes a second, and only who loads data needs it

        shardings = self._shardings() if callable(self._shardings) else self._shardings
        part: Any = _Part(self.data, shardings, self._stop)
        threads = 1 if self.prefetch else 0
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self.prefetch)
        iterator = iter(grain.MapDataset.source(part).to_iter_dataset(options))
        with contextlib.closing(iterator):
            iterator.set_state({"next_index": min(start, len(part))})
            yield from iterator

    def __iter__(self) -> Iterator[Any]:
        """Returns itself."""
        return self

    def __next__(self) -> Any:
        """Returns the next batch; after an error the same one is read again."""
        if self._closed:
            raise StopIteration
        if self._batches is None:
            self._batches = self.batches(self._step)
        try:
            batch = next(self._batches)
        except Exception:
            self._batches = None
            raise
        self._step += 1
        return batch

    def close(self) -> None:
        """Ends the thread and drops what was read ahead."""
        self._closed = True
        if self._batches is not None:
            self._batches.close()

    def __enter__(self) -> "Loader":
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes it."""
        self.close()

    def __str__(self) -> str:
        """Names the data."""
        return str(self.data)


class _Part:
    """Batches by step, of each the rows that this process needs, on its devices."""

    def __init__(self, data: Data, shardings: Any, stop: int | None) -> None:
        self._data, self._shardings = data, shardings
        self._held = rows_of_shardings(shardings, data.rows)
        self._size = _ENDLESS if stop is None else stop
        _check_leaves(data.batch(0, np.arange(0)), shardings, data)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, step: int) -> Any:
        part = self._data.batch(step, self._held)
        return place_rows(part, self._held, self._data.rows, self._shardings)


def _check_leaves(batch: Any, shardings: Any, data: Data) -> None:
    """Refuses data whose batches are another pytree than the step's."""
    got, want = (leaves_by_path(tree, "batch").keys() for tree in (batch, shardings))
    problems = [Problem(p, f"is declared, and {data} has none") for p in want - got]
    problems += [Problem(p, f"comes from {data}, undeclared") for p in got - want]
    fix = f"compile_step(..., batch={{...}}) with leaves {', '.join(leaves_by_path(batch))}"
    problems.sort(key=lambda one: one.subject)
    raise_all(BatchError, "The data is not what the step was compiled for.", problems, fix)
