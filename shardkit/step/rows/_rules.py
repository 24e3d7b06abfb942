"""What each operation makes of rows: one rule for each form of operation.

A rule takes an `Equation` and the states of its operands, and gives those of its results.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from ._equation import Equation
from ._states import (
    Columns,
    Constant,
    Mixed,
    PerRow,
    RowSum,
    State,
    Zero,
    add_degrees,
    same_degree,
)

Rule = Callable[[Equation, Sequence[State]], Sequence[State]]
RULES: dict[str, Rule] = {}

_TOGETHER = "combines each row with other ones"
_PICKS = "picks rows by their place in the batch"
_NONLINEAR = "is not linear in a sum over rows"


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for primitives of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def unfollowed(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    """Of an operation that no rule is for: constants stay constant, anything else is refused."""
    outs = len(equation.few.outvars)
    if mixed := first_mixed(states):
        return [mixed] * outs
    if all(isinstance(state, Constant | Zero) for state in states):
        return [_made_of_constants(equation, states, i) for i in range(outs)]
    return [equation.mixed("does something with rows that cannot be followed")] * outs


def _made_of_constants(equation: Equation, states: Sequence[State], index: int) -> State:
    degrees = {state.degree for state in states if isinstance(state, Constant)}
    if not equation.out_growing(index):
        return Constant(0 if degrees <= {0} else None)
    # It may differ from row to row, as an `iota` does.
    return equation.mixed("makes something for each row out of its place in the batch")


def first_mixed(states: Sequence[State]) -> Mixed | None:
    """The first operand whose rows are mixed already."""
    return next((state for state in states if isinstance(state, Mixed)), None)


def join(equation: Equation, states: Sequence[State]) -> State:
    """What a value is that is one of several, or their sum: all must scale alike."""
    if mixed := first_mixed(states):
        return mixed
    states = [state for state in states if not isinstance(state, Zero)]
    if not states:
        return Zero()
    if any(isinstance(state, Columns) for state in states):
        return states[0] if len(set(states)) == 1 else equation.mixed(_PICKS)
    rows = [state for state in states if isinstance(state, PerRow)]
    sums = [state for state in states if isinstance(state, RowSum)]
    degree = same_degree(*(state.degree for state in states if not isinstance(state, Columns)))
    if rows and sums:
        return equation.mixed("uses a sum over rows beside single rows")
    if sums and degree is None:
        return equation.mixed("adds sums over rows to something that does not grow with them")
    if sums:
        return RowSum(degree)
    if not rows:
        return Constant(degree)
    if len({state.layout for state in rows}) > 1:
        return equation.mixed(_TOGETHER)
    roles = {state.role for state in states if isinstance(state, PerRow)}
    if roles == {"index", "shifted"}:
        return rows[0] if rows[0].role == "index" else rows[1]
    if len(roles) > 1 or (roles != {"data"} and len(rows) < len(states)):
        return equation.mixed(_PICKS)
    first = rows[0]
    return PerRow(first.dim, first.outer, first.inner, degree, first.role)


@rule("add", "sub", "add_any", "or", "select_and_gather_add")
def _add(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    placed = [state for state in states if isinstance(state, PerRow) and state.role != "data"]
    if placed and len(placed) < len(states) and not first_mixed(states):
        index, (other,) = placed[0], [state for state in states if state not in placed] or [None]
        if index.role == "index" and isinstance(other, Constant | Zero):
            return [PerRow(*index.layout, None, "shifted")]
        return [equation.mixed(_PICKS)]
    if equation.name == "or" and not first_mixed(states):
        return _nonlinear(equation, states)
    return [join(equation, states)]


@rule("mul")
def _mul(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    if mixed := first_mixed(states):
        return [mixed]
    if any(isinstance(state, Zero) for state in states):
        return [Zero()]
    return [_product(equation, states)]


def _product(equation: Equation, states: Sequence[State]) -> State:
    rows = [state for state in states if isinstance(state, PerRow)]
    sums = [state for state in states if isinstance(state, RowSum)]
    if any(state.role != "data" for state in rows) or any(isinstance(s, Columns) for s in states):
        return equation.mixed(_PICKS)
    degree = add_degrees(*(s.degree for s in states if not isinstance(s, Zero | Mixed | Columns)))
    if sums and rows:
        return equation.mixed("multiplies single rows with a sum over rows")
    if len(sums) > 1:
        return equation.mixed("multiplies two sums over rows")
    if sums:
        return RowSum(degree)
    if not rows:
        return Constant(degree)
    if len({state.layout for state in rows}) > 1:
        return equation.mixed(_TOGETHER)
    return PerRow(*rows[0].layout, degree)


@rule("div")
def _div(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    if mixed := first_mixed(states):
        return [mixed]
    top, bottom = states
    if isinstance(bottom, RowSum):
        ratio = isinstance(top, RowSum | Constant | Zero)
        return [equation.mixed("divides by a sum over rows", ratio=ratio)]
    if isinstance(top, Zero):
        return [Zero()]
    if isinstance(bottom, Zero):
        bottom = Constant(0)
    inverse = _negated(bottom)
    return [_product(equation, [top, inverse])]


def _negated(state: State) -> State:
    if isinstance(state, Constant):
        return Constant(None if state.degree is None else -state.degree)
    assert isinstance(state, PerRow | Columns)
    if isinstance(state, Columns):
        return state
    degree = None if state.degree is None else -state.degree
    return PerRow(*state.layout, degree, state.role)


@rule("square", "integer_pow")
def _power(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    power = equation.params.get("y", 2)
    (state,) = states
    if isinstance(state, Mixed | Zero):
        return [state]
    if isinstance(state, RowSum | Columns) or (isinstance(state, PerRow) and state.role != "data"):
        return [equation.mixed(_NONLINEAR)]
    degree = None if state.degree is None else state.degree * power
    return [Constant(degree) if isinstance(state, Constant) else PerRow(*state.layout, degree)]


_SAME = (
    "neg real imag copy copy_p stop_gradient optimization_barrier reduce_precision "
    "sharding_constraint shardkit_constrain shardkit_weight convert_element_type conj "
    "pvary pcast copy_to_host_async name"
)


@rule(*_SAME.split())
def _same(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    if equation.name == "convert_element_type" and not _is_linear_cast(equation):
        return _nonlinear(equation, states, keep_places=True)
    return list(states)


def _is_linear_cast(equation: Equation) -> bool:
    """A cast to an integer or a bool rounds; one between floats rounds too, and is taken as exact."""
    kinds = [v.aval.dtype.kind for v in (equation.few.invars[0], equation.few.outvars[0])]
    return kinds[1] in "fcV" or kinds[0] == kinds[1] or (kinds[0] in "iub" and kinds[1] in "iu")


@rule("select_n")
def _select(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    if mixed := first_mixed(states):
        return [mixed]
    which, *cases = states
    if isinstance(which, RowSum | Columns):
        return [equation.mixed("chooses by a sum over rows")]
    if isinstance(which, PerRow) and which.role == "test":
        return [join(equation, cases)]
    out = join(equation, cases)
    if not isinstance(which, PerRow) or isinstance(out, Mixed):
        return [out]
    if which.role != "data":
        return [equation.mixed(_PICKS)]
    if isinstance(out, RowSum):
        return [equation.mixed("puts a sum over rows into single rows")]
    if isinstance(out, PerRow):
        return [out if out.layout == which.layout else equation.mixed(_TOGETHER)]
    degree = out.degree if isinstance(out, Constant) else 0
    return [Zero() if isinstance(out, Zero) else PerRow(*which.layout, degree)]


_ELEMENTWISE = (
    "abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp "
    "complex cos cosh digamma eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a "
    "igammac is_finite le lgamma log log1p logistic lt max min ne nextafter not polygamma "
    "population_count pow random_bits_elementwise regularized_incomplete_beta rem round rsqrt "
    "shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt tan tanh xor zeta "
    "threefry2x32 bitcast_convert_type random_fold_in random_clone eq_to lt_to le_to clz "
    "random_gamma erf_inv square_root to_edtype from_edtype"
)


@rule(*_ELEMENTWISE.split())
def _elementwise(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    return _nonlinear(equation, states)


def _nonlinear(
    equation: Equation, states: Sequence[State], keep_places: bool = False
) -> Sequence[State]:
    """Any function of elements at one place: exact for rows, and for nothing that sums over them."""
    outs = len(equation.few.outvars)
    if mixed := first_mixed(states):
        return [mixed] * outs
    if any(isinstance(state, RowSum) for state in states):
        return [equation.mixed(_NONLINEAR)] * outs
    rows = [state for state in states if isinstance(state, PerRow)]
    if any(isinstance(state, Columns) for state in states):
        return [equation.mixed(_PICKS)] * outs
    placed = [state for state in rows if state.role != "data"]
    if placed:
        if keep_places and len(states) == 1:
            return [placed[0]] * outs
        compared = equation.name in ("lt", "ge", "le", "gt") and len(placed) == 1
        if compared and placed[0].role in ("index", "shifted") and len(rows) == 1:
            return [PerRow(*placed[0].layout, 0, "test")]
        if len(placed) == len(rows) and {s.role for s in placed} == {"test"}:
            return [placed[0]] * outs
        return [equation.mixed(_PICKS)] * outs
    degrees = {s.degree for s in states if isinstance(s, PerRow | Constant)}
    if not rows:
        return [Constant(0 if degrees <= {0} else None)] * outs
    if len({state.layout for state in rows}) > 1:
        return [equation.mixed(_TOGETHER)] * outs
    if not degrees <= {0}:
        why = "makes each row's part depend on how many rows there are"
        return [equation.mixed(why)] * outs
    return [PerRow(*rows[0].layout)] * outs


@rule("reduce_sum")
def _reduce_sum(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    (state,), axes = states, equation.params["axes"]
    if isinstance(state, Mixed | Zero):
        return [state]
    if isinstance(state, Columns) or (isinstance(state, PerRow) and state.role != "data"):
        return [equation.mixed(_PICKS)]
    times = len(set(axes) & set(equation.growing(0)))
    degree = add_degrees(state.degree, times)
    if isinstance(state, PerRow) and state.dim not in axes:
        return [_moved(state, state.dim - sum(axis < state.dim for axis in axes), degree)]
    if isinstance(state, Constant):
        return [Constant(degree)]
    return [RowSum(degree)]


_REDUCTIONS = "reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin reduce"


@rule(*_REDUCTIONS.split())
def _reduce(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    outs = _nonlinear(equation, states)
    axes = equation.params.get("axes", equation.params.get("dimensions", ()))
    state = outs[0]
    if not isinstance(state, PerRow):
        return outs
    if state.role != "data":
        return [equation.mixed(_PICKS)] * len(outs)
    if state.dim in axes:
        return [equation.mixed("reduces over rows, but not by a sum")] * len(outs)
    return [_moved(state, state.dim - sum(axis < state.dim for axis in axes))] * len(outs)


@rule("cumsum", "cumlogsumexp", "cummax", "cummin", "cumprod", "sort", "rev", "fft", "top_k")
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
    if any(isinstance(s, PerRow) and s.dim in dims for s in states) and not first_mixed(states):
        verb = {"sort": "sorts rows", "rev": "turns the order of rows round"}
        return [equation.mixed(verb.get(equation.name, "goes along the rows"))] * outs
    if linear and len(states) == 1:
        return list(states)
    return _nonlinear(equation, states)


def _moved(state: PerRow, dim: int, degree: Any = "same") -> PerRow:
    """The same rows in another dim."""
    power = state.degree if degree == "same" else degree
    return PerRow(dim, state.outer, state.inner, power, state.role)


@rule("transpose")
def _transpose(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    (state,) = states
    if isinstance(state, PerRow):
        return [_moved(state, equation.params["permutation"].index(state.dim))]
    return [state]


@rule("broadcast_in_dim")
def _broadcast(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    state = states[0]
    if isinstance(state, PerRow):
        return [_moved(state, equation.params["broadcast_dimensions"][state.dim])]
    return [state]


@rule("squeeze", "expand_dims")
def _squeeze(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    (state,), dims = states, equation.params["dimensions"]
    if not isinstance(state, PerRow):
        return [state]
    if equation.name == "squeeze":
        return [_moved(state, state.dim - sum(dim < state.dim for dim in dims))]
    kept = [d for d in range(len(equation.out_shape())) if d not in dims]
    return [_moved(state, kept[state.dim])]


@rule("reshape")
def _reshape(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    """Rows folded into a neighbouring dim, or unfolded: elements keep their order.

    `[batch, length]` to `[batch · length]`: one element before the rows, `length` behind each.
    """
    state = states[0]
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
    return [equation.mixed("splits rows up, or folds several into one")]


@rule("concatenate")
def _concatenate(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    if mixed := first_mixed(states):
        return [mixed]
    dim, rank = equation.params["dimension"], len(equation.out_shape())
    places = any(isinstance(s, PerRow) and s.role != "data" for s in states)
    if dim == rank - 1 and (places or any(isinstance(s, Columns) for s in states)):
        if all(equation.shape(i)[-1] == 1 for i in range(len(states))):
            return [Columns(tuple(states))]
        return [equation.mixed(_PICKS)]
    if dim not in equation.out_growing():
        return [join(equation, states)]
    return [_stacked_blocks(equation, states, dim)]


def _stacked_blocks(equation: Equation, states: Sequence[State], dim: int) -> State:
    """All rows, and then all rows again: two views of a batch."""
    blocks, degrees, inner = 0, [], None
    for index, state in enumerate(states):
        size = equation.shape(index)[dim]
        if isinstance(state, PerRow):
            if state.dim != dim or state.role != "data" or inner not in (None, state.inner):
                return equation.mixed("puts rows behind one another")
            inner = state.inner
        elif dim not in equation.growing(index) or isinstance(state, RowSum):
            return equation.mixed("puts something else beside the rows of the batch")
        if not isinstance(state, Zero):
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
        return [equation.mixed(_PICKS) if uneven and isinstance(state, Constant) else state]
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


@rule("dynamic_slice")
def _dynamic_slice(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    if mixed := first_mixed(states):
        return [mixed]
    state, *starts = states
    if any(not isinstance(start, Constant | Zero) for start in starts):
        return [equation.mixed("starts where rows say")]
    if isinstance(state, PerRow) and _is_cut(equation, state.dim):
        return [equation.mixed("takes some rows of the batch and leaves others")]
    return [state]


@rule("dynamic_update_slice")
def _update_slice(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    if mixed := first_mixed(states):
        return [mixed]
    operand, update, *starts = states
    if any(not isinstance(start, Constant | Zero) for start in starts):
        return [equation.mixed("starts where rows say")]
    rows = [state for state in (operand, update) if isinstance(state, PerRow)]
    if any(equation.shape(0)[s.dim] != equation.shape(1)[s.dim] for s in rows):
        return [equation.mixed("overwrites some rows of the batch")]
    return [join(equation, [operand, update])]


@rule("pad")
def _pad(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    state = states[0]
    config = equation.params["padding_config"]
    if isinstance(state, PerRow) and any(config[state.dim]):
        return [equation.mixed("pads the rows of the batch")]
    return [join(equation, states)]


@rule("iota")
def _iota(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    dim = equation.params["dimension"]
    if dim not in equation.out_growing():
        return [Constant(0)]
    outer, rest = divmod(equation.out_shape()[dim], equation.n)
    if rest or outer != 1:
        return [equation.mixed("counts rows")]
    return [PerRow(dim, role="index")]


@rule("dot_general")
def _dot(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    if mixed := first_mixed(states):
        return [mixed]
    if any(isinstance(state, Zero) for state in states):
        return [Zero()]
    left, right = states
    if any(isinstance(s, Columns) or (isinstance(s, PerRow) and s.role != "data") for s in states):
        return [equation.mixed(_PICKS)]
    contracted, batched = equation.params["dimension_numbers"]
    summed = sum(dim in equation.growing(0) for dim in contracted[0])
    assert isinstance(left, PerRow | Constant | RowSum)
    assert isinstance(right, PerRow | Constant | RowSum)
    degree = add_degrees(left.degree, right.degree, summed)
    if isinstance(left, RowSum) or isinstance(right, RowSum):
        other = right if isinstance(left, RowSum) else left
        if isinstance(other, Constant):
            return [RowSum(degree)]
        return [equation.mixed("multiplies a sum over rows with what rows decide")]
    rows = [(side, s) for side, s in enumerate((left, right)) if isinstance(s, PerRow)]
    if not rows:
        return [Constant(degree)]
    if len(rows) == 2 and not _paired(left, right, contracted, batched):
        return [equation.mixed("multiplies rows with one another")]
    side, state = rows[0]
    if state.dim in contracted[side]:
        return [RowSum(degree)]
    return [_moved(state, _output_dim(equation, side, state.dim), degree)]


def _paired(left: Any, right: Any, contracted: Any, batched: Any) -> bool:
    """Whether both operands' rows meet in one dim of the product: row by row."""
    if left.layout[1:] != right.layout[1:]:
        return False
    pairs = [*zip(*contracted, strict=True), *zip(*batched, strict=True)]
    return (left.dim, right.dim) in pairs


def _output_dim(equation: Equation, side: int, dim: int) -> int:
    """Dims of a product: those that both share, then the left operand's own, then the right's."""
    contracted, batched = equation.params["dimension_numbers"]
    if dim in batched[side]:
        return batched[side].index(dim)
    own = [
        [d for d in range(len(equation.shape(i))) if d not in (*contracted[i], *batched[i])]
        for i in (0, 1)
    ]
    return len(batched[0]) + (len(own[0]) if side else 0) + own[side].index(dim)


@rule("conv_general_dilated")
def _convolution(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    """Rows are the batch dim of the input, or, in a weight's gradient, what both are summed over."""
    if mixed := first_mixed(states):
        return [mixed]
    if any(isinstance(state, Zero) for state in states):
        return [Zero()]
    image, kernel = states
    numbers = equation.params["dimension_numbers"]
    if isinstance(image, PerRow) and isinstance(kernel, PerRow):
        met = image.dim == numbers.lhs_spec[1] and kernel.dim == numbers.rhs_spec[1]
        if not met or image.layout[1:] != kernel.layout[1:]:
            return [equation.mixed("convolves rows with one another")]
        return [RowSum(add_degrees(image.degree, kernel.degree, 1))]
    if isinstance(image, PerRow) and isinstance(kernel, Constant):
        if image.dim != numbers.lhs_spec[0] or equation.params["batch_group_count"] != 1:
            return [equation.mixed("convolves along the rows of the batch")]
        degree = add_degrees(image.degree, kernel.degree)
        return [_moved(image, numbers.out_spec[0], degree)]
    if isinstance(image, Constant) and isinstance(kernel, Constant):
        return [Constant(add_degrees(image.degree, kernel.degree))]
    return [equation.mixed("convolves what rows decide with a sum over them, or as a kernel")]


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window")
def _window(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    state, params = states[0], equation.params
    if isinstance(state, PerRow) and params["window_dimensions"][state.dim] != 1:
        return [equation.mixed("goes along the rows")] * len(equation.few.outvars)
    if equation.name == "reduce_window_sum":
        return list(states)
    return _nonlinear(equation, states)


@rule("select_and_scatter_add")
def _select_scatter(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    source, operand, *_ = states
    if isinstance(source, PerRow) and source.dim and equation.params["window_dimensions"][source.dim] != 1:
        return [equation.mixed("goes along the rows")]
    return [_product(equation, [source, operand])] if not first_mixed(states) else [first_mixed(states)]


@rule("random_bits", "random_seed", "random_wrap", "random_unwrap", "random_split")
def _draw(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    """Draws for every row, from one key or from a key of each row."""
    (state,) = states
    if isinstance(state, Mixed | PerRow):
        return [state]
    if isinstance(state, RowSum | Columns):
        return [equation.mixed("draws from what all rows say")]
    grown = equation.out_growing()
    if not grown:
        return [Constant(0)]
    if len(grown) > 1:
        return [equation.mixed("draws something for each pair of rows")]
    size = equation.out_shape()[grown[0]]
    return [PerRow(grown[0], inner=size // equation.n)]


@rule("cholesky", "qr", "eigh", "svd", "lu", "triangular_solve", "householder_product", "eig")
def _matrices(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    """Matrix factorizations: rows may be a dim before the last two."""
    outs = _nonlinear(equation, states)
    for index, state in enumerate(states):
        if isinstance(state, PerRow) and state.dim >= len(equation.shape(index)) - 2:
            return [equation.mixed("factors a matrix whose lines are rows of the batch")] * len(outs)
    return outs


__all__ = ["RULES", "first_mixed", "join", "rule", "unfollowed"]
_ = functools
