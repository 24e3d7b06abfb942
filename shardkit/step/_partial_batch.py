"""Evaluates a batch with fewer rows than declared, by the program of the declared batch.

A partial batch is cut into parts whose sizes divide the declared number of rows, and each part is
repeated until the batch is full. With 8 rows declared and 3 given:

    part 1, 2 rows     0 1 0 1 0 1 0 1    every row counts 4 times
    part 2, 1 row      2 2 2 2 2 2 2 2    every row counts 8 times

Total and weight of a loss grow alike with the rows, so `total · rows of the part` has every row
equally often for each part, up to a factor that the mean does not have, and a sum over rows as the
rows that there are of all. Nothing is compiled, no row
is padded with numbers that a loss might not accept, and every device has rows, whatever divides.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.errors import BatchError, Problem, raise_all
from .._core.row_dims import RowDims, count_rows, map_rows, take_rows
from .._core.tree import flatten_tree
from .._core.types import Batch, Metrics
from ._layout import StepLayout


def count_partial_rows(batch: Batch, layout: StepLayout) -> int | None:
    """Number of rows of a batch that differs from the declared one in its rows; else None.

    Raises BatchError if it has more rows than declared, or none.
    """
    leaves, structure = flatten_tree(batch, "batch")
    declared, declared_structure = jax.tree.flatten(layout.batch)
    total, dims = layout.rows, layout.row_dims
    same_ranks = structure == declared_structure and all(
        np.ndim(x) == a.ndim for x, a in zip(leaves, declared, strict=True)
    )
    if not total or not same_ranks or len(rows := count_rows(batch, dims)) != 1:
        return None
    (given,) = rows
    if 0 < given <= total:
        return given if given < total else None
    why = f"has {given} rows, the step was compiled for {total}"
    fix = f"parts of 1 to {total} rows each, or a step declared for more"
    raise_all(BatchError, "The batch cannot be evaluated.", [Problem("batch", why, fix)])


def fill_batches(
    batch: Batch, dims: RowDims, given: int, total: int
) -> Iterator[tuple[int, Batch]]:
    """Yields `(rows of a part, the part repeated to `total` rows)`.

    >>> x = np.arange(3)
    >>> [(n, part.tolist()) for n, part in fill_batches(x, (0,), 3, 4)]
    [(2, [0, 1, 0, 1]), (1, [2, 2, 2, 2])]
    """
    batch, start = map_rows(lambda x, dim: _to_host(x), batch, dims), 0
    while start < given:
        size = max(n for n in range(1, given - start + 1) if total % n == 0)
        index = np.tile(np.arange(start, start + size), total // size)
        yield size, map_rows(lambda x, dim, index=index: take_rows(x, dim, index), batch, dims)
        start += size


def _to_host(x: Any) -> Any:
    """Rows are selected there, where no shape has to be compiled for; typed keys stay arrays."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return x if is_key else np.asarray(x)


def join_parts(
    parts: Sequence[tuple[int, Mapping[str, Any]]], share: Mapping[str, float]
) -> Metrics:
    """The metrics of all rows, f32[], from `(rows, {name: Mean})` of each part.

    `share` has what belongs to these rows of a sum over the declared number of them: of 16 declared
    and 5 given, 5 / 16.
    """

    def join(name: str) -> jax.Array:
        sums = np.sum(
            [[n * float(means[name].total), n * float(means[name].weight)] for n, means in parts], 0
        )
        mean = sums[0] / sums[1] if sums[1] else 0.0
        return jnp.asarray(mean * share.get(name, 1.0), jnp.float32)

    return {name: join(name) for name in parts[0][1]}
