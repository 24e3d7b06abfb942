"""Rules for products, convolutions, windows, factorizations and random draws."""

from collections.abc import Sequence
from typing import Any

from ..._core.errors import count
from ..._core.split_rng import is_part_key
from ._equation import Equation, dtype_of
from ._rules import NONLINEAR, elementwise, first_mixed, moved, product, rule
from ._states import AlwaysZero, Columns, Constant, Mixed, PerRow, RowSum, State, add_degrees

_LINES = "factors a matrix whose lines are rows of the batch"


@rule("dot_general")
def _dot(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    if mixed := first_mixed(states):
        return [mixed]
    if any(isinstance(state, AlwaysZero) for state in states):
        return [AlwaysZero()]
    left, right = states
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
    return [moved(state, _output_dim(equation, side, state.dim), degree)]


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
    """Rows are the input's batch dim; in a weight's gradient, the dim that both are summed over."""
    if mixed := first_mixed(states):
        return [mixed]
    if any(isinstance(state, AlwaysZero) for state in states):
        return [AlwaysZero()]
    image, kernel = states
    numbers = equation.params["dimension_numbers"]
    if isinstance(image, PerRow) and isinstance(kernel, PerRow):
        met = image.dim == numbers.lhs_spec[1] and kernel.dim == numbers.rhs_spec[1]
        if not met or image.layout[1:] != kernel.layout[1:]:
            return [equation.mixed("convolves rows with one another")]
        return [RowSum(add_degrees(image.degree, kernel.degree, 1))]
    if equation.growing(1) or {*equation.growing(0)} - {numbers.lhs_spec[0]}:
        return [equation.mixed("convolves along the rows of the batch")]
    if isinstance(image, PerRow) and isinstance(kernel, Constant):
        if image.dim != numbers.lhs_spec[0] or equation.params["batch_group_count"] != 1:
            return [equation.mixed("convolves along the rows of the batch")]
        degree = add_degrees(image.degree, kernel.degree)
        return [moved(image, numbers.out_spec[0], degree)]
    if isinstance(image, Constant) and isinstance(kernel, Constant):
        return [Constant(add_degrees(image.degree, kernel.degree))]
    return [equation.mixed("convolves what rows decide with a sum over them, or as a kernel")]


@rule("reduce_window_sum reduce_window_max reduce_window_min reduce_window")
def _window(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    state = states[0]
    if _goes_along_rows(equation) and not isinstance(state, AlwaysZero | Mixed):
        return [equation.mixed("goes along the rows")] * len(equation.few.outvars)
    if equation.name == "reduce_window_sum":
        return list(states)
    return elementwise(equation, states)


def _goes_along_rows(equation: Equation) -> bool:
    """Whether windows hold several rows, leave some out, or others come between or beside them."""
    names = "window_dimensions window_strides base_dilation window_dilation".split()
    params = equation.params
    return any(
        any(name in params and params[name][dim] != 1 for name in names)
        or any(params["padding"][dim])
        for dim in equation.growing(0)
    )


@rule("select_and_scatter_add")
def _select_scatter(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    source, operand, *_ = states
    if _goes_along_rows(equation):
        return [equation.mixed("goes along the rows")]
    if mixed := first_mixed(states):
        return [mixed]
    return [product(equation, [source, operand])]


@rule("random_bits random_seed random_wrap random_unwrap random_split random_gamma")
def _draw(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    """Draws for every row, from one key or from a key of each row."""
    if any(isinstance(state, RowSum | Columns) for state in states):
        return [equation.mixed("draws from what all rows say")]
    own = is_part_key(dtype_of(equation.few.invars[0]))
    if own and equation.name == "random_unwrap":
        return [equation.mixed("reads the words of the key, which are others in each part")]
    grown = equation.out_growing()
    if len(grown) > 1:
        return [equation.mixed("draws something for each pair of rows")]
    if not grown or first_mixed(states) or isinstance(states[0], PerRow):
        return elementwise(equation, states)
    if not own:
        return [equation.mixed("draws from a key that the loss makes itself, for all rows alike")]
    dim = next(iter(grown))
    inner, rest = divmod(equation.out_shape()[dim], equation.n)
    if rest:  # a draw for two rows, as of times and of what is left of them
        why = f"draws {count(equation.out_shape()[dim], 'number')} for {equation.n} rows"
        return [equation.mixed(why, fix="a draw for each row")]
    # A gamma draw has parameters too.
    return elementwise(equation, [PerRow(dim, inner=inner), *states[1:]])


@rule("triangular_solve")
def _triangular_solve(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    """Linear in its right sides. Rows are these (`solve(L, x.T)`), or whole systems."""
    if mixed := first_mixed(states):
        return [mixed]
    matrix, sides = states
    lines = len(equation.shape(0)) - 2
    unknowns = lines if equation.params["left_side"] else lines + 1
    if isinstance(matrix, RowSum):
        return [equation.mixed(NONLINEAR)]
    if (isinstance(matrix, PerRow) and matrix.dim >= lines) or (
        isinstance(sides, PerRow) and sides.dim == unknowns
    ):
        return [equation.mixed(_LINES)]
    if isinstance(sides, AlwaysZero):
        return [sides]
    if getattr(matrix, "degree", 0) != 0:
        return [equation.mixed("solves by a matrix that depends on how many rows there are")]
    return [product(equation, [Constant() if isinstance(matrix, AlwaysZero) else matrix, sides])]


@rule("cholesky qr eigh svd lu householder_product eig")
def _matrices(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    """Matrix factorizations: rows may be a dim before the last two."""
    outs = elementwise(equation, states)
    for index in range(len(states)):
        if any(dim >= len(equation.shape(index)) - 2 for dim in equation.growing(index)):
            return [equation.mixed(_LINES)] * len(outs)
    return outs
