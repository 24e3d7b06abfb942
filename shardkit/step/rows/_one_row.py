"""Whether a program on one row does what it does on several.

A part of one row has a program that looks otherwise: products squeeze its dim away and bring it
back, look-ups need no number of the row, broadcasts and sums over rows become nothing. So programs
are compared without their rows:

    two rows   f32[2,4] · f32[4,3] → f32[2,3], summed over dim 0     f32[4] · f32[4,3] → f32[3]
    one row    f32[1,4] · f32[4,3] → f32[1,3], squeezed              f32[4] · f32[4,3] → f32[3]

Dims of size 1 are left out as the rows are, and so is an operation that changes no other dim.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core

from ..._core.equations import inlined_program, open_jaxpr, user_line
from ._equation import RowCounts, dtype_of, literal_state, same_operation, shape_of
from ._rules import BY_ELEMENTS
from ._states import Cause, Mixed

_MOVES = frozenset("broadcast_in_dim reshape squeeze expand_dims transpose copy reduce_sum".split())
_OF_MATRICES = frozenset("lu triangular_solve cholesky qr eigh svd householder_product eig".split())
_ALONG = ("dimension", "axis")
_WHY = "does one thing with one row, another with more"
_FIX = "jnp.squeeze(x, axis=...) with its axis, and no choice by len(batch[...]); or more rows"

# Equations, variables or literals that stand for one another: of the program on one row, or of the
# two on more.
Side = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class _Effect:
    """Equations with their operands: numbers of results before them, or literals.

    Attributes:
      calls: the equations that call the functions around it, from the inside out.
    """

    side: Side
    operands: tuple[Any, ...]
    calls: tuple[core.JaxprEqn, ...]

    @property
    def line(self) -> tuple[str, str]:
        """The user's, with its code; JAX's own functions have none inside."""
        lines = map(user_line, (self.side[0], *self.calls))
        return next((line for line in lines if line[0]), ("", ""))


def compare_with_one_row(one: Any, few: Any, many: Any, rows: RowCounts) -> Mixed | None:
    """Says what a program does with one row that it does not do with `rows.few`; None: nothing.

    Args:
      one: the program on one row, closed or not.
      few: that on `rows.few`, in which `many` says which dims are rows.
      many: that on `rows.many`.
      rows: both numbers.
    """
    single, results = _read((one,), rows)
    several, others = _read((few, many), rows)
    for a, b in itertools.zip_longest(single, several):
        if a is None or b is None or not _same_effect(a, b, rows):
            return _differs(a or b)
        of_sides = map(_programs_in, (*a.side, *b.side))
        for program, with_few, with_many in zip(*of_sides, strict=True):
            if compare_with_one_row(program, with_few, with_many, rows):
                return _differs(a)
    same = all(_same_value(a, b, rows) for a, b in zip(results, others, strict=True))
    return None if same else _differs(None)


def _differs(operation: _Effect | None) -> Mixed:
    if operation is None:
        return Mixed(Cause("the program", _WHY, fix=_FIX))
    return Mixed(Cause(operation.side[0].primitive.name, _WHY, *operation.line, fix=_FIX))


def _read(programs: Side, rows: RowCounts) -> tuple[list[_Effect], Sequence[Any]]:
    """Lists the operations that do more than move rows and dims of 1; and what is returned."""
    operations: list[_Effect] = []
    fresh = itertools.count()

    def walk(programs: Side, operands: Sequence[Any] | None, *calls: Any) -> Sequence[Any]:
        opened = [open_jaxpr(program) for program in programs]
        jaxprs = [jaxpr for jaxpr, _ in opened]
        of_consts = list(zip(*(consts for _, consts in opened), strict=False))
        named = jaxprs[0].constvars if of_consts else []
        values = dict(zip(named, of_consts, strict=True))
        rest = [*([] if named else jaxprs[0].constvars), *jaxprs[0].invars]
        values.update(zip(rest, operands or [next(fresh) for _ in rest], strict=True))

        def read(*variables: Any) -> Any:
            literals = [v.val for v in variables if isinstance(v, core.Literal)]
            # What takes something else where there are more rows is found by `_follow`.
            return tuple(literals) if literals else values[variables[0]]

        for side in zip(*(jaxpr.eqns for jaxpr in jaxprs), strict=False):
            inputs = tuple(map(read, *(equation.invars for equation in side)))
            if inlined_program(side[0]) is not None:
                made = walk(tuple(map(inlined_program, side)), inputs, side[0], *calls)
            elif _only_moves(side, rows):
                made = inputs
            else:
                operations.append(_Effect(side, inputs, calls))
                made = [next(fresh) for _ in side[0].outvars]
            values.update(zip(side[0].outvars, made, strict=True))
        return list(map(read, *(jaxpr.outvars for jaxpr in jaxprs)))

    results = walk(programs, None)
    return operations, results


def _programs_in(equation: core.JaxprEqn) -> list[Any]:
    values = (v if isinstance(v, tuple | list) else (v,) for v in equation.params.values())
    kinds = core.Jaxpr | core.ClosedJaxpr
    return [v for v in itertools.chain.from_iterable(values) if isinstance(v, kinds)]


def _same_value(one: Any, several: Any, rows: RowCounts) -> bool:
    if not isinstance(one, tuple) or not isinstance(several, tuple) or len(several) != 2:
        return one == several
    (with_one,), (few, many) = one, several
    known = literal_state(with_one, few, RowCounts(1, rows.few))
    return known == literal_state(few, many, rows)


def _same_effect(one: _Effect, several: _Effect, rows: RowCounts) -> bool:
    (a,), (b, _) = one.side, several.side
    if a.primitive is not b.primitive or len(one.operands) != len(several.operands):
        return False
    operands = zip(one.operands, several.operands, strict=True)
    if not all(_same_value(x, y, rows) for x, y in operands):
        return False
    made = [
        [(dtype_of(v[0]), [*_kept(v, rows).values()]) for v in _results(operation)]
        for operation in (one, several)
    ]
    if made[0] != made[1] or _numbers(one.side, rows) != _numbers(several.side, rows):
        return False
    if inner := len(_programs_in(a)):
        return inner == len(_programs_in(b))
    taken = [[_kept(v, rows) for v in _operands(op.side)] for op in (one, several)]
    dims = [_dims(op.side, rows) for op in (one, several)]
    known = dims[0] is not None and dims[0] == dims[1]
    return known or (taken[0] == taken[1] and same_operation(a, b))


def _operands(side: Side) -> Iterator[Side]:
    return zip(*(equation.invars for equation in side), strict=True)


def _results(operation: _Effect) -> Iterator[Side]:
    return zip(*(equation.outvars for equation in operation.side), strict=True)


def _kept(variables: Side, rows: RowCounts) -> dict[int, int]:
    """Sizes by dim of a value without rows and dims of 1: `{0: 3, 2: 4}` of `[2 · 3, 1, 4]`."""
    sizes = enumerate(zip(*map(shape_of, variables), strict=True))
    without = {dim: _without_rows(size, rows) for dim, size in sizes}
    return {dim: size for dim, size in without.items() if size != 1}


def _without_rows(size: Side, rows: RowCounts) -> int:
    one, *more = size
    if more in ([], [one]):
        return one
    times, rest = divmod(one, rows.few)
    return times if not rest and more == [times * rows.many] else -one


def _numbers(side: Side, rows: RowCounts) -> dict[str, Any]:
    params = {k: v for k, v in side[0].params.items() if k not in _ALONG}
    found = {k: v for k, v in params.items() if isinstance(v, int | float | str)}
    if "length" in found:
        found["length"] = _without_rows(tuple(e.params["length"] for e in side), rows)
    return found


def _only_moves(side: Side, rows: RowCounts) -> bool:
    """Whether the dims that are kept are the same after an equation, in the same order."""
    if side[0].primitive.name not in _MOVES:
        return False
    before = _kept(tuple(e.invars[0] for e in side), rows)
    after = _kept(tuple(e.outvars[0] for e in side), rows)
    order = _dims(side, rows) if side[0].primitive.name == "transpose" else ()
    assert order is not None
    return [*before.values()] == [*after.values()] and [*order] == sorted(order)


def _dims(side: Side, rows: RowCounts) -> tuple[Any, ...] | None:
    """What an operation does with the dims that are kept, by their order; None: not known."""
    equation = side[0]
    params, name = equation.params, equation.primitive.name
    kept = [_kept(variables, rows) for variables in _operands(side)]
    order = [dict(zip(dims, itertools.count(), strict=False)) for dims in kept]
    # A callback for its effect alone has no result.
    of_result = _kept(tuple(e.outvars[0] for e in side), rows) if equation.outvars else ()
    out = dict(zip(of_result, itertools.count(), strict=False))

    def found(dims: Sequence[int], among: dict[int, int]) -> tuple[int, ...]:
        return tuple(among[dim] for dim in dims if dim in among)

    match name:
        case "dot_general":
            pairs = [[*zip(*dims, strict=True)] for dims in params["dimension_numbers"]]
            return tuple(
                tuple((order[0].get(i), order[1].get(j)) for i, j in dims if i in order[0])
                for dims in pairs
            )
        case "transpose":
            return found(params["permutation"], order[0])
        case "broadcast_in_dim":
            return found([params["broadcast_dimensions"][d] for d in order[0]], out)
        case "reshape" | "squeeze" | "expand_dims":
            return ()
    if "axes" in params and name.startswith(("reduce_", "arg")):
        return found(params["axes"], order[0])
    if along := [params[k] for k in _ALONG if k in params]:
        return found(along, order[0] if order else out)
    if name in _OF_MATRICES:
        ranks = [len(shape_of(v)) for v in equation.invars]
        return tuple((d.get(n - 2), d.get(n - 1)) for d, n in zip(order, ranks, strict=True))
    if name == "gather" or name.startswith("scatter"):
        return _places(equation, order, out)
    return () if name in BY_ELEMENTS else None


def _places(equation: core.JaxprEqn, order: Any, out: dict[int, int]) -> tuple[Any, ...]:
    """Which dim of the operand each index moves along, and where those that it leaves are."""
    numbers, shape = equation.params["dimension_numbers"], shape_of(equation.invars[0])
    if equation.primitive.name == "gather":
        columns, gone, sizes = (
            numbers.start_index_map,
            numbers.collapsed_slice_dims,
            equation.params["slice_sizes"],
        )
        shared, window, among = numbers.start_indices_batching_dims, numbers.offset_dims, out
    else:
        columns, gone, sizes = (
            numbers.scatter_dims_to_operand_dims,
            numbers.inserted_window_dims,
            shape,
        )
        shared, window, among = (
            numbers.scatter_indices_batching_dims,
            numbers.update_window_dims,
            order[2],
        )
    batched = dict(zip(numbers.operand_batching_dims, shared, strict=True))

    def place(dim: int) -> tuple[Any, ...]:
        column = columns.index(dim) if dim in columns else None
        taken = None if sizes[dim] == shape[dim] else sizes[dim]
        return order[1].get(batched.get(dim)), column, dim in gone, taken

    return (*map(place, order[0]), *(among[dim] for dim in window if dim in among))
