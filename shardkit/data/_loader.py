"""`Loader`: batches on their devices, read ahead of the step that uses them.

Element `i` of its Grain pipeline is this process's rows of batch `i`, so the state of the iterator
is the step. A thread of Grain makes the batches and puts them on the devices.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, Self

import jax
import numpy as np

from .._core.errors import BatchError, DataError, Problem, raise_all
from .._core.options import check_arguments
from .._core.tree import leaves_by_path
from .._core.types import Batch, PyTree
from ._batch_source import BatchSource
from ._process import place_rows, rows_of_shardings

# Grain requires a length; the run decides where the data ends.
_ENDLESS = 2**62


class Loader:
    """Iterates over the batches of a run, each a pytree of global arrays on their devices.

        with sk.data.Loader(data, step.batch_shardings, start=int(state.step)) as batches:
            for batch in batches:
                state, metrics = step(state, batch)

    `sk.Trainer` accepts one as its data. A process makes only the rows that its devices hold; the
    batches do not depend on the number of processes. `state` ignores what was read ahead, so a
    resumed run neither skips nor repeats a batch.

    An error in the data is raised at its batch, after all batches before it.
    """

    def __init__(
        self,
        data: BatchSource,
        shardings: PyTree | Callable[[], PyTree],
        *,
        start: int = 0,
        stop: int | None = None,
        prefetch: int = 2,
    ) -> None:
        """Declares a loader; the first batch is read when it is requested.

        Args:
          data: batches by step.
          shardings: pytree of `NamedSharding`, `step.batch_shardings`; or a function that
            returns it, called when the first batch is read.
          start: step of the first batch.
          stop: the first step without a batch; None for no end.
          prefetch: batches to keep ready on the devices; 0 makes each when it is requested.

        Raises:
          DataError: a number is of another type.
        """
        check_arguments(
            DataError,
            "The data cannot be loaded this way.",
            start=(start, int),
            stop=(stop, int | None),
            prefetch=(prefetch, int),
        )
        self.data, self.prefetch = data, prefetch
        self._shardings, self._step, self._stop = shardings, start, stop
        self._batches: Generator[Batch] | None = None
        self._closed = False

    def state(self, step: int | None = None) -> dict[str, Any]:
        """Returns what a checkpoint stores of the data; `resume_step` reads it.

        Args:
          step: number of the next batch; by default the one that this loader returns next.
        """
        return self.data.state(self._step if step is None else step)

    def batches(self, start: int) -> Generator[Batch]:
        """Yields the batches from a step on; closing the generator ends the thread.

        Raises:
          BatchError: the leaves of the data are not those of the step's batch.
        """
        import grain  # takes a second, which only loading data has to pay

        shardings = self._shardings() if callable(self._shardings) else self._shardings
        batches: Any = _ProcessBatches(self.data, shardings, self._stop)
        threads = 1 if self.prefetch else 0
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self.prefetch)
        iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
        with contextlib.closing(iterator):
            iterator.set_state({"next_index": min(start, len(batches))})
            yield from iterator

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Returns the next batch; after an error it tries the same batch again."""
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
        """Ends the thread and drops the batches that were read ahead."""
        self._closed = True
        if self._batches is not None:
            self._batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __str__(self) -> str:
        return str(self.data)


class _ProcessBatches:
    """Batches by step, as global arrays of which this process has made its devices' rows."""

    def __init__(self, data: BatchSource, shardings: PyTree, stop: int | None) -> None:
        self._data, self._shardings = data, shardings
        self._rows = rows_of_shardings(shardings, data.rows)
        self._size = _ENDLESS if stop is None else stop
        _check_leaves(data.batch(0, np.arange(0)), shardings, data)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, step: int) -> Batch:
        local_batch = self._data.batch(step, self._rows)
        return place_rows(local_batch, self._rows, self._data.rows, self._shardings)


def _check_leaves(batch: Batch, shardings: PyTree, data: BatchSource) -> None:
    """Refuses data whose leaves differ from those of the step's batch."""
    actual, declared = (leaves_by_path(tree, "batch").keys() for tree in (batch, shardings))
    problems = [Problem(path, f"is declared, but {data} has none") for path in declared - actual]
    problems += [
        Problem(path, f"comes from {data}, but is not declared") for path in actual - declared
    ]
    fix = f"compile_step(..., batch={{...}}) with leaves {', '.join(leaves_by_path(batch))}"
    problems.sort(key=lambda problem: problem.subject)
    raise_all(BatchError, "The data does not fit the step's batch.", problems, fix)
    _check_rows(batch, shardings, data)


def _check_rows(no_rows: Batch, shardings: PyTree, data: BatchSource) -> None:
    """With several processes each reads rows of its own, which a loader takes from dim 0."""
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings)):
        return
    why = f"has no rows on dim 0 in {data}; a process cannot read its own rows of it"
    fix = "step.shard_batch(batch) of rows that each process reads itself: step.local_rows"
    problems = [
        Problem(path, why, fix)
        for path, x in leaves_by_path(no_rows, "batch").items()
        if x.ndim and len(x)
    ]
    raise_all(BatchError, "The data cannot be read by several processes.", problems)
