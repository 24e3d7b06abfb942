"""Rules for operations that work on elements, and what all rules share.

A rule takes an `Equation` and the states of its operands, and returns those of its results.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

from ._equation import Equation, dtype_of, shape_of
from ._states import (
    AlwaysZero,
    Columns,
    Constant,
    Degree,
    Mixed,
    PerRow,
    RowSum,
    State,
    add_degrees,
    same_degree,
)

Rule = Callable[[Equation, Sequence[State]], Sequence[State]]
RULES: dict[str, Rule] = {}

TOGETHER = "combines each row with other ones"
COUNTED = "is decided by how many rows there are"
PICKS = "picks rows by their place in the batch"
NONLINEAR = "is not linear in a sum over rows"
_WEIGHTED = "sk.Mean(total, weight) with the sums as they are"
_GUARDS = frozenset("max clamp gt ge lt le eq ne".split())
BY_ROW = (
    "jax.vmap(f)(rows), or jax.lax.map(f, rows) without batch_size, if f needs one row at a time"
)


# What knows that rows have their own numbers, and lists of indices; see `PerRow.role`, `Columns`.
KEEPS_PLACES = frozenset(
    "gather scatter scatter-add scatter-sub scatter-mul scatter-min scatter-max concatenate add lt "
    "gt select_n convert_element_type copy device_put stop_gradient optimization_barrier "
    "sharding_constraint reshard pvary name broadcast_in_dim reshape squeeze transpose slice iota "
    "dynamic_slice dynamic_update_slice shardkit_record shardkit_constrain "
    "shardkit_without_gradient".split()
)


def rule(names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for the primitives of these names, in one string."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def unfollowed(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    """Of an operation that no rule is for: constants stay constant, anything else is refused."""
    outs = len(equation.few.outvars)
    if mixed := first_mixed(states):
        return [mixed] * outs
    if all(isinstance(state, Constant | AlwaysZero) for state in states):
        return [_made_of_constants(equation, states, i) for i in range(outs)]
    return [equation.mixed("does something with rows that cannot be followed")] * outs


def _made_of_constants(equation: Equation, states: Sequence[State], index: int) -> State:
    degrees = {state.degree for state in states if isinstance(state, Constant)}
    if not equation.out_growing(index):
        return Constant(0 if degrees <= {0} else None)
    # It may differ from row to row, as an `iota` does.
    return equation.mixed("makes something for each row out of its place in the batch")


def first_mixed(states: Sequence[State]) -> Mixed | None:
    """The first operand whose rows are mixed already; rather a ratio, whose fix is known."""
    mixed = [state for state in states if isinstance(state, Mixed)]
    return min(mixed, key=lambda state: not state.cause.ratio, default=None)


def join(equation: Equation, states: Sequence[State]) -> State:
    """What a value is that is one of several, or their sum: all must scale alike."""
    if mixed := first_mixed(states):
        return mixed
    states = [state for state in states if not isinstance(state, AlwaysZero | Mixed)]
    if not states:
        return AlwaysZero()
    if any(isinstance(state, Columns) for state in states):
        return states[0] if len(set(states)) == 1 else equation.mixed(PICKS)
    rows = [state for state in states if isinstance(state, PerRow)]
    sums = [state for state in states if isinstance(state, RowSum)]
    degree = same_degree(*(state.degree for state in states if not isinstance(state, Columns)))
    if rows and sums:
        return equation.mixed("uses a sum over rows beside single rows")
    if sums and degree is None:
        why = "adds sums over rows to something that does not grow with them"
        fix = "means of rows, jnp.mean(...), in place of sums"
        return equation.mixed(why, fix=fix, guard=len(sums) == 1)
    if sums:
        return RowSum(degree)
    if not rows:
        return Constant(degree)
    if len({state.layout for state in rows}) > 1:
        return equation.mixed(TOGETHER)
    roles = {state.role for state in states if isinstance(state, PerRow)}
    if len(roles) > 1 or (roles != {"values"} and len(rows) < len(states)):
        return equation.mixed(PICKS)
    first = rows[0]
    return PerRow(first.dim, first.outer, first.inner, degree, first.role)


@rule("add sub add_any complex or select_and_gather_add")
def _add(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    placed = [state for state in states if isinstance(state, PerRow) and state.role != "values"]
    if placed and not first_mixed(states):
        if len(placed) == 1 and all(isinstance(s, Constant | AlwaysZero | PerRow) for s in states):
            return [PerRow(*placed[0].layout, None, "shifted")]
        return [equation.mixed(PICKS)]
    if equation.name == "or" and not first_mixed(states):
        return elementwise(equation, states)
    return [join(equation, states)]


@rule("mul")
def _mul(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    if mixed := first_mixed(states):
        return [mixed]
    if any(isinstance(state, AlwaysZero) for state in states):
        return [AlwaysZero()]
    return [product(equation, states)]


def product(equation: Equation, states: Sequence[State]) -> State:
    rows = [state for state in states if isinstance(state, PerRow)]
    sums = [state for state in states if isinstance(state, RowSum)]
    degree = add_degrees(
        *(s.degree for s in states if not isinstance(s, AlwaysZero | Mixed | Columns))
    )
    if sums and rows:
        return equation.mixed("multiplies single rows with a sum over rows")
    if len(sums) > 1:
        return equation.mixed("multiplies two sums over rows")
    if sums:
        return RowSum(degree)
    if not rows:
        return Constant(degree)
    if len({state.layout for state in rows}) > 1:
        return equation.mixed(TOGETHER)
    return PerRow(*rows[0].layout, degree)


@rule("div")
def _div(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    top, bottom = states
    if isinstance(top, RowSum) and isinstance(bottom, Mixed) and bottom.cause.guard:
        return [equation.mixed("divides by a sum over rows", ratio=True, guard=True)]
    if mixed := first_mixed(states):
        return [mixed]
    if dtype_of(equation.few.invars[0]).kind in "iu":  # it rounds
        return elementwise(equation, states)
    if isinstance(bottom, RowSum):
        fix = f"{_WEIGHTED}, where a weighted mean is meant"
        return [
            equation.mixed("divides by a sum over rows", ratio=isinstance(top, RowSum), fix=fix)
        ]
    if isinstance(top, AlwaysZero):
        return [AlwaysZero()]
    if isinstance(bottom, AlwaysZero):
        bottom = Constant(0)
    inverse = _negated(bottom)
    return [product(equation, [top, inverse])]


def _negated(state: State) -> State:
    if isinstance(state, Constant):
        return Constant(None if state.degree is None else -state.degree)
    assert isinstance(state, PerRow)
    return PerRow(*state.layout, None if state.degree is None else -state.degree)


@rule("square integer_pow")
def _power(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    power = equation.params.get("y", 2)
    (state,) = states
    if isinstance(state, Mixed | AlwaysZero) or power == 1:
        return [state]
    if isinstance(state, RowSum | Columns):
        return [equation.mixed(NONLINEAR)]
    degree = None if state.degree is None else state.degree * power
    return [Constant(degree) if isinstance(state, Constant) else PerRow(*state.layout, degree)]


_SAME = (
    "neg real imag copy device_put stop_gradient optimization_barrier reduce_precision "
    "sharding_constraint reshard convert_element_type conj pvary "
    "name shardkit_constrain shardkit_record shardkit_use_param shardkit_without_gradient"
)


@rule(_SAME)
def _same(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    if equation.name == "convert_element_type" and not _is_linear_cast(equation):
        return elementwise(equation, states, keep_places=True)
    return list(states)


def _is_linear_cast(equation: Equation) -> bool:
    """A cast to an integer or a bool is a step; one between floats is taken as exact."""
    kinds = [dtype_of(v).kind for v in (equation.few.invars[0], equation.few.outvars[0])]
    return kinds[1] in "fcV" or kinds[0] == kinds[1] or (kinds[0] in "iub" and kinds[1] in "iu")


@rule("select_n")
def _select(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    if mixed := first_mixed(states):
        return [mixed]
    which, *cases = states
    if isinstance(which, RowSum | Columns):
        return [equation.mixed("chooses by a sum over rows")]
    if isinstance(which, AlwaysZero) or (isinstance(which, PerRow) and which.role == "test"):
        return [cases[0]]  # it is false of all rows
    if follows_count(which):
        return [equation.mixed(COUNTED)]
    out = join(equation, cases)
    if not isinstance(which, PerRow) or isinstance(out, Mixed):
        return [out]
    if which.role != "values":
        return [equation.mixed(PICKS)]
    if isinstance(out, RowSum):
        return [equation.mixed("puts a sum over rows into single rows")]
    if isinstance(out, PerRow):
        return [out if out.layout == which.layout else equation.mixed(TOGETHER)]
    degree = out.degree if isinstance(out, Constant) else 0
    return [AlwaysZero() if isinstance(out, AlwaysZero) else PerRow(*which.layout, degree)]


# `over_parts` traces with two parts of the batch, and on twice the rows with eight: what is
# proportional to the number of parts grows as the square of the rows.
PARTS, PARTS_DEGREE = 2, 2
# What gradients are scaled by to be followed: no number of rows in a loss grows like this.
SCALE_DEGREE = 64


@rule("psum")
def _sum_over_parts(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    """A sum over rows becomes one over all rows of the batch, which no split changes."""

    def summed(state: State) -> State:
        if isinstance(state, PerRow | Columns):
            return equation.mixed(TOGETHER)
        if isinstance(state, AlwaysZero | Mixed):
            return state
        return Constant(add_degrees(state.degree, PARTS_DEGREE))

    return [summed(state) for state in states]


@rule("axis_index")
def _axis_index(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    return [equation.mixed("is the place of a device, which decides nothing on one device")]


_ELEMENTWISE = (
    "abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp "
    "cos cosh digamma eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a "
    "igammac is_finite le lgamma log log1p logistic lt max min ne nextafter not polygamma "
    "population_count pow regularized_incomplete_beta rem round rsqrt "
    "shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt tan tanh xor zeta "
    "threefry2x32 bitcast_convert_type random_fold_in random_clone eq_to lt_to le_to clz "
    "to_edtype from_edtype one_minus_square log2 mulhi"
)


BY_ELEMENTS = frozenset(
    f"{_ELEMENTWISE} {_SAME} add sub add_any complex or mul div square integer_pow select_n".split()
)


def is_elementwise(eqn: core.JaxprEqn) -> bool:
    """Whether each element of an equation's results depends on the operands at its own place."""
    inner = list(core.jaxprs_in_params(eqn.params))
    if inner:
        plain = eqn.primitive.name not in ("scan", "while", "cond")
        return plain and all(is_elementwise(one) for jaxpr in inner for one in jaxpr.eqns)
    if eqn.primitive.name == "broadcast_in_dim":
        return shape_of(eqn.invars[0]) == ()
    return eqn.primitive.name in BY_ELEMENTS


@rule(_ELEMENTWISE)
def _elementwise(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    return elementwise(equation, states)


def elementwise(
    equation: Equation, states: Sequence[State], keep_places: bool = False
) -> Sequence[State]:
    """Any function of elements at one place: right for single rows, wrong for sums over them."""
    outs = len(equation.few.outvars)
    if mixed := first_mixed(states):
        return [mixed] * outs
    if any(isinstance(state, RowSum) for state in states):
        guard = equation.name in _GUARDS and not any(isinstance(s, PerRow) for s in states)
        fix = f"{_WEIGHTED}, if it guards a division: the mean is 0 where the weight is 0"
        return [equation.mixed(NONLINEAR, guard=guard, fix=fix if guard else "")] * outs
    rows = [state for state in states if isinstance(state, PerRow)]
    if any(isinstance(state, Columns) for state in states):
        return [equation.mixed(PICKS)] * outs
    placed = [state for state in rows if state.role != "values"]
    if placed:
        if keep_places and len(states) == 1:
            return [placed[0]] * outs
        if len(rows) == 1 and placed[0].role == "index" and _holds_for_all(equation, states):
            return [PerRow(*placed[0].layout, 0, "test")]
        return [equation.mixed(PICKS)] * outs
    degree = _scaled(equation.name, {s.degree for s in states if isinstance(s, PerRow | Constant)})
    if not rows:
        return [Constant(degree)] * outs
    if len({state.layout for state in rows}) > 1:
        return [equation.mixed(TOGETHER)] * outs
    if degree is None:
        why = "makes each row's part depend on how many rows there are"
        if any(s.degree is not None and abs(s.degree) > SCALE_DEGREE // 2 for s in rows):
            why = "is not linear in the gradient, whose size depends on how many rows there are"
        return [equation.mixed(why)] * outs
    return [PerRow(*rows[0].layout, degree)] * outs


_LIKE_OPERANDS = frozenset("abs max min clamp rem reduce_max reduce_min cummax cummin sort".split())
_OF_DIRECTION = frozenset("sign eq ne lt le gt ge atan2 is_finite argmax argmin".split())
_ROOTS = {"sqrt": 2, "rsqrt": -2, "cbrt": 3}


def _scaled(name: str, degrees: set[Degree]) -> Degree:
    """The degree of a function of what has these: all are multiplied by one positive number.

    >>> _scaled("max", {2}), _scaled("gt", {2}), _scaled("sqrt", {2}), _scaled("exp", {2})
    (2, 0, 1, None)
    """
    if degrees <= {0}:
        return 0
    degree = degrees.pop() if len(degrees) == 1 else None
    if degree is None or name in _OF_DIRECTION:
        return None if degree is None else 0
    root, rest = divmod(degree, _ROOTS.get(name, 1))
    return root if not rest and (name in _LIKE_OPERANDS or name in _ROOTS) else None


def _holds_for_all(equation: Equation, states: Sequence[State]) -> bool:
    """Whether a row's number is asked whether it is negative, as jnp's indexing does: none is."""
    name = "lt" if isinstance(states[0], PerRow) else "gt"
    return equation.name == name and any(isinstance(state, AlwaysZero) for state in states)


def is_place(state: State) -> bool:
    """Whether it is a row's own number, or a list of indices: no data of rows."""
    return isinstance(state, Columns) or (isinstance(state, PerRow) and state.role != "values")


def follows_count(state: State) -> bool:
    """Whether an index or a condition depends on how many rows there are."""
    return isinstance(state, Constant | PerRow) and state.degree != 0


def moved(state: PerRow, dim: int, degree: Any = "same") -> PerRow:
    """Returns the same rows in another dim; `degree` where it changes too."""
    power = state.degree if degree == "same" else degree
    return PerRow(dim, state.outer, state.inner, power, state.role)
