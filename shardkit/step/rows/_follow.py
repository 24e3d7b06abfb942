"""Follows the rows of a batch through a traced function."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

from ..._core.equations import count_scan_operands, user_line
from ..._core.tracing import equations
from . import _indexing, _products, _shapes  # noqa: F401  they register their rules
from ._equation import Equation, RowCounts, literal_state, same_operation
from ._row_loops import without_turns
from ._rules import (
    BY_ROW,
    COUNTED,
    KEEPS_PLACES,
    PICKS,
    RULES,
    first_mixed,
    follows_count,
    is_place,
    join,
    unfollowed,
)
from ._states import AlwaysZero, Cause, Constant, Mixed, PerRow, RowSum, State

# The order of products is chosen by their sizes.
_ONE_ORDER = "jnp.einsum(..., optimize=[(0, 1), (0, 1)]), one order of its products for any sizes"
# Their results are as large as the axis that they name.
_COLLECTIVES = frozenset("all_gather all_to_all reduce_scatter ppermute".split())
_SUMS = "jax.lax.psum or pmean of sums over rows, which can be followed"
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# Beside those with a rule: what JAX derives from the operations inside of them.
_DERIVED_BY_JAX = frozenset({"scan", "while", "cond", "jit", "pjit", "checkpoint", "remat2"})


def follow_rows(
    few: core.ClosedJaxpr, many: core.ClosedJaxpr, inputs: Sequence[State], rows: RowCounts
) -> list[State]:
    """Says what each result of a function has to do with the rows of its batch.

    Args:
      few: the function, traced on a batch of `rows.few` rows.
      many: the same, traced on `rows.many`.
      inputs: state of each argument: `Constant()`, or `PerRow(dim)` of a batch leaf.
      rows: both numbers.

    Returns:
      One state for each result.
    """
    consts = (
        [literal_state(a, b, rows) for a, b in zip(few.consts, many.consts, strict=True)]
        if len(few.consts) == len(many.consts)
        else None
    )
    if consts is None:
        return [_changed(few.jaxpr, many.jaxpr, rows)] * len(few.jaxpr.outvars)
    return _follow(few.jaxpr, many.jaxpr, [*consts, *inputs], rows)


def has_own_derivatives(program: core.Jaxpr) -> bool:
    """Whether anything but JAX's rules for single operations decides a derivative of a program.

    >>> import jax
    >>> plain, own = (jax.make_jaxpr(f)(1.0).jaxpr for f in (jax.nn.silu, jax.nn.relu))
    >>> has_own_derivatives(plain), has_own_derivatives(own)
    (False, True)
    """
    names = {equation.primitive.name for equation in equations(program)}
    return not names <= RULES.keys() | _DERIVED_BY_JAX


def _changed(few: core.Jaxpr, many: core.Jaxpr, rows: RowCounts) -> Mixed:
    """Of programs with other operations, or constants of other sizes."""
    why = f"changes with the number of rows in more than its sizes, from {rows.few} to {rows.many}"
    for one, other in itertools.zip_longest(few.eqns, many.eqns):
        if one is None or other is None or not same_operation(one, other):
            names = [e.primitive.name for e in (one, other) if e]
            why += f", first in {' or '.join(names)}"
            where, code = user_line(other or one)
            fix = BY_ROW if "einsum(" not in code else _ONE_ORDER
            fix = fix if _COLLECTIVES.isdisjoint(names) else _SUMS
            return Mixed(Cause("the program", why, where, code, fix=fix))
    return Mixed(Cause("the program", why, fix=BY_ROW))


def _follow(few: Any, many: Any, inputs: Sequence[State], rows: RowCounts) -> list[State]:
    states: dict[Any, State] = {}
    states.update(zip([*few.constvars, *few.invars], inputs, strict=True))
    # The variable of the trace on more rows that stands for each one of that on fewer.
    same = dict(zip([*few.constvars, *few.invars], [*many.constvars, *many.invars], strict=False))

    def read(a: Any, b: Any, user: Any = None) -> State:
        if isinstance(a, core.Literal) and isinstance(b, core.Literal):
            return literal_state(a.val, b.val, rows)
        if isinstance(a, core.Literal) or same[a] is not b:
            why = f"takes something else where there are {rows.many} rows"
            return Mixed(Cause(user.primitive.name if user else "the result", why))
        return states[a]

    if len(few.eqns) != len(many.eqns):
        return [_changed(few, many, rows)] * len(few.outvars)
    for one, other in zip(few.eqns, many.eqns, strict=True):
        if not same_operation(one, other):
            return [_changed(few, many, rows)] * len(few.outvars)
        equation = Equation(one, other, rows)
        pairs = zip(one.invars, other.invars, strict=True)
        # What is mixed without a line, as a constant is, gets that of its first use.
        operands = [equation.placed(read(a, b, one)) for a, b in pairs]
        results = _follow_equation(equation, operands)
        states.update(zip(one.outvars, results, strict=True))
        same.update(zip(one.outvars, other.outvars, strict=True))
    return [read(a, b) for a, b in zip(few.outvars, many.outvars, strict=True)]


def _follow_equation(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    special: dict[str, Callable[..., Sequence[State]]] = {
        "scan": _scan,
        "while": _while,
        "cond": _cond,
        "custom_linear_solve": _linear_solve,
    }
    if equation.name in special:
        results = special[equation.name](equation, states)
        return [equation.placed(state) for state in results]
    if equation.name in RULES:
        return _by_rule(equation, states)
    for name in _INNER:
        if name in equation.params and _has_all_rows(equation):
            few, many = (_body(e.params[name]) for e in (equation.few, equation.many))
            if len(few[0].outvars) != len(equation.few.outvars):
                continue  # a kernel, which writes to references
            results = _follow_pair(few, many, states, equation.rows)
            return [equation.placed(state) for state in results]
    return unfollowed(equation, states)


def _by_rule(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    """What both traces say: in one of 4 rows `x.reshape(-1, 4)` and `x[:4]` leave rows whole."""
    if equation.name not in KEEPS_PLACES and any(map(is_place, states)):
        return [first_mixed(states) or equation.mixed(PICKS, fix=BY_ROW)] * len(
            equation.few.outvars
        )
    of_rule = RULES[equation.name]
    pairs = zip(of_rule(equation, states), of_rule(equation.turned(), states), strict=True)
    differs = equation.mixed(f"does one thing with {equation.rows.few} rows, another with more")
    return [
        few
        if few == many or isinstance(few, Mixed)
        else many
        if isinstance(many, Mixed)
        else differs
        for few, many in pairs
    ]


def _has_all_rows(equation: Equation) -> bool:
    """Whether a function inside is called on whole arrays, not on parts of them."""
    return not any(any(spec) for spec in equation.params.get("in_specs", ()))


def _follow_pair(few: Any, many: Any, states: Sequence[State], rows: RowCounts) -> list[State]:
    (few, few_consts), (many, many_consts) = few, many
    if len(few_consts) != len(many_consts):
        return [_changed(few, many, rows)] * len(few.outvars)
    consts = [literal_state(a, b, rows) for a, b in zip(few_consts, many_consts, strict=True)]
    return _follow(few, many, [*consts, *states], rows)


def _body(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())


def _scan(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    params = equation.params
    outs = len(equation.few.outvars)
    if params["length"] != equation.many.params["length"]:
        few, many = (without_turns(scan) for scan in (equation.few, equation.many))
        why = "loops over the rows of the batch, each after another"
        mixed = equation.mixed(why, fix=BY_ROW)
        if few is None or many is None or few.places != many.places:
            return [mixed] * outs
        programs = _body(few.program), _body(many.program)
        results = _follow_pair(*programs, states, equation.rows)
        if not few.turns_apart(results[outs:]):
            return [mixed] * outs
        # The numbers of the turns are an `iota` of the program that stands for the loop alone.
        return [mixed if _is_counted(state) else state for state in results[:outs]]
    consts, carried = count_scan_operands(equation.few)
    fixed, carry = list(states[:consts]), list(states[consts : consts + carried])
    slices = [_at(s, -1) for s in states[consts + carried :]]
    if any(isinstance(s, PerRow) and s.dim < 0 for s in slices):
        return [equation.mixed("loops over the rows of the batch")] * outs
    few, many = (_body(e.params["jaxpr"]) for e in (equation.few, equation.many))

    def body(carry: Sequence[State]) -> tuple[list[State], list[State]]:
        results = _follow_pair(few, many, [*fixed, *carry, *slices], equation.rows)
        return results[:carried], results[carried:]

    carry, ys = _fixpoint(equation, body, carry)
    return [*carry, *(_at(y, 1) for y in ys)]


def _is_counted(state: State) -> bool:
    return isinstance(state, Mixed) and state.cause.operation == "iota"


def _at(state: State, by: int) -> State:
    """A state with its dims moved: a scan takes slices along dim 0, and stacks them again."""
    if isinstance(state, PerRow):
        return PerRow(state.dim + by, state.outer, state.inner, state.degree, state.role)
    return state


def _fixpoint(equation: Equation, body: Callable[..., Any], carry: list[State]) -> tuple[Any, Any]:
    """What a carry is after any number of turns: states only get worse, so this ends."""
    while True:
        after, ys = body(carry)
        joined = [join(equation, pair) for pair in zip(carry, after, strict=True)]
        if joined == carry or all(isinstance(state, Mixed) for state in joined):
            return joined, ys
        # A mixed carry keeps the cause that it got first.
        carry = [
            old if isinstance(old, Mixed) else new for old, new in zip(carry, joined, strict=True)
        ]


def _while(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    params = equation.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    for_cond, for_body = states[:n_cond], states[n_cond : n_cond + n_body]

    def follow(part: str, operands: list[State]) -> list[State]:
        few, many = (_body(e.params[part]) for e in (equation.few, equation.many))
        return _follow_pair(few, many, operands, equation.rows)

    def body(carry: Sequence[State]) -> tuple[list[State], None]:
        after = follow("body_jaxpr", [*for_body, *carry])
        (ends,) = follow("cond_jaxpr", [*for_cond, *carry])
        if not isinstance(ends, PerRow):
            return after, None
        # A loop under `vmap` asks each row whether it goes on: `where(ends, after, carry)`.
        pairs = zip(carry, after, strict=True)
        return [RULES["select_n"](equation, [ends, *pair])[0] for pair in pairs], None

    carry, _ = _fixpoint(equation, body, list(states[n_cond + n_body :]))
    (ends,) = follow("cond_jaxpr", [*for_cond, *carry])
    if follows_count(ends):
        return [equation.mixed(COUNTED)] * len(carry)
    if isinstance(ends, Constant | AlwaysZero | PerRow):
        return carry
    together = equation.mixed("ends when rows say so, all of them together")
    return [first_mixed(states) or together] * len(carry)


def _linear_solve(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    """What its `solve` makes of the right side; the other functions are for its derivative."""
    lengths = equation.params["const_lengths"]
    before = (lengths.matvec or 0) + (lengths.vecmat or 0)
    consts = states[before : before + lengths.solve]
    right = states[sum(filter(None, lengths)) :]
    few, many = (_body(e.params["jaxprs"].solve) for e in (equation.few, equation.many))
    return _follow_pair(few, many, [*consts, *right], equation.rows)


def _cond(equation: Equation, states: Sequence[State]) -> Sequence[State]:
    which, *operands = states
    few, many = (e.params["branches"] for e in (equation.few, equation.many))
    if len(few) != len(many):
        return [equation.mixed("has a branch for each row")] * len(equation.few.outvars)
    pairs = zip(few, many, strict=True)
    results = [_follow_pair(_body(a), _body(b), operands, equation.rows) for a, b in pairs]
    if follows_count(which):
        return [equation.mixed(COUNTED)] * len(results[0])
    if not isinstance(which, Constant | AlwaysZero):
        return [equation.mixed("takes a branch by what rows say together")] * len(results[0])
    return [join(equation, outs) for outs in zip(*results, strict=True)]


__all__ = ["RowSum", "first_mixed", "follow_rows"]
