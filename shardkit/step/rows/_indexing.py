"""Rules for gathers and scatters: rows look something up, or are found by their own number."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ._equation import Equation
from ._rules import NONLINEAR, TOGETHER, first_mixed, follows_count, is_place, join, moved, rule
from ._states import AlwaysZero, Columns, Constant, PerRow, RowSum, State, add_degrees

_PICKS = "picks rows of the batch by an index"
_LINEAR = ("scatter-add", "scatter-sub")
_COMBINED = ("scatter-mul", "scatter-min", "scatter-max")


@rule("gather")
def _gather(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    """Looks up slices of `operand` at `indices [*places, columns]`.

    Right for rows in three forms: each row looks up a table (an embedding), the same columns of
    every row are taken (`x[:, 0]`), or each row is looked up in itself, by a shared batching dim
    or by its own number (`logits[jnp.arange(n), labels]`).
    """
    if mixed := first_mixed(states):
        return [mixed]
    operand, indices = states[:2]
    numbers = equation.params["dimension_numbers"]
    if isinstance(indices, RowSum) or (isinstance(operand, RowSum) and not _fixed(indices)):
        return [equation.mixed("looks up what a sum over rows says")]
    if isinstance(operand, Columns) or (isinstance(operand, PerRow) and operand.role != "values"):
        return [equation.mixed(_PICKS)]
    place = _rows_of_indices(indices, numbers.start_index_map)
    if isinstance(operand, PerRow):
        return [_look_up_in_rows(equation, operand, indices, place)]
    if place is None:
        if not _fixed(indices):
            return [equation.mixed(_PICKS)]
        sizes, whole = equation.params["slice_sizes"], equation.shape(0)
        cut = any(sizes[dim] != whole[dim] for dim in equation.growing(0))
        return [equation.mixed(_PICKS) if cut else operand]
    if isinstance(operand, AlwaysZero):
        return [operand]
    rows, index = place
    # What is alike for all rows is so wherever a row looks it up.
    alike = index is not None and numbers.start_index_map[index] in equation.growing(0)
    if not isinstance(operand, Constant) or (index is not None and not alike):
        return [equation.mixed("looks up a table by a row's place in the batch")]
    return [PerRow(_place_dim(equation, rows.dim), rows.outer, rows.inner, operand.degree)]


def _look_up_in_rows(
    equation: Equation, operand: PerRow, indices: State, place: tuple[PerRow, int | None] | None
) -> State:
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    if operand.dim in numbers.operand_batching_dims:
        which = numbers.operand_batching_dims.index(operand.dim)
        dim = numbers.start_indices_batching_dims[which]
        own = dataclasses.replace(operand, dim=dim, degree=0)
        if isinstance(indices, PerRow) and indices != own:
            return equation.mixed(_PICKS)
        return moved(operand, _place_dim(equation, dim))
    if operand.dim in numbers.start_index_map:
        column = numbers.start_index_map.index(operand.dim)
        if place and place[1] == column and operand.inner == 1:  # number i is of row i
            rows, dim = place[0], _place_dim(equation, place[0].dim)
            return PerRow(dim, rows.outer, rows.inner, operand.degree)
    whole = sizes[operand.dim] == equation.shape(0)[operand.dim]
    kept = whole and operand.dim not in numbers.collapsed_slice_dims
    if place is None and kept and _fixed(indices):
        return moved(operand, _offset_dim(numbers, operand.dim))
    return equation.mixed(_PICKS)


def _fixed(indices: State) -> bool:
    parts = indices.parts if isinstance(indices, Columns) else (indices,)
    return all(part in (Constant(0), AlwaysZero()) for part in parts)


def _rows_of_indices(indices: State, columns: Sequence[int]) -> tuple[PerRow, int | None] | None:
    """The rows that indices hold, and which of their columns is the row's own number."""
    parts = indices.parts if isinstance(indices, Columns) else (indices,)
    rows = [part for part in parts if isinstance(part, PerRow)]
    if not rows or len({part.layout for part in rows}) > 1:
        return None
    if any(part.role not in ("values", "index") for part in rows) or any(map(follows_count, parts)):
        return None
    own = [i for i, part in enumerate(parts) if isinstance(part, PerRow) and part.role == "index"]
    if len(own) > 1 or (own and own[0] >= len(columns)):
        return None
    return rows[0], own[0] if own else None


def _place_dim(equation: Equation, dim: int) -> int:
    """Dim of a gather's result that comes from dim `dim` of its indices."""
    numbers, rank = equation.params["dimension_numbers"], len(equation.out_shape())
    return [d for d in range(rank) if d not in numbers.offset_dims][dim]


def _offset_dim(numbers: Any, dim: int) -> int:
    """Dim of a gather's result that comes from dim `dim` of its operand."""
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    return numbers.offset_dims[dim - sum(d < dim for d in gone)]


@rule(" ".join(("scatter", *_LINEAR, *_COMBINED)))
def _scatter(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    """Puts `updates` into `operand` at `indices`; the transposed forms of `_gather`."""
    if mixed := first_mixed(states):
        return [mixed]
    operand, indices, updates = states
    adds = equation.name in _LINEAR
    if equation.name in _COMBINED:
        multiplies = equation.name == "scatter-mul"
        if _scales(updates) or (_scales(operand) and not multiplies):
            return [equation.mixed(NONLINEAR)]
        if multiplies and isinstance(updates, Constant | PerRow):
            if isinstance(operand, AlwaysZero):
                return [operand]
            updates = dataclasses.replace(updates, degree=getattr(operand, "degree", 0))
    numbers = equation.params["dimension_numbers"]
    place = _rows_of_indices(indices, numbers.scatter_dims_to_operand_dims)
    if isinstance(indices, RowSum) or any(is_place(s) for s in (operand, updates)):
        return [equation.mixed(_PICKS)]
    if isinstance(updates, AlwaysZero) and (adds or isinstance(operand, AlwaysZero)):
        return [operand]
    if _fixed(indices):
        return [_scatter_fixed(equation, operand, updates, adds)]
    if place is None:
        return [equation.mixed(_PICKS)]
    rows, own = place
    kept, (_, outer, inner) = _batched_dim(equation, rows.dim), rows.layout
    if own is not None:
        kept, inner = numbers.scatter_dims_to_operand_dims[own], 1
        outer, rest = divmod(equation.shape(0)[kept], equation.n)
        if rest:
            return [equation.mixed(_PICKS)]
    like = operand if isinstance(updates, AlwaysZero) else updates
    degree = like.degree if isinstance(like, Constant | PerRow | RowSum) else 0
    if isinstance(updates, RowSum):
        return [equation.mixed("puts a sum over rows into single rows")]
    at = _update_dim(equation, rows.dim), rows.outer, rows.inner
    if isinstance(updates, PerRow) and updates.layout != at:
        return [equation.mixed(_PICKS)]
    if kept is not None:
        out = PerRow(kept, outer, inner, degree)
        return [join(equation, [operand, out])]
    if not adds:
        over = "lets rows overwrite one another"
        return [equation.mixed(over if equation.name == "scatter" else TOGETHER)]
    return [join(equation, [operand, RowSum(add_degrees(degree, 1))])]


def _scales(state: State) -> bool:
    """Whether a value grows with the rows, so that it is a sum over them or counts them."""
    return isinstance(state, RowSum) or getattr(state, "degree", 0) != 0


def _scatter_fixed(equation: Equation, operand: State, updates: State, adds: bool) -> State:
    numbers = equation.params["dimension_numbers"]
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    own = [d for d in range(len(equation.shape(0))) if d not in gone]
    window = dict(zip(own, numbers.update_window_dims, strict=True))
    for dim in set(numbers.scatter_dims_to_operand_dims) & set(equation.growing(0)):
        if dim not in window or equation.shape(2)[window[dim]] != equation.shape(0)[dim]:
            return equation.mixed(_PICKS)  # some rows are changed, and others left
    if adds and (summed := set(equation.growing(2)) - set(numbers.update_window_dims)):
        # Of all rows at places that are alike for each, as of their position embeddings.
        if isinstance(updates, PerRow) and (updates.role != "values" or updates.dim not in summed):
            return equation.mixed(_PICKS)
        assert isinstance(updates, PerRow | RowSum | Constant)
        kind = Constant if isinstance(updates, Constant) else RowSum
        return join(equation, [operand, kind(add_degrees(updates.degree, len(summed)))])
    if not isinstance(updates, PerRow):
        return join(equation, [operand, updates])
    if updates.dim in numbers.update_window_dims:
        dim = own[numbers.update_window_dims.index(updates.dim)]
        if equation.shape(0)[dim] == equation.shape(2)[updates.dim]:
            return join(equation, [operand, moved(updates, dim)])
    return equation.mixed(_PICKS)


def _batched_dim(equation: Equation, dim: int) -> int | None:
    """Dim of the operand that shares a batching dim with dim `dim` of the indices."""
    numbers = equation.params["dimension_numbers"]
    if dim not in numbers.scatter_indices_batching_dims:
        return None
    return numbers.operand_batching_dims[numbers.scatter_indices_batching_dims.index(dim)]


def _update_dim(equation: Equation, dim: int) -> int:
    """Dim of the updates that goes with dim `dim` of the indices."""
    numbers, rank = equation.params["dimension_numbers"], len(equation.shape(2))
    return [d for d in range(rank) if d not in numbers.update_window_dims][dim]
