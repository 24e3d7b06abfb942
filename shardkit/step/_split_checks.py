"""Refuses losses whose numbers would change where a step splits the rows of its batch."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from .._core.draws import list_draws
from .._core.errors import Problem, StepError, raise_all
from .._core.row_dims import count_rows
from .._core.tree import list_leaves
from .._core.types import Mean, Scalar
from ..nn._manual_axis_rules import ShardMapLoss
from ._bound_spec import BoundSpec
from ._gradients import LossArgs, TracedLoss
from ._layout import StepLayout
from ._objective import LossOutput, Objective, build_objective
from ._unbound_axes import batch_axes
from .rows import check_rows, derive_solves_alike, has_own_derivatives


def check_split_rows(
    bound: BoundSpec, layout: StepLayout, loss: Objective, args: LossArgs, *, gradients: bool = True
) -> TracedLoss | None:
    """Refuses a loss that depends on rows together, where the step splits them.

    `loss` is of the global batch, `args` are its abstract arguments; without `gradients` the step
    computes the loss alone. Returns the loss traced on whole arrays, None if no rows are split.
    Raises StepError with the operation that mixes rows and the line of the user's code.
    """
    splits = next(_row_splits(bound, layout, gradients), "")
    in_stages = [f"strategies.{kind.name}()" for kind in bound.staged_kinds]
    on_shards = isinstance(bound.spec.loss_fn, ShardMapLoss)
    problems = list(_stage_problems(bound, layout))
    if (unclear := layout.batch_rows.problem) and (splits or in_stages) and not on_shards:
        why = f"{unclear.why}; {[splits, *in_stages][-1]} splits rows"
        problems.append(dataclasses.replace(unclear, why=why))
    raise_all(StepError, "The rows of the batch cannot be split.", problems)
    if not splits:
        return None
    # The first call binds the axes that the loss names, and leaves equations of the attempts.
    traced, (_, output) = jax.make_jaxpr(loss, return_shape=True)(*args)
    named = batch_axes(traced.jaxpr)
    if not bound.follows_rows:
        return TracedLoss(traced.jaxpr, output)
    partition = layout.partition if gradients else None
    on_parts = bound.spec.mode == "shard_map"
    frozen = build_objective(bound.spec.loss_fn, bound.mesh, evaluate=True)
    growth = check_rows(
        derive_solves_alike(loss, traced.jaxpr),
        args,
        layout.row_dims,
        splits,
        partition=partition,
        part=_part_rows(bound, layout, gradients),
        over_parts=named if on_parts else (),
        # On whole micro-batches mutable state may be their statistics.
        frozen=frozen if bound.spec.stateful and not on_parts else None,
        adds=True,
        own_derivatives=has_own_derivatives(traced.jaxpr),
    )
    return TracedLoss(traced.jaxpr, output, growth)


def add_up_parts(loss: Objective, traced: TracedLoss | None, layout: StepLayout) -> Objective:
    """Weighs what parts of the rows give so that sums over rows are added up, not averaged.

    Of 32 rows, `jnp.sum(e) / 32` is the sum of what 4 parts of 8 rows give: a weight of 1/4 each.
    `loss` is on any rows, `traced` from `check_split_rows`.
    """
    growth = {} if traced is None else traced.growth
    if not any(growth.values()):
        return loss

    def run(*args: Any) -> tuple[Scalar, LossOutput]:
        total, output = loss(*args)
        (rows,) = count_rows(args[2], layout.row_dims)

        def weigh(name: str, mean: Mean) -> Mean:
            power = growth.get(name, 0)
            return Mean(mean.total, mean.weight * (rows / layout.rows) ** power) if power else mean

        metrics = {name: weigh(name, metric) for name, metric in output.metrics.items()}
        return total, LossOutput(weigh("loss", output.loss), metrics, output.model_state)

    return run


def check_fixed_state(bound: BoundSpec, args: LossArgs) -> None:
    """Checks that a loss returns the model state that it is given, as tables and buffers are.

    Where gradients are kept apart, each part of the batch would have a state of its own. Raises
    StepError if the loss changes its state.
    """
    if not jax.tree.leaves(args[1]):
        return
    program = jax.make_jaxpr(build_objective(bound.spec.loss_fn, bound.mesh))(*args).jaxpr
    params, model_state = map(jax.tree.leaves, args[:2])
    given = program.invars[len(params) : len(params) + len(model_state)]
    returned = program.outvars[len(program.outvars) - len(model_state) :]
    if all(old is new for old, new in zip(given, returned, strict=True)):
        return
    why = "would give every gradient shard its own statistics, different on every mesh"
    fix = 'accumulate=sk.Accumulate(k, reduce="every"), precision.reduce_dtype=None'
    if bound.spec.mode == "shard_map":
        why = "would have every micro-batch pass on the model state"
        fix = 'accumulate=1; or mode="auto" with accumulate=sk.Accumulate(k, "every")'
    problems = [Problem("accumulate, precision.reduce_dtype", why, fix)]
    raise_all(StepError, "Mutable state of the model cannot be divided.", problems)


def _part_rows(bound: BoundSpec, layout: StepLayout, gradients: bool) -> int:
    """Rows that the loss is computed on at once, of a micro-batch on a device."""
    spec, sizes = bound.spec, bound.mesh.shape
    by_device = spec.mode == "shard_map"
    axes = layout.row_axes if by_device else layout.shard_axes
    micro_batches = spec.accumulate.micro_batches if gradients else 1
    if not by_device and spec.accumulate.reduce == "every":
        axes = ()
    return layout.rows // (micro_batches * math.prod(sizes[axis] for axis in axes))


def _stage_problems(bound: BoundSpec, layout: StepLayout) -> Iterator[Problem]:
    """A pipeline sends micro-batches of dim 0 of all that its layers get of the batch."""
    for kind in bound.staged_kinds:
        for leaf, dim in zip(list_leaves(layout.batch), layout.row_dims, strict=True):
            if leaf.shape and dim != 0:
                where = "counts no rows" if dim is None else f"has its rows on dim {dim}"
                why = f"{where}; strategies.{kind.name}() splits dim 0 of every leaf"
                fix = "rows on dim 0, and what counts none in params or closed over by the loss"
                yield Problem(str(leaf.within("batch")), why, fix)


def _row_splits(bound: BoundSpec, layout: StepLayout, gradients: bool) -> Iterator[str]:
    """What makes the step compute the loss on parts of the rows, as code."""
    spec, sizes = bound.spec, bound.mesh.shape
    if spec.mode == "shard_map" and any(sizes[axis] > 1 for axis in layout.row_axes):
        yield 'mode="shard_map"'
    if not gradients:
        return
    if spec.accumulate.micro_batches > 1:
        yield f"accumulate={spec.accumulate.micro_batches}"
    if spec.precision.reduces_separately and layout.shard_axes:
        yield f"precision.reduce_dtype={spec.precision.reduce_dtype!r}"


def check_partial_rows(
    layout: StepLayout, loss: Objective, args: LossArgs, *, proved: bool
) -> dict[str, int]:
    """Checks that a batch with fewer rows can be evaluated by repeating them; see `_partial_batch`.

    `loss` is as it is evaluated, on whole arrays, `args` are its abstract arguments; `proved` says
    that the user declares it a mean of independent rows. Returns the power of the rows with which
    the loss and each metric grow. Raises StepError if it draws random numbers, or depends on rows
    together.
    """
    draws = list_draws(jax.make_jaxpr(loss)(*args).jaxpr)
    if any(draw.kind in ("bits", "gamma") for draw in draws):
        why = "draws random numbers in evaluation too, which are those of a full batch"
        fix = "sk.Loss(train=..., evaluate=...), whose evaluate draws none"
        headline = "A batch of fewer rows than declared cannot be evaluated."
        raise_all(StepError, headline, [Problem("loss_fn", why, fix)])
    if proved:
        return {}
    splits, whole = "step.evaluate of fewer rows", f"a full batch of {layout.rows} rows"
    return check_rows(loss, args, layout.row_dims, splits, partition=None, whole=whole, adds=True)
