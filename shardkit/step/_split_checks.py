"""Refuses losses whose numbers would change where a step splits the rows of its batch."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core

from .._core.errors import Problem, StepError, raise_all
from .._core.tracing import equations
from ..nn._manual_axis_rules import ShardMapLoss
from ._bound_spec import BoundSpec
from ._gradients import GradientPlan, LossArgs
from ._layout import StepLayout
from ._objective import Objective
from ._unbound_axes import batch_axes
from .rows import check_rows


def check_split_rows(
    bound: BoundSpec, layout: StepLayout, loss: Objective, args: LossArgs, *, gradients: bool = True
) -> None:
    """Refuses a loss that depends on rows together, where the step splits them.

    Args:
      bound: the spec and its mesh.
      layout: how its batch is split.
      loss: of the global batch.
      args: its abstract arguments.
      gradients: the step computes gradients too, not only the loss.

    Raises:
      StepError: with the operation that mixes rows and the line of the user's code.
    """
    spec, on_shards = bound.spec, bound.spec.mode == "shard_map"
    splits = next(_row_splits(bound, layout, gradients), None)
    if not splits:
        return
    # The first call binds the axes that the loss names, and leaves equations of the attempts.
    named = batch_axes(jax.make_jaxpr(loss)(*args).jaxpr)
    # Statistics of a whole micro-batch are declared by mutable state; shards, by `ShardMapLoss`.
    declared = isinstance(spec.loss_fn, ShardMapLoss) or (spec.stateful and not on_shards)
    if not spec.independent_rows and not declared:
        over_parts = named if on_shards else ()
        check_rows(loss, args, splits, gradients=gradients, over_parts=over_parts)


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
    for kind in spec.strategy.kinds:
        if "layers" in kind.splits and sizes.get(kind.axis, 1) > 1:
            yield f"strategies.{kind.name}()"


def check_convolutions(plan: GradientPlan, loss: Objective, args: LossArgs) -> None:
    """Refuses convolutions whose gradient per shard XLA computes wrongly on CPU devices.

    The gradient of a weight for each gradient shard is a grouped convolution, split over its
    groups. XLA's CPU partitioner gets it wrong for kernels of 1 x 1, and for any kernel where a
    shard has one row (benchmarks/xla_faults.py); programs for TPUs keep it local.

    Raises:
      StepError: with the first such convolution.
    """
    device = plan.bound.mesh.devices.flat[0]
    if plan.num_shards == 1 or device.platform != "cpu":
        return
    one_row = plan.layout.rows // plan.micro_batches == plan.num_shards
    for equation in equations(jax.make_jaxpr(loss)(*args).jaxpr):
        if equation.primitive.name != "conv_general_dilated":
            continue
        kernel = _kernel_size(equation)
        if one_row or math.prod(kernel) == 1:
            size = " x ".join(map(str, kernel))
            why = f"has a {size} convolution, whose gradient per shard XLA miscompiles on CPUs"
            fix = f'accumulate=sk.Accumulate({plan.micro_batches}, "every"), or mode="shard_map"'
            raise_all(StepError, "The gradient would be wrong.", [Problem("loss_fn", why, fix)])


def _kernel_size(convolution: core.JaxprEqn) -> tuple[int, ...]:
    """Sizes of the dims of a convolution's kernel that slide over its input."""
    kernel: Any = convolution.invars[1].aval
    return tuple(kernel.shape[dim] for dim in convolution.params["dimension_numbers"].rhs_spec[2:])
