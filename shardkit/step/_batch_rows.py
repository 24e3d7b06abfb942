"""Finds the dims of a batch that count its rows, and the mesh axes that split them.

Three declarations say where the rows are, the first that is there:

1. `StepSpec.row_dims`: globs over the leaves to a dim, or None for a leaf without rows. A spec such
   as `P("data", "context")` then names the axes of the rows and of the other dims in their order.
2. A rule as `Strategy.batch`: the rows of a leaf are on the dim that the axes of rows split, and a
   leaf that they do not split has none.
3. Otherwise dim 0 of every leaf.

Leaves that disagree are no error where nothing splits rows: one program of the whole batch at once
is right whatever its rows are. Elsewhere `BatchRows.problem` says what is unclear.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from jax.sharding import PartitionSpec

from .._core.errors import Problem, did_you_mean
from .._core.options import option_problems
from .._core.row_dims import RowDims
from .._core.tree import Leaf, list_leaves
from .._core.types import Batch
from ..parallel import Strategy, known_kinds
from ..rules import axes_of, matches

RowDimTable = Mapping[str, int | None]


@dataclasses.dataclass(frozen=True)
class BatchRows:
    """The rows of a batch."""

    dims: RowDims  # the dim of each leaf that counts rows, in JAX's order
    number: int  # rows of the global batch; 0 where no leaf has any, or that is unclear
    axes: tuple[str, ...]  # mesh axes that split them
    problem: Problem | None = None  # why they cannot be split further, or None

    @classmethod
    def of(
        cls,
        leaves: Sequence[Leaf],
        specs: Mapping[str, PartitionSpec],
        strategy: Strategy,
        declared: RowDimTable | None,
    ) -> "BatchRows":
        """Finds the rows of a batch whose leaves have these specs, by path."""
        dims, problem = list_row_dims(leaves, declared), None
        if declared is None and not isinstance(strategy.batch, PartitionSpec):
            dims, problem = _dims_of_rule(leaves, specs, strategy, dims)
        counted = [(leaf, dim) for leaf, dim in zip(leaves, dims, strict=True) if dim is not None]
        splits = {leaf.path: _axes_at(specs.get(leaf.path), dim) for leaf, dim in counted}
        axes = next(filter(None, splits.values()), ())
        problem = problem or _disagreement(counted, splits)
        if not counted and any(leaf.shape for leaf in leaves):
            why = "no leaf counts rows, so there is nothing to split"
            problem = Problem("batch", why, 'StepSpec(row_dims={"**": 0})')
        number = counted[0][0].shape[counted[0][1]] if counted and not problem else 0
        return cls(dims, number, axes, problem)


def list_row_dims(leaves: Sequence[Leaf], declared: RowDimTable | None) -> RowDims:
    """The dim that counts rows for each leaf: as declared, or 0; None for scalars."""

    def find(leaf: Leaf) -> int | None:
        if not leaf.shape:
            return None
        if declared is None:
            return 0
        return next(dim for glob, dim in declared.items() if matches(glob, leaf.path))

    return tuple(map(find, leaves))


def arrange_spec(spec: PartitionSpec, leaf: Leaf, dim: int | None) -> PartitionSpec:
    """The spec of a batch for one leaf: its first entry for the rows, the others in their order.

    >>> import jax.numpy as jnp
    >>> tokens = Leaf("tokens", (16, 8, 3), jnp.float32)  # [length, rows, features]
    >>> arrange_spec(PartitionSpec("data", "context"), tokens, 1)
    P('context', 'data')
    """
    entries = list(spec)[: len(leaf.shape)]
    if dim is None or not entries:
        return PartitionSpec()
    if not dim:
        return PartitionSpec(*entries)
    rows, *others = [*entries, *[None] * (dim + 1 - len(entries))]
    arranged = [*others[:dim], rows, *others[dim:]]
    while arranged[-1] is None and len(arranged) > 1:
        arranged.pop()
    return PartitionSpec(*arranged)


def arrange_specs(
    spec: PartitionSpec, leaves: Sequence[Leaf], declared: RowDimTable | None
) -> dict[str, PartitionSpec]:
    """The spec of a batch for each of its leaves, by path; see `arrange_spec`."""
    pairs = zip(leaves, list_row_dims(leaves, declared), strict=True)
    return {leaf.path: arrange_spec(spec, leaf, dim) for leaf, dim in pairs}


def row_dim_problems(batch: Batch, declared: RowDimTable | None) -> Iterator[Problem]:
    """What is wrong with `StepSpec.row_dims` for this batch."""
    wrong = option_problems(row_dims=(declared, Mapping[str, int | None] | None))
    yield from (dataclasses.replace(p, fix='row_dims={"tokens": 1, "**": 0}') for p in wrong)
    if declared is None or wrong:
        return
    leaves = list_leaves(batch)
    paths = [leaf.path for leaf in leaves]
    for glob in declared:
        if not any(matches(glob, path) for path in paths):
            why = f"matches no leaf of the batch.{did_you_mean(glob, paths)}"
            yield Problem(f"row_dims[{glob!r}]", why, f"one of {', '.join(paths)}, or '**'")
    undecided = False
    for leaf in leaves:
        found = [dim for glob, dim in declared.items() if matches(glob, leaf.path)]
        subject, dim = str(leaf.within("batch")), found[0] if found else None
        if not found and leaf.shape:
            undecided = True
            yield Problem(subject, "no glob of row_dims matches", 'row_dims={..., "**": 0}')
        elif dim is not None and leaf.shape and not 0 <= dim < len(leaf.shape):
            undecided = True
            why = f"row_dims says that dim {dim} counts rows, and it has {len(leaf.shape)} dims"
            yield Problem(subject, why, f"row_dims={{{leaf.path!r}: 0, ...}}")
    if not undecided:
        dims = list_row_dims(leaves, declared)
        counted = [(leaf, d) for leaf, d in zip(leaves, dims, strict=True) if d is not None]
        if problem := _disagreement(counted, {}):
            yield problem


def _disagreement(
    counted: Sequence[tuple[Leaf, int]], splits: Mapping[str, tuple[str, ...]]
) -> Problem | None:
    """The first leaf with another number of rows than most, or with rows over other axes."""
    sizes = [leaf.shape[dim] for leaf, dim in counted]
    usual = max(sizes, key=lambda n: (sizes.count(n), n), default=0)
    if odd := [pair for pair, n in zip(counted, sizes, strict=True) if n != usual]:
        (leaf, dim), (like, like_dim) = odd[0], counted[sizes.index(usual)]
        why = f"has {leaf.shape[dim]} rows, {like.path} has {usual}, on dims {dim} and {like_dim}"
        none = "".join(f"{other.path!r}: None, " for other, _ in odd)
        fix = f'StepSpec(row_dims={{{none}"**": 0}}), if what is named there has no rows'
        return Problem(str(leaf.within("batch")), why, fix)
    split = [(path, axes) for path, axes in splits.items() if axes]
    for path, axes in split[1:]:
        if axes != split[0][1]:
            why = f"splits its rows over {axes}, {split[0][0]} over {split[0][1]}"
            return Problem(f"batch/{path}", why, "one split of the rows for every leaf")
    return None


def _dims_of_rule(
    leaves: Sequence[Leaf],
    specs: Mapping[str, PartitionSpec],
    strategy: Strategy,
    otherwise: RowDims,
) -> tuple[RowDims, Problem | None]:
    """The dim of each leaf that axes of rows split; `otherwise` where they split none, or several.

    With tokens P("x", "y") and labels P("x"), what splits the one dim of labels is of rows.
    """
    split = [_row_splits(leaf, specs, strategy) for leaf in leaves]
    sure = {axes for dims in split if len(dims) == 1 for axes in dims.values()}
    found = [[d for d, axes in dims.items() if len(dims) == 1 or axes in sure] for dims in split]
    for leaf, dims, of_rows in zip(leaves, split, found, strict=True):
        if dims and len(of_rows) != 1:
            why = f"its rule splits dims {' and '.join(map(str, dims))}, each of which may be rows"
            fix = f"StepSpec(row_dims={{{leaf.path!r}: {min(dims)}, ...}})"
            return otherwise, Problem(str(leaf.within("batch")), why, fix)
    return (tuple(d[0] if d else None for d in found) if any(found) else otherwise), None


def _row_splits(
    leaf: Leaf, specs: Mapping[str, PartitionSpec], strategy: Strategy
) -> dict[int, tuple[str, ...]]:
    """Mesh axes by dim of a leaf, without those that are known to split something else."""
    kinds = (*strategy.kinds, *known_kinds())
    of_rows = {kind.axis for kind in kinds if "rows" in kind.splits}
    other = {kind.axis for kind in kinds} - of_rows
    entries = enumerate(specs.get(leaf.path, PartitionSpec()))
    axes = {dim: tuple(a for a in axes_of(entry) if a not in other) for dim, entry in entries}
    return {dim: names for dim, names in axes.items() if names}


def _axes_at(spec: PartitionSpec | None, dim: int) -> tuple[str, ...]:
    return axes_of(spec[dim]) if spec is not None and dim < len(spec) else ()
