"""Rows that are there already: arrays in memory, or any Grain dataset of rows."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from .._core.errors import DataError, Problem, raise_all
from .._core.options import option_problems
from .._core.tree import leaves_by_path, short_type
from ._shuffled_index import places


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """Arrays in memory whose rows are examples; see `arrays`.

    Attributes:
      tree: pytree of host arrays, [examples, ...] each.
      rows: of a batch, over all devices.
      seed: of the order; None keeps theirs.
    """

    tree: Any
    rows: int
    seed: int | None = 0

    @property
    def rows_per_epoch(self) -> int:
        """Examples."""
        return len(jax.tree.leaves(self.tree)[0])

    def batch(self, step: int, rows: slice | np.ndarray = slice(None)) -> Any:
        """Returns the batch of a step, or some of its rows: the pytree, [n, ...] each.

        An epoch is a permutation of the examples, and the next one follows in the same batch.
        """
        picked = np.arange(step * self.rows, (step + 1) * self.rows)[rows]
        n = self.rows_per_epoch
        if self.seed is None:
            index = picked % n
        else:
            index = np.array([place for place, _ in places(self.seed, picked, n)], np.int64)
        return jax.tree.map(lambda x: x[index], self.tree)

    def position(self, step: int) -> dict[str, Any]:
        """Says where in the data a run is, and recognizes the data."""
        known = {"rows": self.rows, "rows_per_epoch": self.rows_per_epoch, "seed": self.seed}
        return {"batch": step, **known, "crc32": self._checksum}

    def __str__(self) -> str:
        """Says what it is."""
        return "the arrays"

    @functools.cached_property
    def _checksum(self) -> str:
        crc = 0
        for path, x in leaves_by_path(self.tree).items():
            crc = zlib.crc32(f"{path} {short_type(x.shape, x.dtype)}".encode(), crc)
            crc = zlib.crc32(np.ascontiguousarray(x).view(np.uint8).data, crc)
        return f"{crc:08x}"


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A random-access dataset whose elements are rows, a Grain `MapDataset` for one.

    `dataset[i]` has to be a function of `i`: shuffle, repeat and transform it by Grain's own
    means, before. Element `i` is global row `i`, whatever process asks for it.

    Attributes:
      dataset: a `grain.MapDataset`, or any sequence; it is repeated where it ends.
      rows: of a batch, over all devices.
    """

    dataset: Sequence[Any]
    rows: int

    def batch(self, step: int, rows: slice | np.ndarray = slice(None)) -> Any:
        """Returns the batch of a step, or some of its rows: elements stacked leaf by leaf."""
        picked = np.arange(step * self.rows, (step + 1) * self.rows)[rows].tolist()
        # Asked for no row, it still says what a row looks like.
        found = [self._row(i) for i in picked or [step * self.rows]]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *found)
        return stacked if picked else jax.tree.map(lambda x: x[:0], stacked)

    def position(self, step: int) -> dict[str, Any]:
        """Says where in the data a run is; of the data it knows the size and three rows."""
        return {"batch": step, "rows": self.rows, "size": len(self.dataset), **self._known}

    def __str__(self) -> str:
        """Says what it is."""
        return f"the dataset {type(self.dataset).__name__}"

    # A MapDataset knows itself what comes after its end, another epoch's order for one.
    def _row(self, i: int) -> Any:
        return self.dataset[i if _counts_on(self.dataset) else i % len(self.dataset)]

    @functools.cached_property
    def _known(self) -> dict[str, str]:
        n, crc = len(self.dataset), 0
        for i in (0, n // 2, n - 1):
            for x in jax.tree.leaves(self._row(i)):
                crc = zlib.crc32(np.ascontiguousarray(x).view(np.uint8).data, crc)
        return {"crc32": f"{crc:08x}"}


def _counts_on(dataset: Sequence[Any]) -> bool:
    return not isinstance(dataset, list | tuple | np.ndarray)


def arrays(tree: Any, rows: int, seed: int | None = 0) -> Arrays:
    """Makes batches of arrays in memory.

    Args:
      tree: pytree of host arrays with one leading dim, that of the examples.
      rows: of a batch, over all devices.
      seed: of the order of each epoch; None keeps the order of the arrays.

    Raises:
      DataError: there is no array, their leading dims differ, or there are fewer examples than
        rows.

    >>> data = arrays({"x": np.arange(6), "y": np.arange(6) ** 2}, rows=4, seed=None)
    >>> data.batch(1)
    {'x': array([4, 5, 0, 1]), 'y': array([16, 25,  0,  1])}
    >>> data.batch(1, np.array([3]))
    {'x': array([1]), 'y': array([1])}
    """
    fix = "arrays with one example per row, as many in each"
    wrong = option_problems(rows=(rows, int), seed=(seed, int | None))
    raise_all(DataError, "The arrays form no batches.", wrong, fix)
    tree = jax.tree.map(np.asarray, tree)
    found = leaves_by_path(tree)
    sizes = [x.shape[0] for x in found.values() if x.ndim]
    most = max(sizes, key=sizes.count, default=0)
    problems = [
        Problem(f"{name} {short_type(x.shape, x.dtype)}", f"has no leading dim of {most} examples")
        for name, x in found.items()
        if x.shape[:1] != (most,)
    ]
    if not 0 < rows <= most:
        problems.append(Problem(f"rows={rows}", f"there are {most} examples", f"rows={most or 1}"))
    raise_all(DataError, "The arrays form no batches.", problems, fix)
    return Arrays(tree, rows, seed)
