"""Refuses losses whose numbers would change where a step splits the rows of its batch."""

from collections.abc import Iterator

from ..nn._manual_axis_rules import ShardMapLoss
from ._bound_spec import BoundSpec
from ._gradients import LossArgs
from ._layout import StepLayout
from ._objective import Objective
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
    spec = bound.spec
    splits = next(_row_splits(bound, layout, gradients), None)
    # Statistics of the batch are declared by mutable state, and on shards by `ShardMapLoss`.
    declared = spec.stateful or isinstance(spec.loss_fn, ShardMapLoss)
    if splits and not spec.independent_rows and not declared:
        check_rows(loss, args, splits, gradients=gradients)


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
