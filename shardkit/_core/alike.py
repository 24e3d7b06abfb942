"""Many arrays of few types: one piece of a program for each type, not one for each array.

A model with 100 unstacked layers has a thousand leaves of a dozen types. A program that hashes or
sums every one of them by itself takes minutes to compile, and one that does it to stacks of them
seconds.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .tree import nbytes

# Bytes that are stacked at once, so that no second copy of a large model is made.
_TOGETHER = 2**24

Column = Sequence[jax.Array] | jax.Array


@dataclasses.dataclass(frozen=True)
class Stack:
    """Rows of one type and layout, stacked."""

    numbers: tuple[int, ...]  # which rows they are, n of them
    layout: Hashable
    columns: tuple[jax.Array, ...]  # [n, ...] each


def stack_alike(columns: Sequence[Column], layouts: Sequence[Hashable]) -> Iterator[Stack]:
    """Stacks the rows of some columns of arrays that have the same types and layout.

    A column is a list of arrays, or one array whose dim 0 counts rows. The arrays are arguments of
    the program: the kernel that writes a stack would compute them once more.
    """
    groups: dict[Any, list[int]] = {}
    for number, row in enumerate(zip(*columns, layouts, strict=True)):
        types = tuple((x.shape, x.dtype) for x in row[:-1])
        groups.setdefault((row[-1], types), []).append(number)
    for (layout, types), members in groups.items():
        most = max(1, _TOGETHER // max(1, sum(nbytes(*kind) for kind in types)))
        for start in range(0, len(members), most):
            part = members[start : start + most]
            yield Stack(tuple(part), layout, tuple(_stack_rows(column, part) for column in columns))


def map_alike(
    run: Callable[..., jax.Array], columns: Sequence[Column], layouts: Sequence[Hashable]
) -> jax.Array:
    """`[n, ...]`: `run` of each row, all of one shape; see `stack_alike`.

    >>> ones, two = [jnp.ones(3), jnp.ones(4), jnp.ones(3)], jnp.arange(3)
    >>> print(map_alike(lambda x, n: x.sum() + n, (ones, two), [None] * 3))
    [3. 5. 5.]
    """
    stacks = list(stack_alike(columns, layouts))
    results = [jax.vmap(run)(*stack.columns) for stack in stacks]
    return in_order(stacks, results)


def in_order(stacks: Sequence[Stack], results: Sequence[jax.Array]) -> jax.Array:
    """`[n, ...]`: what was made of each stack, in the order of the rows."""
    places = np.argsort([number for stack in stacks for number in stack.numbers])
    return jnp.concatenate(results)[places]


def _stack_rows(column: Column, numbers: Sequence[int]) -> jax.Array:
    if isinstance(column, jax.Array):
        return column[np.asarray(numbers)]
    if len(numbers) == 1:
        return column[numbers[0]][None]
    return jnp.stack([column[number] for number in numbers])
