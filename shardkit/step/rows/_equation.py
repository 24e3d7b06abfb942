"""One equation of a program, seen with two numbers of rows at once."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.extend import core

from ..._core.equations import user_line
from ._states import AlwaysZero, Cause, Constant, Degree, Mixed, PerRow, State


class RowCounts(NamedTuple):
    """Numbers of rows of the two traces that are compared: at least 2 each, and not equal."""

    few: int
    many: int

    def degree(self, few: Any, many: Any) -> Degree:
        """How a number of the program, or an array of them, grows with the rows.

        >>> rows = RowCounts(8, 16)
        >>> rows.degree(8.0, 16.0), rows.degree([0.125], [0.0625]), rows.degree(3, 3)
        (1, -1, 0)
        >>> rows.degree(True, False) is None
        True
        """
        few, many = np.asarray(few), np.asarray(many)
        if few.tobytes() == many.tobytes():
            return 0
        if few.dtype.kind == "b":
            return None
        few, many = few.astype(complex), many.astype(complex)
        growth = self.many / self.few
        powers = (d for d in (1, -1, 2, -2) if np.allclose(few * growth**d, many, 1e-6, 0))
        return next(powers, None)


def literal_state(few: Any, many: Any, rows: RowCounts) -> State:
    """What a number or array of the program is, from its values on fewer and on more rows."""
    is_key = jax.numpy.issubdtype(jax.numpy.result_type(few), jax.dtypes.prng_key)
    if jax.numpy.shape(few) != jax.numpy.shape(many):
        if is_key:
            few, many = jax.random.key_data(few), jax.random.key_data(many)
        return _grown_constant(few, many, rows)
    if few is many:  # closed over: perhaps a table on many devices
        known = not (is_key or jax.numpy.shape(few) or isinstance(few, Tracer))
        return AlwaysZero() if known and few == 0 else Constant()
    if is_key:
        few, many = jax.random.key_data(few), jax.random.key_data(many)
    degree = rows.degree(few, many)
    zero = degree == 0 and jax.numpy.shape(few) == () and few == 0
    return AlwaysZero() if zero else Constant(degree)


def _grown_constant(few: Any, many: Any, rows: RowCounts) -> State:
    """An array that has more entries where there are more rows, as numpy makes it.

    >>> _grown_constant(np.ones((2, 3)), np.ones((4, 3)), RowCounts(2, 4))
    Constant(degree=0)
    >>> _grown_constant(np.arange(2)[:, None], np.arange(4)[:, None], RowCounts(2, 4))
    PerRow(dim=0, outer=1, inner=1, degree=0, role='index')
    """
    if jax.numpy.ndim(few) == jax.numpy.ndim(many) and not isinstance(few, Tracer):
        dim = next(dim for dim, n in enumerate(few.shape) if n != many.shape[dim])
        few, many = (np.moveaxis(np.asarray(x), dim, -1) for x in (few, many))
        if not few.any() and not many.any():
            return AlwaysZero()
        if all(x.size and (x == x[..., :1]).all() for x in (few, many)):
            return literal_state(few[..., 0], many[..., 0], rows)
        layout = _own_numbers(few, many, rows)
        if layout is not None and few.dtype.kind in "iu":
            return PerRow(dim, *layout, role="index")
    return Mixed(Cause("a constant", "has a size of its own for every number of rows"))


def _own_numbers(few: np.ndarray, many: np.ndarray, rows: RowCounts) -> tuple[int, int] | None:
    """How often all numbers of rows follow one another along the last dim, and each one alone.

    >>> _own_numbers(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1, 2, 2]), RowCounts(2, 3))
    (1, 2)
    """
    inner = max(int((many.reshape(-1, many.shape[-1])[0] != 0).argmax()), 1)
    outer = many.shape[-1] // (rows.many * inner)
    for x, n in zip((few, many), rows, strict=True):
        own = np.tile(np.repeat(np.arange(n), inner), outer)
        if own.size != x.shape[-1] or (x != own).any():
            return None
    return outer, inner


@dataclasses.dataclass(frozen=True)
class Equation:
    """The same equation in two traces, on fewer and on more rows.

    Which dims hold rows, and which numbers count them, is what differs between the two: in
    `jnp.mean(x)` of `f32[8]` the literal 8.0 is 16.0 in the trace on twice as many.

    Attributes:
      few: the equation in the trace on fewer rows.
      many: in the other one.
      rows: how many these are.
    """

    few: core.JaxprEqn
    many: core.JaxprEqn
    rows: RowCounts

    def turned(self) -> "Equation":
        """The same with the two traces in each other's place."""
        return Equation(self.many, self.few, RowCounts(self.rows.many, self.rows.few))

    @property
    def n(self) -> int:
        """Rows of the trace on fewer."""
        return self.rows.few

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.few.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """Its parameters, in the trace on fewer rows."""
        return self.few.params

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of an operand, on fewer rows."""
        return shape_of(self.few.invars[index])

    def out_shape(self, index: int = 0) -> tuple[int, ...]:
        """Shape of a result, on fewer rows."""
        return shape_of(self.few.outvars[index])

    def growing(self, index: int) -> tuple[int, ...]:
        """Dims of an operand whose size follows the number of rows."""
        return _differing(self.few.invars[index], self.many.invars[index])

    def out_growing(self, index: int = 0) -> tuple[int, ...]:
        """Dims of a result whose size follows the number of rows."""
        return _differing(self.few.outvars[index], self.many.outvars[index])

    def mixed(self, why: str, **hints: Any) -> Mixed:
        """The state of what mixes rows here, with the user's line; `hints`: fields of `Cause`."""
        return Mixed(Cause(self.name, why, *user_line(self.few), **hints))

    def placed(self, state: State) -> State:
        """A result of a function that is called here: a cause of JAX's own gets this line."""
        if not isinstance(state, Mixed) or state.cause.where:
            return state
        where, code = user_line(self.few)
        return Mixed(dataclasses.replace(state.cause, where=where, code=code))

    def grown(self, state: PerRow, shape: tuple[int, ...]) -> int:
        """Elements that a dim with rows has in all: `outer · n · inner`."""
        assert shape[state.dim] == state.outer * self.n * state.inner
        return shape[state.dim]


# Parameters that say what an operation does; others may follow the sizes of its operands.
_DIMS = ("axes", "dimensions", "permutation", "broadcast_dimensions", "dimension_numbers")
_SIZES = ("length", "unroll", "feature_group_count", "batch_group_count")
# These have an entry for each dim of an operand, which may follow the size of that dim alone.
_BY_DIM = (
    "start_indices limit_indices strides slice_sizes padding_config window_dimensions "
    "window_strides padding base_dilation window_dilation lhs_dilation rhs_dilation reps"
).split()


def same_operation(few: core.JaxprEqn, many: core.JaxprEqn) -> bool:
    """Whether two equations do the same, each with its own number of rows."""

    def what(eqn: core.JaxprEqn) -> dict[str, Any]:
        scalars = {k: v for k, v in eqn.params.items() if isinstance(v, int | float | str)}
        return {k: eqn.params.get(k) for k in (*scalars, *_DIMS) if k not in _SIZES}

    sizes = [(len(eqn.invars), len(eqn.outvars)) for eqn in (few, many)]
    same = few.primitive is many.primitive and sizes[0] == sizes[1] and what(few) == what(many)
    return same and _same_by_dim(few, many)


def _same_by_dim(few: core.JaxprEqn, many: core.JaxprEqn) -> bool:
    pairs = [(few.params[name], many.params[name]) for name in _BY_DIM if name in few.params]
    if all(a == b for a, b in pairs):
        return True
    rank, growing = len(shape_of(few.invars[0])), _differing(few.invars[0], many.invars[0])
    fixed = [dim for dim in range(rank) if dim not in growing]
    if few.primitive.name == "tile":  # one for all rows, once for each
        fixed = [dim for dim in fixed if shape_of(few.invars[0])[dim] != 1]

    def alike(a: Any, b: Any) -> bool:
        if a == b or a is None or b is None:  # None: as if 1 stood for each dim
            return a == b
        return len(a) == len(b) == rank and all(a[dim] == b[dim] for dim in fixed)

    return all(alike(a, b) for a, b in pairs)


def shape_of(variable: Any) -> tuple[int, ...]:
    """Shape of a variable or literal of a program."""
    return tuple(variable.aval.shape)


def dtype_of(variable: Any) -> np.dtype:
    """Dtype of a variable or literal of a program."""
    return variable.aval.dtype


def _differing(few: Any, many: Any) -> tuple[int, ...]:
    pairs = zip(shape_of(few), shape_of(many), strict=True)
    return tuple(dim for dim, (a, b) in enumerate(pairs) if a != b)
