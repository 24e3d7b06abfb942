"""The dims of a batch that count its rows: one dim for each leaf, or None for a leaf without rows.

A batch is a pytree of any arrays: `tokens[length, rows]` has its rows on dim 1, `class_weights[c]`
has none. Whatever selects, splits or doubles rows goes through `map_rows`, so that nothing but the
rows is touched.
"""

import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax

from .types import Batch, PyTree

RowDims: TypeAlias = tuple[int | None, ...]
"""The dim that counts rows for each leaf of a batch, in JAX's order; None: it has no rows."""


def map_rows(run: Callable[..., Any], batch: Batch, dims: RowDims, *others: PyTree) -> Batch:
    """Applies `run(leaf, dim, *leaves of others)` to the leaves that count rows; others stay.

    `dims` are those of the leaves; the other pytrees have the same structure.

    >>> map_rows(lambda x, dim: (x, dim), {"tokens": "t", "weights": "w"}, (1, None))
    {'tokens': ('t', 1), 'weights': 'w'}
    """
    leaves, structure = jax.tree.flatten(batch)
    columns = zip(leaves, dims, *map(jax.tree.leaves, others), strict=True)
    return structure.unflatten(
        [x if dim is None else run(x, dim, *rest) for x, dim, *rest in columns]
    )


def resize_rows(batch: Batch, dims: RowDims, times: int, over: int = 1) -> Batch:
    """Returns the abstract batch with `times / over` of its rows."""

    def resize(x: jax.ShapeDtypeStruct, dim: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(with_dim(x.shape, dim, x.shape[dim] * times // over), x.dtype)

    return map_rows(resize, batch, dims)


def set_rows(batch: Batch, dims: RowDims, rows: int) -> Batch:
    """Returns the abstract batch with this number of rows, whatever it had."""

    def resize(x: jax.ShapeDtypeStruct, dim: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(with_dim(x.shape, dim, rows), x.dtype)

    return map_rows(resize, batch, dims)


def count_rows(batch: Batch, dims: RowDims) -> set[int]:
    """Returns the sizes of the dims that count rows: one, if the leaves agree."""
    pairs = zip(jax.tree.leaves(batch), dims, strict=True)
    return {x.shape[dim] for x, dim in pairs if dim is not None}


def with_dim(shape: tuple[Any, ...], dim: int, *sizes: Any) -> tuple[Any, ...]:
    """Replaces one dim of a shape, or entry of a spec, by others.

    >>> with_dim((8, 5), 0, 4, 2), with_dim((5, 8), 1, 2)
    ((4, 2, 5), (5, 2))
    """
    return (*shape[:dim], *sizes, *shape[dim + 1 :])


def take_rows(x: Any, dim: int, index: Any) -> Any:
    """Selects rows of a leaf by a slice or numbers: `x[:, index]` for dim 1."""
    return x[(*itertools.repeat(slice(None), dim), index)]
