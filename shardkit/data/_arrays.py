"""Batches of examples that already exist: arrays in memory, or any Grain dataset of rows."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from .._core.errors import DataError, Problem, raise_all
from .._core.options import check_arguments, option_problems
from .._core.tree import leaves_by_path, short_type
from .._core.types import Batch, PyTree
from ._shuffled_index import shuffled_index


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """Batches of arrays in memory; a `BatchSource`.

    An epoch is a permutation of the examples. A batch that reaches the end of an epoch continues
    with the next one.

    Attributes:
      tree: pytree of host arrays [examples, ...], as many examples in each.
      rows: rows of a batch, over all devices.
      seed: of the order of each epoch; None keeps the order of the arrays.

    Raises:
      DataError: there is no array, their leading dims differ, or there are fewer examples than
        `rows`.

    >>> data = Arrays({"x": np.arange(6), "y": np.arange(6) ** 2}, rows=4, seed=None)
    >>> data.batch(1)
    {'x': array([4, 5, 0, 1]), 'y': array([16, 25,  0,  1])}
    >>> data.batch(1, np.array([3]))
    {'x': array([1]), 'y': array([1])}
    """

    tree: PyTree
    rows: int
    seed: int | None = 0

    def __post_init__(self) -> None:
        headline, fix = "The arrays form no batches.", "arrays with one example per row"
        wrong = option_problems(rows=(self.rows, int), seed=(self.seed, int | None))
        raise_all(DataError, headline, wrong, fix)
        object.__setattr__(self, "tree", jax.tree.map(np.asarray, self.tree))
        leaves = leaves_by_path(self.tree)
        sizes = [x.shape[0] for x in leaves.values() if x.ndim]
        examples = max(sizes, key=sizes.count, default=0)
        problems = [
            Problem(
                f"{path} {short_type(x.shape, x.dtype)}",
                f"has no leading dim of {examples} examples",
            )
            for path, x in leaves.items()
            if x.shape[:1] != (examples,)
        ]
        if not 0 < self.rows <= examples:
            why = f"there are {examples} examples"
            problems.append(Problem(f"rows={self.rows}", why, f"rows={examples or 1}"))
        raise_all(DataError, headline, problems, fix)

    @property
    def rows_per_epoch(self) -> int:
        """Number of examples."""
        return len(jax.tree.leaves(self.tree)[0])

    def batch(self, step: int, rows: slice | np.ndarray = slice(None)) -> Batch:
        """Returns the batch of a step, or some of its rows: the pytree, [n, ...] each."""
        numbers = _row_numbers(step, self.rows, rows)
        n = self.rows_per_epoch
        if self.seed is None:
            index = numbers % n
        else:
            index = np.array([i for i, _ in shuffled_index(self.seed, numbers, n)], np.int64)
        return jax.tree.map(lambda x: x[index], self.tree)

    def state(self, step: int) -> dict[str, Any]:
        """Returns the step, with sizes, seed and a checksum of the arrays."""
        settings = {"rows": self.rows, "rows_per_epoch": self.rows_per_epoch, "seed": self.seed}
        return {"batch": step, **settings, "crc32": self._checksum}

    def __str__(self) -> str:
        return "the arrays"

    @functools.cached_property
    def _checksum(self) -> str:
        crc = 0
        for path, x in leaves_by_path(self.tree).items():
            crc = zlib.crc32(f"{path} {short_type(x.shape, x.dtype)}".encode(), crc)
            crc = _add_to_crc(x, crc)
        return f"{crc:08x}"


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Batches of a random-access dataset of rows, such as a Grain `MapDataset`; a `BatchSource`.

    `dataset[i]` must be a function of `i`: shuffle, repeat and transform it with Grain first.
    Element `i` is global row `i`, whichever process reads it.

    Attributes:
      dataset: a `grain.MapDataset`, or any sequence; a sequence is repeated where it ends.
      rows: rows of a batch, over all devices.
    """

    dataset: Sequence[Any]
    rows: int

    def __post_init__(self) -> None:
        check_arguments(DataError, "The dataset forms no batches.", rows=(self.rows, int))

    def batch(self, step: int, rows: slice | np.ndarray = slice(None)) -> Batch:
        """Returns the batch of a step, or some of its rows: elements stacked leaf by leaf."""
        numbers = _row_numbers(step, self.rows, rows).tolist()
        # If no row is requested, one is read all the same, for its structure and dtypes.
        elements = [self._element(i) for i in numbers or [step * self.rows]]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *elements)
        return stacked if numbers else jax.tree.map(lambda x: x[:0], stacked)

    def state(self, step: int) -> dict[str, Any]:
        """Returns the step, with the dataset's size and a checksum of three of its rows."""
        return {
            "batch": step,
            "rows": self.rows,
            "size": len(self.dataset),
            "crc32": self._checksum,
        }

    def __str__(self) -> str:
        return f"the dataset {type(self.dataset).__name__}"

    def _element(self, i: int) -> PyTree:
        # A MapDataset has elements beyond its end, such as the next epoch in another order.
        ends = isinstance(self.dataset, list | tuple | np.ndarray)
        return self.dataset[i % len(self.dataset) if ends else i]

    @functools.cached_property
    def _checksum(self) -> str:
        n, crc = len(self.dataset), 0
        for i in (0, n // 2, n - 1):
            for x in jax.tree.leaves(self._element(i)):
                crc = _add_to_crc(x, crc)
        return f"{crc:08x}"


def _row_numbers(step: int, batch_size: int, rows: slice | np.ndarray) -> np.ndarray:
    """Global numbers of the selected rows of a batch: row r of step s is s · batch_size + r."""
    return np.arange(step * batch_size, (step + 1) * batch_size)[rows]


def _add_to_crc(x: Any, crc: int) -> int:
    return zlib.crc32(np.ascontiguousarray(x).view(np.uint8).data, crc)
