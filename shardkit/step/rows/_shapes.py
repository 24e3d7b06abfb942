"""Rules for operations that move elements or sum over dims: where the rows are afterwards."""

import dataclasses
import math
from collections.abc import Sequence

from ._equation import Equation
from ._rules import BY_ROW, PICKS, TOGETHER, elementwise, first_mixed, join, moved, rule
from ._states import (
    AlwaysZero,
    Columns,
    Constant,
    Mixed,
    PerRow,
    RowSum,
    State,
    add_degrees,
    same_degree,
)


@rule("reduce_sum")
def _reduce_sum(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    (state,), axes = states, equation.params["axes"]
    if isinstance(state, Mixed | AlwaysZero):
        return [state]
    assert not isinstance(state, Columns)
    times = len(set(axes) & set(equation.growing(0)))
    degree = add_degrees(state.degree, times)
    if isinstance(state, PerRow) and state.dim not in axes:
        return [moved(state, state.dim - sum(axis < state.dim for axis in axes), degree)]
    if isinstance(state, Constant):
        return [Constant(degree)]
    return [RowSum(degree)]


_REDUCTIONS = (
    "reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin reduce"
)


@rule(_REDUCTIONS)
def _reduce(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    outs = elementwise(equation, states)
    axes = equation.params.get("axes", equation.params.get("dimensions", ()))
    state = outs[0]
    if equation.name == "reduce_prod" and set(axes) & set(equation.growing(0)):
        return [equation.mixed(TOGETHER)]
    if not isinstance(state, PerRow):
        return outs
    if state.dim in axes:
        return [equation.mixed("reduces over rows, but not by a sum")] * len(outs)
    return [moved(state, state.dim - sum(axis < state.dim for axis in axes))] * len(outs)


@rule("cumsum cumlogsumexp cummax cummin cumprod sort rev fft top_k")
def _along(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    """What works along some dims: exact for rows where these hold no rows."""
    params, outs = equation.params, len(equation.few.outvars)
    rank = len(equation.shape(0))
    if equation.name == "fft":
        dims: tuple[int, ...] = tuple(range(rank - len(params["fft_lengths"]), rank))
    elif equation.name == "top_k":
        dims = (params.get("axis", rank - 1) % rank,)
    else:
        dims = (params["axis"],) if "axis" in params else params.get("dimensions", ())
        dims = (params["dimension"],) if "dimension" in params else dims
    linear = equation.name in ("cumsum", "rev", "fft")
    if first_mixed(states) or all(isinstance(s, AlwaysZero) for s in states):
        return elementwise(equation, states)
    if any(set(dims) & set(equation.growing(i)) for i in range(len(states))):
        verb = {"sort": "sorts rows", "rev": "turns the order of rows round"}
        return [equation.mixed(verb.get(equation.name, "goes along the rows"))] * outs
    if linear and len(states) == 1:
        return list(states)
    return elementwise(equation, states)


@rule("transpose")
def _transpose(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    (state,) = states
    if isinstance(state, PerRow):
        return [moved(state, equation.params["permutation"].index(state.dim))]
    return [state]


@rule("broadcast_in_dim")
def _broadcast(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    state = states[0]
    if isinstance(state, PerRow):
        return [moved(state, equation.params["broadcast_dimensions"][state.dim])]
    return [state]


@rule("tile")
def _tile(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    """All rows again and again behind one another, or each row's own elements."""
    (state,) = states
    if not isinstance(state, PerRow):
        return [state]
    times = equation.params["reps"][state.dim]
    return [dataclasses.replace(state, outer=state.outer * times)]


@rule("squeeze")
def _squeeze(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    (state,), dims = states, equation.params["dimensions"]
    if not isinstance(state, PerRow):
        return [state]
    return [moved(state, state.dim - sum(dim < state.dim for dim in dims))]


@rule("reshape")
def _reshape(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    """Rows folded into a neighbouring dim, or unfolded: elements keep their order.

    `[batch, length]` to `[batch · length]`: one element before the rows, `length` behind each.
    """
    state = states[0]
    if isinstance(state, Constant) and _folds_parts(equation):
        return [equation.mixed(PICKS)]
    if isinstance(state, Constant | PerRow) and (
        len(equation.out_growing()) > len(equation.growing(0))
    ):
        return [equation.mixed("has dims whose sizes the number of rows decides")]
    if not isinstance(state, PerRow):
        return [state]
    old, new = equation.shape(0), equation.out_shape()
    before = math.prod(old[: state.dim]) * state.outer
    behind = state.inner * math.prod(old[state.dim + 1 :])
    for dim in range(len(new)):
        outer, rest = divmod(before, math.prod(new[:dim]))
        inner, left = divmod(behind, math.prod(new[dim + 1 :]))
        if not rest and not left and new[dim] == outer * equation.n * inner:
            return [PerRow(dim, outer, inner, state.degree, state.role)]
    chunks = "; or chunks of a size that divides each row's length" if behind > 1 else ""
    return [equation.mixed("splits rows up, or folds several into one", fix=BY_ROW + chunks)]


def _folds_parts(equation: Equation) -> bool:
    """Whether dims of parts of the rows become one: `[2, n / 2]` differs from row to row."""
    sizes = [equation.shape(0)[dim] for dim in equation.growing(0)]
    merged = any(equation.out_shape()[dim] not in sizes for dim in equation.out_growing())
    return merged and any(size % equation.n for size in sizes)


@rule("concatenate")
def _concatenate(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    if mixed := first_mixed(states):
        return [mixed]
    dim, rank = equation.params["dimension"], len(equation.out_shape())
    places = any(isinstance(s, PerRow) and s.role != "values" for s in states)
    if dim == rank - 1 and (places or any(isinstance(s, Columns) for s in states)):
        if all(equation.shape(i)[-1] == 1 for i in range(len(states))):
            return [Columns(tuple(states))]
        return [equation.mixed(PICKS)]
    if dim not in equation.out_growing():
        return [join(equation, states)]
    return [_stacked_blocks(equation, states, dim)]


def _stacked_blocks(equation: Equation, states: Sequence[State], dim: int) -> State:
    """All rows, and then all rows again: two views of a batch."""
    blocks, degrees, inner = 0, [], None
    for index, state in enumerate(states):
        size = equation.shape(index)[dim]
        if isinstance(state, PerRow):
            if state.dim != dim or state.role != "values" or inner not in (None, state.inner):
                return equation.mixed("puts rows behind one another")
            inner = state.inner
        elif dim not in equation.growing(index) or size % equation.n or isinstance(state, RowSum):
            return equation.mixed("puts something else beside the rows of the batch")
        if not isinstance(state, AlwaysZero):
            assert isinstance(state, PerRow | Constant)
            degrees.append(state.degree)
        blocks += size
    outer, rest = divmod(blocks, equation.n * (inner or 1))
    if rest:
        return equation.mixed("puts something else beside the rows of the batch")
    return PerRow(dim, outer, inner or 1, same_degree(*degrees) if degrees else 0)


@rule("slice")
def _slice(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    (state,), params = states, equation.params
    if not isinstance(state, PerRow):
        uneven = any(_is_cut(equation, dim) for dim in equation.growing(0))
        return [equation.mixed(PICKS) if uneven and isinstance(state, Constant) else state]
    if not _is_cut(equation, state.dim):
        return [state]
    start, stop = params["start_indices"][state.dim], params["limit_indices"][state.dim]
    block = equation.n * state.inner
    strides = params["strides"]
    if start % block or stop % block or (strides and strides[state.dim] != 1):
        return [equation.mixed("takes some rows of the batch and leaves others")]
    return [PerRow(state.dim, (stop - start) // block, state.inner, state.degree, state.role)]


def _is_cut(equation: Equation, dim: int) -> bool:
    return equation.shape(0)[dim] != equation.out_shape()[dim]


_STARTS = "starts where rows, or their number, say"


def _says_rows(start: State) -> bool:
    return start not in (Constant(0), AlwaysZero())


@rule("dynamic_slice")
def _dynamic_slice(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    if mixed := first_mixed(states):
        return [mixed]
    state, *starts = states
    # A dim that is taken whole starts at 0, whatever stands there: JAX's indexing puts 0 or n.
    if any(_says_rows(s) and _is_cut(equation, dim) for dim, s in enumerate(starts)):
        return [equation.mixed(_STARTS)]
    if isinstance(state, PerRow) and _is_cut(equation, state.dim):
        return [equation.mixed("takes some rows of the batch and leaves others")]
    return [state]


@rule("dynamic_update_slice")
def _update_slice(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    if mixed := first_mixed(states):
        return [mixed]
    operand, update, *starts = states
    cut = [dim for dim, n in enumerate(equation.shape(0)) if n != equation.shape(1)[dim]]
    if any(_says_rows(starts[dim]) for dim in cut):
        return [equation.mixed(_STARTS)]
    changed = {*equation.growing(0), *equation.growing(1)}
    if any(equation.shape(0)[d] != equation.shape(1)[d] for d in changed):
        if not isinstance(operand, AlwaysZero) or not isinstance(update, AlwaysZero):
            return [equation.mixed("overwrites some rows of the batch")]
    return [join(equation, [operand, update])]


@rule("pad")
def _pad(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    """Pads rows by whole blocks of them alone: the gradient of taking one of two views."""
    state, filler = states
    config = equation.params["padding_config"]
    if not isinstance(state, PerRow) or not any(config[state.dim]):
        uneven = any(any(config[dim]) for dim in equation.out_growing())
        same = isinstance(state, AlwaysZero) and isinstance(filler, AlwaysZero)
        return [equation.mixed(PICKS) if uneven and not same else join(equation, states)]
    low, high, inner = config[state.dim]
    block = equation.n * state.inner
    if low % block or high % block or inner:
        return [equation.mixed("pads the rows of the batch")]
    outer = state.outer + (low + high) // block
    padded = PerRow(state.dim, outer, state.inner, state.degree, state.role)
    return [join(equation, [padded, filler])]


@rule("split")
def _split(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    (state,), axis, sizes = states, equation.params["axis"], equation.params["sizes"]
    if not isinstance(state, PerRow) or state.dim != axis:
        if isinstance(state, Constant) and axis in equation.growing(0):
            return [equation.mixed(PICKS)] * len(sizes)
        if axis not in equation.growing(0) and sizes != equation.many.params["sizes"]:
            return [equation.mixed("has parts whose sizes the number of rows decides")] * len(sizes)
        return [state] * len(sizes)
    block = equation.n * state.inner
    if any(size % block for size in sizes):
        return [equation.mixed("takes some rows of the batch and leaves others")] * len(sizes)
    return [PerRow(axis, size // block, state.inner, state.degree, state.role) for size in sizes]


@rule("unstack stack")
def _stack(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    axis, outs = equation.params["axis"], len(equation.few.outvars)
    by = 1 if equation.name == "stack" else -1
    if by == -1 and any(isinstance(s, PerRow) and s.dim == axis for s in states):
        return [equation.mixed("takes the rows apart")] * outs
    shifted = [
        moved(s, s.dim + by * (s.dim >= axis)) if isinstance(s, PerRow) else s for s in states
    ]
    return [join(equation, shifted)] * outs


@rule("iota")
def _iota(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    dim = equation.params["dimension"]
    if dim not in equation.out_growing():
        return [Constant(0)]
    outer, rest = divmod(equation.out_shape()[dim], equation.n)
    if rest or outer != 1:
        return [equation.mixed("counts rows")]
    return [PerRow(dim, role="index")]
