"""Random batches of a step: normal floats, and integers over all that the loss looks up by them.

How far the integers of a leaf may go is read from the traced step: an integer that indexes a table
(an embedding, the logits of a label, a segment sum) or is compared with `arange(n)` (a one-hot) is
below the length of that table. With a table of 40 rows and 16 ids, every fifth row or so is looked
up, from the first to the last.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from .._core.tree import leaves_by_path
from .._core.types import Batch
from ..step import CompiledStep

_UNBOUNDED = 8  # integers that index nothing: counts, segments

# Operations that pass integers on, by which of their operands hold them.
_FIRST = (
    *("broadcast_in_dim", "convert_element_type", "copy", "dynamic_slice", "gather", "pad"),
    *("optimization_barrier", "reshape", "rev", "sharding_constraint", "shardkit_record"),
    *("shardkit_without_gradient", "slice", "squeeze", "transpose"),
)
_LOOKUPS = ("scatter", *(f"scatter-{how}" for how in ("add", "sub", "mul", "min", "max")), "gather")


@dataclasses.dataclass(frozen=True)
class _Ids:
    """What a value is known to hold."""

    leaf: str | None  # batch leaf whose integers it holds; None if it is `arange(length)`
    length: int = 0  # of the `arange`
    column: int = 0  # of the last dim of index tuples, where it is one of several columns


_Known = dict[Any, tuple[_Ids, ...]]
_Bounds = dict[str, int]


def make_random_batches(step: CompiledStep, seed: int = 0) -> list[Batch]:
    """Two host batches of a step's shapes: normal floats; integers over all that they look up.

    Floats are multiples of 1/64, whose sums are exact in any order: weights of both signs have a
    sum near zero, of which the order would otherwise decide more than eight roundings.
    """
    rng, bounds = np.random.default_rng(seed), find_integer_bounds(step)

    def normal(*shape: int) -> np.ndarray:
        return np.round(rng.standard_normal(shape) * 64) / 64

    def draw(path: str, x: jax.ShapeDtypeStruct) -> np.ndarray:
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            parts = normal(2, *x.shape)
            return (parts[0] + 1j * parts[1]).astype(x.dtype)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return normal(*x.shape).astype(x.dtype)
        end = 2 if x.dtype == bool else bounds.get(path, _UNBOUNDED)
        return _spread(rng, end, x.shape).astype(x.dtype)

    paths = iter(list(leaves_by_path(step.spec.batch)) * 2)
    return [jax.tree.map(lambda x: draw(next(paths), x), step.spec.batch) for _ in range(2)]


def _spread(rng: np.random.Generator, end: int, shape: Sequence[int]) -> np.ndarray:
    """Integers of [0, end) in random order, spread evenly: all of them where there is room."""
    size = math.prod(shape)
    places = (np.arange(size) + rng.random(size)) * (end / max(size, 1))
    spread = np.arange(size) % end if size >= end else np.minimum(places.astype(np.int64), end - 1)
    return rng.permutation(spread).reshape(shape)


def find_integer_bounds(step: CompiledStep) -> _Bounds:
    """Returns the end of the range of each integer leaf of a batch that indexes something.

    With `table[batch["ids"]]` of a table of 40 rows: `{"ids": 40}`.
    """
    leaves = leaves_by_path(step.spec.batch)
    integers = [path for path, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.integer)]
    if not integers:
        return {}
    program = step.program.jaxpr.jaxpr  # of (state, batch)
    variables = program.invars[-len(leaves) :]
    known = {
        variable: (_Ids(path),)
        for variable, path in zip(variables, leaves, strict=True)
        if path in integers
    }
    bounds: _Bounds = {}
    _follow(program, known, bounds)
    return {path: min(end, np.iinfo(leaves[path].dtype).max) for path, end in bounds.items()}


def _follow(jaxpr: core.Jaxpr, known: _Known, bounds: _Bounds) -> None:
    """Follows integers through a program; `bounds` gets the smallest length that each indexes."""

    def look_up(atom: Any) -> tuple[_Ids, ...]:
        return () if isinstance(atom, core.Literal) else known.get(atom, ())

    for equation in jaxpr.eqns:
        for leaf, end in _indexed(equation, look_up):
            bounds[leaf] = min(end, bounds.get(leaf, end))
        bodies = list(core.jaxprs_in_params(equation.params))
        for body in bodies:
            # The last operands of a loop, call or branch are those of its body.
            pairs = zip(reversed(body.invars), reversed(equation.invars), strict=False)
            known.update({variable: look_up(atom) for variable, atom in pairs})
            _follow(body, known, bounds)
            if len(body.outvars) == len(equation.outvars):
                pairs = zip(equation.outvars, body.outvars, strict=True)
                known.update({variable: look_up(atom) for variable, atom in pairs})
        if not bodies and equation.outvars:  # an optimization_barrier may have none
            known.update(dict.fromkeys(equation.outvars, _passed_on(equation, look_up)))


def _indexed(equation: core.JaxprEqn, look_up: Any) -> Iterator[tuple[str, int]]:
    """Yields (batch leaf, length) of each lookup that an operation makes by integers of a batch."""
    name = equation.primitive.name
    operands: list[Any] = list(equation.invars)
    if name in _LOOKUPS:
        numbers = equation.params["dimension_numbers"]
        dims = numbers.start_index_map if name == "gather" else numbers.scatter_dims_to_operand_dims
        for ids in look_up(operands[1]):
            if ids.leaf is not None and ids.column < len(dims):
                yield ids.leaf, operands[0].aval.shape[dims[ids.column]]
    if name == "dynamic_slice":
        sizes = zip(operands[0].aval.shape, equation.params["slice_sizes"], strict=True)
        for start, (length, size) in zip(operands[1:], sizes, strict=True):
            yield from ((ids.leaf, length - size + 1) for ids in look_up(start) if ids.leaf)
    if name == "eq":
        pair = [look_up(operand) for operand in operands]
        lengths = [ids.length for known in pair for ids in known if ids.leaf is None]
        for ids in (ids for known in pair for ids in known if ids.leaf is not None):
            yield from ((ids.leaf, length) for length in lengths)


def _passed_on(equation: core.JaxprEqn, look_up: Any) -> tuple[_Ids, ...]:
    """What the result of an operation holds of the integers of a batch."""
    name = equation.primitive.name
    if name == "iota":
        return (_Ids(None, equation.params["shape"][equation.params["dimension"]]),)
    if name in _FIRST:
        return look_up(equation.invars[0])
    if name == "clamp":
        return look_up(equation.invars[1])
    if name in ("select_n", "max", "min"):
        # jnp's indexing makes where(ids < 0, ids + n, ids); the sum is followed no further.
        return tuple({ids: None for operand in equation.invars for ids in look_up(operand)})
    if name == "concatenate":
        # Columns of index tuples: `logits[arange(8), labels]` looks up i32[8, 2].
        result: Any = equation.outvars[0].aval
        is_last = equation.params["dimension"] == len(result.shape) - 1
        return tuple(
            dataclasses.replace(ids, column=column if is_last else ids.column)
            for column, operand in enumerate(equation.invars)
            for ids in look_up(operand)
        )
    return ()
