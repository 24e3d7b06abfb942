"""Refuses a loss that is no mean of independent rows where a step splits its rows."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from ..._core.draws import trace_in_part
from ..._core.errors import Problem, StepError, first_line, raise_all
from ..._core.partition import Partition
from ..._core.row_dims import RowDims, count_rows, resize_rows
from ..._core.tree import leaves_by_path
from ..._core.types import Batch, Key, Params, PyTree, Scalar
from ...nn._overridable import Override, StepContext, use_overrides
from .._objective import LossOutput, Objective
from ._as_mean import as_mean
from ._equation import RowCounts
from ._follow import follow_rows
from ._one_row import compare_with_one_row
from ._rules import PARTS, PARTS_DEGREE, SCALE_DEGREE
from ._states import (
    AlwaysZero,
    Cause,
    Columns,
    Constant,
    Degree,
    Mixed,
    PerRow,
    RowSum,
    State,
    describe,
)

LossArgs = tuple[Params, PyTree, Batch, Key]

_ESCAPE = (
    "StepSpec(..., independent_rows=True) if you know that rows are independent all the same; or "
    "StepSpec(..., row_dims={...}) if not every leaf of the batch has its rows on dim 0"
)
_FROZEN = "accumulate=1; or sk.Loss(train, evaluate) whose evaluate leaves rows apart"
WHOLE = 'the whole batch at once: mode="auto", accumulate=1, no reduce_dtype'
_OWN_WEIGHT = "if its weight depends on the parameters"


def check_rows(
    objective: Objective,
    args: LossArgs,
    dims: RowDims,
    splits: str,
    *,
    partition: Partition | None,
    part: int | None = None,
    over_parts: tuple[str, ...] = (),
    frozen: Objective | None = None,
    whole: str = WHOLE,
    adds: bool = False,
    own_derivatives: bool = True,
) -> dict[str, int]:
    """Refuses a loss whose value on parts of the rows is not its value on all of them.

    A step that splits rows computes the loss of each part and adds up totals and weights. That is
    the loss of the whole batch where total and weight are both sums over rows, or both means of
    them; see `_states` for what is told apart. The gradients are followed as well, since a
    derivative rule of the user's own may mix rows where the loss does not. They are those of a
    scaled total, whose scale grows as no loss does: a part's gradients are divided by all weight
    at the end, so a rule that is not linear in them, as clipping is, would give something else.
    Without such rules they are not traced: a sum over rows for any parameters has a sum over rows
    as its derivative.

    Args:
      objective: the loss, on whole arrays.
      args: its abstract arguments, with the rows of the global batch.
      dims: the dim of each leaf of the batch that counts rows.
      splits: what splits the rows, for the error: `"accumulate=4"`.
      partition: which parameters have gradients that are split too; None: only the loss is.
      part: rows of a part; None where any number may come.
      whole: how to have all rows together instead, for the error.
      adds: the step can add up parts of a sum over rows that is divided by no count of them.
      over_parts: axes over which the loss sums what the parts have.
      own_derivatives: whether the loss has derivative rules of its own. It has them on any rows:
        a program that is another one on other rows is refused.
      frozen: the loss in evaluation. Where rows decide the new model state, as statistics of a
        batch norm, the state declares that parts have statistics of their own; all else that
        the loss does with rows is read from `frozen`, which uses them as they are.

    Returns:
      The power of the rows with which the loss and each metric grow: 1 of a sum, 0 of a mean.

    Raises:
      StepError: what mixes rows, with the operation, its line, and what to write instead.
    """
    # What JAX derives of a sum inside `shard_map` depends on its checks of what varies.
    partition = partition if own_derivatives or over_parts else None
    rows = count_rows(args[2], dims)
    if len(rows) != 1 or (count := rows.pop()) < 2:
        return {}
    split = count, part, splits, whole
    with _row_by_row():
        followed = _follow(_with_gradients(objective, partition), args, dims, split, over_parts)
    by_rows = [*_state_problems(followed[0].model_state)]
    if by_rows and frozen is not None:
        with _row_by_row():
            followed = _follow(_with_gradients(frozen, None), args, dims, split, ())
        by_rows, whole, adds = [], _FROZEN, False
    growth = _growth(followed[0]) if adds and not over_parts else {}
    problems = _problems(followed, splits, whole, growth)
    raise_all(StepError, _HEADLINE, [*problems, *by_rows], _ESCAPE)
    return growth


def _growth(output: LossOutput) -> dict[str, int]:
    """Powers of the rows in `total / weight`, where they are known."""
    means: dict[str, Any] = {"loss": output.loss, **output.metrics}
    degrees = {name: (_degree(mean.total), _degree(mean.weight)) for name, mean in means.items()}
    return {
        name: total - weight
        for name, (total, weight) in degrees.items()
        if isinstance(total, int) and isinstance(weight, int)
    }


def _with_gradients(objective: Objective, partition: Partition | None) -> Callable[..., Any]:
    """`(scale, params, ...) → (output, gradients of scale · total)`; {} without a partition."""

    def run(scale: Scalar, params: Params, *rest: Any) -> tuple[LossOutput, PyTree]:
        if partition is None:
            return objective(params, *rest)[1], {}

        def scaled(*args: Any) -> tuple[Scalar, LossOutput]:
            total, output = objective(*args)
            return total * scale.astype(total.dtype), output

        of_trained = jax.grad(partition.of_trained(scaled, params), has_aux=True)
        grads, output = of_trained(partition.trained(params), *rest)
        return output, grads

    return run


def _follow(
    run: Callable[..., Any],
    args: LossArgs,
    dims: RowDims,
    split: tuple[int, int | None, str, str],
    over_parts: tuple[str, ...],
) -> Any:
    """States of the results of `run`, from two traces.

    Args:
      run: from `_with_gradients`.
      args: of the loss; see `check_rows`.
      dims: of the leaves of the batch.
      split: the rows of the batch and of a part, what splits them, and how not to.
      over_parts: see `check_rows`.
    """
    params, model_state, batch, key = args
    count, part, splits, whole = split
    sizes, least = _compared(count, part), 1 if part == 1 else count
    traces = {}
    # The declared rows first: what fails on these is no matter of parts, and raised as it is.
    for rows in sorted({*sizes, least}, key=lambda rows: rows != count):
        parts = PARTS * (rows // min(sizes.few, least)) ** PARTS_DEGREE
        resized = resize_rows(batch, dims, rows, count)
        sized = (jax.ShapeDtypeStruct((), "float32"), params, model_state, resized, key)
        try:
            traces[rows] = trace_in_part(_with_parts(run, over_parts, parts), sized)
        except Exception as error:  # a user's code
            if rows == count:
                raise
            problem = _written_for(count, rows, error, splits, dims)
            fix = f"{problem.fix}; or {whole}"
            raise_all(StepError, _HEADLINE, [dataclasses.replace(problem, fix=fix)])
    (few, output), (many, _) = (traces[rows] for rows in sizes)
    inputs: list[State] = [
        Constant(SCALE_DEGREE),
        *[Constant()] * len(jax.tree.leaves((params, model_state))),
        *[Constant() if dim is None else PerRow(dim) for dim in dims],
        Constant(),
    ]
    states = follow_rows(few, many, inputs, sizes)
    if part == 1 and not any(isinstance(state, Mixed) for state in states):
        mixed = compare_with_one_row(traces[1][0], few, many, sizes)
        states = states if mixed is None else [mixed] * len(states)
    return jax.tree.unflatten(jax.tree.structure(output), states)


_HEADLINE = "The rows of the batch cannot be split."


def _compared(count: int, part: int | None) -> RowCounts:
    """The two numbers of rows to trace: of a part and of the whole, as they will run.

    Sizes of 1 say too little (is a dim of 1 the rows?), so for parts of one row others stand.

    >>> for part in (4, 1, None):
    ...     print(_compared(16, part))
    RowCounts(few=4, many=16)
    RowCounts(few=2, many=16)
    RowCounts(few=16, many=32)
    """
    few = count if part is None else max(part, 2)
    whole = few < count and count % few == 0
    return RowCounts(few, count) if whole else RowCounts(count, 2 * count)


def _written_for(count: int, rows: int, error: Exception, splits: str, dims: RowDims) -> Problem:
    reason = f"{type(error).__name__}: {first_line(error)}"
    why = f"is written for {count} rows: fails on {rows} ({reason}), and {splits} splits them"
    if "shard" in reason.lower():  # of the model's own, as a `jax.shard_map`
        return Problem("loss_fn", why, "no sharding of its own that splits the rows")
    fix = (
        "sizes and rows from the batch that is passed (len(batch[...])), no number of rows written "
        "out and no array of rows closed over"
    )
    if None in dims:
        fix += "; or StepSpec(row_dims=...), if other leaves of the batch count rows too"
    return Problem("loss_fn", why, fix)


def _problems(
    states: tuple[Any, PyTree], splits: str, whole: str, growth: dict[str, int]
) -> Iterator[Problem]:
    output, grads = states
    problem = _mean_problem("loss", output.loss, splits, whole)
    if problem and "loss" not in growth:
        yield problem
        return
    for name, metric in output.metrics.items():
        problem = _mean_problem(f"metrics[{name!r}]", metric, splits, whole)
        if problem and name not in growth:
            yield problem
    total, weight = output.loss.total, output.loss.weight
    # A rule of the user's own may give a gradient to what is zero.
    wanted = _degree(weight if isinstance(total, AlwaysZero) else total)
    for path, state in leaves_by_path(jax.tree.map(_unscaled, grads), "gradient").items():
        if isinstance(state, Mixed):
            yield _mixed_problem(path, state.cause, splits, whole)
            return
        if _degree(state) not in (wanted, "anything") and wanted != "anything":
            yield Problem(path, f"is {describe(state)}, unlike the loss", whole)
            return


def _unscaled(state: State) -> State:
    if isinstance(state, AlwaysZero | Mixed | Columns) or state.degree is None:
        return state
    return dataclasses.replace(state, degree=state.degree - SCALE_DEGREE)


def _state_problems(model_state: PyTree) -> Iterator[Problem]:
    """New state that depends on one part of the rows alone."""
    for path, state in leaves_by_path(model_state, "model_state").items():
        if not isinstance(state, AlwaysZero | Constant):
            why = f"is {describe(state)}, of one device's rows alone"
            fix = 'nn.BatchNorm(..., axis_name="batch"), or jax.lax.pmean(x, "batch") of sums'
            yield Problem(path, why, fix)


def _with_parts(run: Callable[..., Any], axes: tuple[str, ...], parts: int) -> Callable[..., Any]:
    """Binds axes that a loss names, each of a number of parts, every one with all rows."""
    if not axes:
        return run
    step = jax.sharding.get_abstract_mesh()
    mesh = _mesh_of({**dict(step.shape), **dict.fromkeys(axes, parts)})
    specs: Any = PartitionSpec()
    bound = jax.shard_map(
        run, mesh=mesh, in_specs=specs, out_specs=specs, axis_names={*axes}, check_vma=False
    )

    def with_axes(*args: Any) -> Any:
        # JAX allows another number of devices after an empty mesh alone.
        nothing = jax.sharding.use_abstract_mesh(_mesh_of({}))
        with nothing, jax.sharding.use_abstract_mesh(mesh):
            return bound(*args)

    return with_axes


def _mesh_of(sizes: dict[str, int]) -> Any:
    kinds = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def _mean_problem(name: str, mean: Any, splits: str, whole: str) -> Problem | None:
    for part in (mean.total, mean.weight):
        if isinstance(part, Mixed):
            return _mixed_problem(name, part.cause, splits, whole)
    total, weight = _degree(mean.total), _degree(mean.weight)
    if total == "anything" or total == weight != "none":
        return None
    why = f"is {describe(mean.total)}, which would be averaged over the parts that {splits} makes"
    if weight == 0 and total == 1:
        fix = "jnp.mean(...), or sk.Mean(total, weight) with the number of rows as weight"
        return Problem(name, why, f"{fix}; or {whole}")
    why = f"total is {describe(mean.total)}, weight {describe(mean.weight)}"
    return Problem(name, why, f"sk.Mean(total, weight) of two sums over rows; or {whole}")


def _mixed_problem(name: str, cause: Cause, splits: str, whole: str) -> Problem:
    why = f"{cause}, and {splits} splits the rows"
    if cause.ratio:
        mean = as_mean(cause.code, cause.guard)
        return Problem(name, why, f"{mean}; or, {_OWN_WEIGHT}, {whole}")
    return Problem(name, why, f"{cause.fix}; or {whole}" if cause.fix else whole)


def _degree(state: State) -> Degree | str:
    """How a value grows with the rows; "anything" for zero, "none" if by no power."""
    match state:
        case AlwaysZero():
            return "anything"
        case Constant(degree) | RowSum(degree):
            return "none" if degree is None else degree
    return "none"


def _row_by_row() -> Any:
    """Makes dropless experts keep rows apart while a loss is traced to be followed.

    They sort the tokens of all rows together, which cannot be followed; each expert having room for
    all tokens of a row computes the same.
    """
    context = StepContext(_mesh_of({"rows": 2}), (), lambda names: PartitionSpec())
    return use_overrides({"experts": _RoomForAll("rows")}, context)


class _RoomForAll(Override):
    def __call__(
        self, around: StepContext, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        tokens: jax.Array = args[0]
        room = kwargs.get("capacity") or tokens.shape[1]
        return plain(*args, **{**kwargs, "capacity": room})
