"""Which matrices are alike: each is computed by one program, so they are divided together."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core
from jax.sharding import PartitionSpec

from ..._core.tracing import equations
from ...rules import axes_of
from ..rows import Constant, PerRow, RowCounts, follow_rows
from ._parts import MatrixPart, has_products
from ._retrace import Retrace

Dims = tuple[tuple[str, ...], ...]
# What names the step's own mesh, or calls back for whole arrays.
_BOUND = frozenset(
    "sharding_constraint pure_callback io_callback debug_callback ffi_call shard_map".split()
)


@dataclasses.dataclass(frozen=True)
class Group:
    """Matrices that one program computes."""

    # takes one matrix of each array, with dims of size 1 in front, then what is shared
    program: core.ClosedJaxpr
    batch: int  # dims in front that count matrices
    parts: tuple[MatrixPart, ...]  # the parts of the update that have such matrices
    specs: tuple[tuple[PartitionSpec, ...], ...]  # of each part, the spec of each of its arrays
    # of each part, the spec of each of its results
    result_specs: tuple[tuple[PartitionSpec, ...], ...]
    # mesh axes that matrices are divided over, in the order in which they are moved
    order: tuple[str, ...]


def find_groups(
    update: core.ClosedJaxpr,
    parts: Sequence[MatrixPart],
    specs: Sequence[PartitionSpec],
    retrace: Retrace,
) -> list[Group]:
    """Returns the groups of matrices whose dims the mesh splits; other matrices stay as they are.

    `specs` are of the update's arguments; `retrace` traces it with other sizes.
    """
    if not parts:
        return []
    params = retrace.numbers
    counts = _count_batch_dims(update, parts, retrace)
    split = [_split_dims(update, p, n, specs) for p, n in zip(parts, counts, strict=True)]
    depth = {params[i]: n for p, n in zip(parts, counts, strict=True) for i in p.params}
    single = retrace.on_one_device(
        lambda i, shape: (*[1] * depth.get(i, 0), *shape[depth.get(i, 0) :])
    )
    alone = _programs_of_one(update, single, parts, retrace)
    groups: dict[Any, list[tuple[MatrixPart, _Split]]] = {}
    same, programs = _first_of_equals(update.jaxpr), {}
    for part, batch, dims, program in zip(parts, counts, split, alone, strict=True):
        if dims is None or program is None or not _is_of_one_matrix(program, part, batch):
            continue
        several = len({params[i] for i in part.params}) > 1
        if any(_stays(eqn, several) for eqn in equations(program.jaxpr)):
            continue
        shared = tuple(same.get(v, v) for v in part.shared)
        key = (str(program.jaxpr), batch, shared, dims.matrix, _inner_constants(program.jaxpr))
        groups.setdefault(key, []).append((part, dims))
        programs[key] = program
    return [
        Group(
            program=programs[key],
            batch=key[1],
            parts=tuple(part for part, _ in members),
            specs=tuple(dims.specs for _, dims in members),
            result_specs=tuple(dims.result_specs for _, dims in members),
            order=members[0][1].order,
        )
        for key, members in groups.items()
    ]


def _first_of_equals(jaxpr: Any) -> dict[Any, Any]:
    """For each computed value, the first one that is computed in the same way.

    An update that is called for each matrix, with `lax.cond(count % 10 == 0, ...)` inside, has as
    many conditions as matrices.
    """
    first: dict[Any, Any] = {}
    seen: dict[Any, core.JaxprEqn] = {}
    for eqn in jaxpr.eqns:
        of = [first.get(v, v) if _is_var(v) else f"{v}: {v.aval}" for v in eqn.invars]
        params = str(eqn.params), _inner_constants(tuple(eqn.params.values()))
        known = eqn if eqn.effects else seen.setdefault((eqn.primitive, *params, *of), eqn)
        first.update(zip(eqn.outvars, known.outvars, strict=True))
    return first


@dataclasses.dataclass(frozen=True)
class _Split:
    """How the arrays of one part are split."""

    matrix: tuple[Dims, ...]  # mesh axes of the dims of the matrices of each array and each result
    specs: tuple[PartitionSpec, ...]  # of the arrays
    result_specs: tuple[PartitionSpec, ...]  # of the results
    order: tuple[str, ...]  # the axes of all, each dim's last one first


def _split_dims(
    update: core.ClosedJaxpr, part: MatrixPart, batch: int, specs: Sequence[PartitionSpec]
) -> _Split | None:
    """How a part is split; None if no matrix of it is, or its arrays are not split alike."""
    if any(source is None for source in part.sources):
        return None
    arrays: list[Dims] = []
    for var, source in zip(part.arrays, part.sources, strict=True):
        spec = specs[source]  # type: ignore[index]
        entries = [axes_of(entry) for entry in spec]
        arrays.append((*entries, *[()] * (len(var.aval.shape) - len(entries))))
    in_front = {dims[:batch] for dims in arrays}
    order = tuple(dict.fromkeys(a for dims in arrays for d in dims[batch:] for a in reversed(d)))
    if len(in_front) != 1 or not order or set(order) & set(itertools.chain(*in_front.copy().pop())):
        return None
    for dim in (dim for dims in arrays for dim in dims[batch:]):
        if sorted(dim, key=order.index) != [*reversed(dim)]:
            return None
    shapes = {tuple(v.aval.shape): dims for v, dims in zip(part.arrays, arrays, strict=True)}
    (front,) = in_front
    results = []
    for var in part.results:
        shape = tuple(var.aval.shape)
        results.append(shapes.get(shape, (*front, *[()] * (len(shape) - batch))))
    return _Split(
        tuple(dims[batch:] for dims in (*arrays, *results)),
        tuple(PartitionSpec(*dims) for dims in arrays),
        tuple(PartitionSpec(*dims) for dims in results),
        order,
    )


def _count_batch_dims(
    update: core.ClosedJaxpr, parts: Sequence[MatrixPart], retrace: Retrace
) -> list[int]:
    """For each part, how many dims in front count matrices that do not depend on one another.

    Each is proved from two traces that differ in the size of this dim alone.
    """
    params, counts = retrace.numbers, [0] * len(parts)
    going = [all(len(v.aval.shape) > 2 for v in part.arrays) for part in parts]
    for dim in itertools.count():
        if not any(going):
            break
        many = retrace(lambda _, shape, d=dim: _doubled(shape, d) if len(shape) > d + 2 else shape)
        same = _same_structure(update, many)
        other = _counterparts(update, many) if same else {}
        for i, part in enumerate(parts):
            if going[i] and same and _counts_matrices(update, many, other, part, dim):
                counts[i] += 1
                going[i] = all(len(v.aval.shape) > dim + 3 for v in part.arrays)
            else:
                going[i] = False
    # A parameter has one number of such dims.
    least: dict[int, int] = {}
    for part, n in zip(parts, counts, strict=True):
        least.update({params[i]: min(n, least.get(params[i], n)) for i in part.params})
    return [
        min((least[params[i]] for i in part.params), default=0) if n else 0
        for part, n in zip(parts, counts, strict=True)
    ]


def _doubled(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], 2 * shape[dim], *shape[dim + 1 :])


def _counts_matrices(
    few: core.ClosedJaxpr, many: core.ClosedJaxpr, other: Any, part: MatrixPart, dim: int
) -> bool:
    """Whether a dim of a part's arrays counts matrices that do not depend on one another."""
    sizes = {v.aval.shape[dim] for v in part.arrays}
    grown = {other[v].aval.shape for v in part.arrays}
    expected = {_doubled(v.aval.shape, dim) for v in part.arrays}
    if len(sizes) != 1 or min(sizes) < 2 or grown != expected:
        return False
    alone = {v: v for v in (*part.arrays, *part.shared, *part.results)}
    pair = (
        _extract(few.jaxpr, part.equations, alone, part),
        _extract(many.jaxpr, part.equations, other, part),
    )
    inputs = [*[PerRow(dim)] * len(part.arrays), *[Constant()] * len(part.shared)]
    matrices = sizes.pop()
    states = follow_rows(*pair, inputs, RowCounts(matrices, 2 * matrices))
    return all(state == PerRow(dim) for state in states)


def _programs_of_one(
    update: core.ClosedJaxpr,
    single: core.ClosedJaxpr,
    parts: Sequence[MatrixPart],
    retrace: Retrace,
) -> list[core.ClosedJaxpr | None]:
    """Each part in a trace with one matrix of each parameter."""
    if _same_structure(update, single):
        names = _counterparts(update, single)
        return [_extract(single.jaxpr, part.equations, names, part) for part in parts]
    # `x @ y` has other equations for dims of size 1. Then parts are the same in the same order.
    theirs = retrace.find_parts(single)
    arguments = [
        dict(zip((*jaxpr.constvars, *jaxpr.invars), itertools.count(), strict=False))
        for jaxpr in (update.jaxpr, single.jaxpr)
    ]

    def describe(part: MatrixPart, places: dict[Any, int]) -> Any:
        shared = [places.get(v) for v in part.shared]
        return part.sources, part.params, len(part.results), shared, None in shared

    if len(theirs) != len(parts):
        return [None] * len(parts)
    programs: list[core.ClosedJaxpr | None] = []
    for pair in zip(parts, theirs, strict=True):
        ours, other = map(describe, pair, arguments)
        names = {v: v for v in (*pair[1].arrays, *pair[1].shared, *pair[1].results)}
        alike = ours == other and not ours[-1]
        program = _extract(single.jaxpr, pair[1].equations, names, pair[1]) if alike else None
        programs.append(program)
    return programs


def _is_of_one_matrix(program: core.ClosedJaxpr, part: MatrixPart, batch: int) -> bool:
    """Whether a program has the sizes of a part, but 1 for dims that count matrices."""
    ours = (*part.arrays, *part.results)
    n = len(part.arrays)
    if len(program.jaxpr.invars) != n + len(part.shared):
        return False
    theirs = (*program.jaxpr.invars[:n], *program.jaxpr.outvars)
    expected = [(*[1] * batch, *v.aval.shape[batch:]) for v in ours]
    shared = zip(part.shared, program.jaxpr.invars[n:], strict=True)
    return [v.aval.shape for v in theirs] == expected and all(
        a.aval.shape == b.aval.shape for a, b in shared
    )


def _extract(jaxpr: Any, places: Sequence[int], names: Any, part: MatrixPart) -> core.ClosedJaxpr:
    """A part as a program of its own; `names`: what its values are called in this trace."""
    inputs = [names[v] for v in (*part.arrays, *part.shared)]
    results = [names[v] for v in part.results]
    return subprogram(jaxpr, [jaxpr.eqns[place] for place in places], inputs, results)


def subprogram(
    jaxpr: Any, eqns: Sequence[core.JaxprEqn], inputs: Sequence[Any], results: Sequence[Any]
) -> core.ClosedJaxpr:
    """Some equations of a program as one of its own."""
    inner = jaxpr.replace(eqns=list(eqns), invars=list(inputs), outvars=list(results), constvars=[])
    return core.ClosedJaxpr(inner, ())


def _same_structure(a: core.ClosedJaxpr, b: core.ClosedJaxpr) -> bool:
    """Whether two traces have the same equations of the same values, whatever their sizes."""
    return _structure(a.jaxpr) == _structure(b.jaxpr)


def _structure(jaxpr: Any) -> list[Any]:
    numbers = {v: i for i, v in enumerate(_all_values(jaxpr))}
    return [
        (eqn.primitive.name, [numbers.get(v) if _is_var(v) else None for v in eqn.invars])
        for eqn in jaxpr.eqns
    ]


def _counterparts(a: core.ClosedJaxpr, b: core.ClosedJaxpr) -> dict[Any, Any]:
    """What the values of one trace are called in another one of the same structure."""
    return dict(zip(_all_values(a.jaxpr), _all_values(b.jaxpr), strict=True))


def _all_values(jaxpr: Any) -> Iterator[Any]:
    yield from (*jaxpr.constvars, *jaxpr.invars)
    for eqn in jaxpr.eqns:
        yield from eqn.outvars


def _is_var(value: Any) -> bool:
    return not isinstance(value, core.Literal)


def _stays(eqn: core.JaxprEqn, several: bool) -> bool:
    """Whether an equation cannot be computed by owners, or only with every matrix at each.

    A `lax.cond` around products of several parameters, as of `optax.MultiSteps`, takes them all.
    """
    if eqn.primitive.name == "cond" and several:
        return any(map(has_products, core.jaxprs_in_params(eqn.params)))
    return eqn.primitive.name in _BOUND


def _inner_constants(of: Any) -> tuple[int, ...]:
    """Arrays that programs inside hold, by identity: their text does not show them."""

    def inside(value: Any) -> Iterator[int]:
        if isinstance(value, core.ClosedJaxpr):
            yield from map(id, value.consts)
        if isinstance(value, core.ClosedJaxpr | core.Jaxpr):  # one class in JAX 0.12
            for eqn in value.eqns:
                yield from inside(tuple(eqn.params.values()))
        elif isinstance(value, tuple | list):
            for item in value:
                yield from inside(item)

    return tuple(inside(of))
