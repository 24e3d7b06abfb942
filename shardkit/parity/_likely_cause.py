"""What kind of fault most likely made checks fail on a mesh, in one sentence."""

import itertools
import math
from collections.abc import Collection, Sequence

from .._core.tracing import equations
from ..rules import format_mesh
from ..step import CompiledStep, find_mixed_rows
from ._parity_report import ParityRow
from ._record import (
    COUNTERS,
    EVALUATE,
    GRADIENTS,
    INIT,
    LATER_EVALUATE,
    LATER_LOSS,
    LATER_METRICS,
    LATER_STATE,
    LOSS,
    METRICS,
    NORM,
    SGD,
)

Failed = dict[str, ParityRow]
"""`{check: its row}` of the checks that failed on a mesh."""

_OF_THE_LOSS = {LOSS, GRADIENTS, NORM, METRICS, EVALUATE, LATER_LOSS, LATER_METRICS}
_CLOSE = 0.02  # how near a factor has to be to the size of a mesh axis

# What a failed check means if no earlier row of the table explains it.
_BY_CHECK = (
    (INIT, "the first state depends on the mesh, so init reads more than its key"),
    (LOSS, "the loss depends on the mesh: it reads a number of devices, or a device's place"),
    (GRADIENTS, "a part of the gradient is missing, or belongs to another leaf or other rows"),
    (NORM, "the norm is of a part of the gradients"),
    ("copies", "devices hold different values of what is declared equal on all of them"),
    (SGD, "the update depends on the layout, such as a norm of one device's part"),
    (METRICS, "a metric is averaged by weights that are not its own"),
    (EVALUATE, "an evaluation uses other rows or weights than one device"),
    (COUNTERS, "the state does not count its updates"),
    (LATER_STATE, "the optimizer's state is not carried from step to step as on one device"),
    (LATER_LOSS, "a later step draws other noise, or reads another batch"),
    (LATER_METRICS, "a metric or the gradient's norm is right in the first step only"),
    (LATER_EVALUATE, "an evaluation does not read the updated parameters"),
    ("layout", "a leaf is laid out otherwise than declared; the numbers are right"),
    ("compiles once", "the state changes its types or layout from step to step"),
)


def find_likely_cause(step: CompiledStep, rows: Sequence[ParityRow]) -> str:
    """Returns the likely kind of fault in a step's rows, or "" if every check passed."""
    failed = {row.check: row for row in rows if not row.ok}
    if not failed:
        return ""
    if _OF_THE_LOSS & failed.keys():
        if mixed := find_mixed_rows(step.spec, step.mesh, step.layout):
            return f"the loss mixes rows: {mixed}"
        if scaled := _explain_factor(step, failed):
            return scaled
        if LOSS in failed and _draws(step):
            return "the loss draws noise that depends on the mesh, or not from its key"
    return next(text for check, text in _BY_CHECK if check in failed)


def _explain_factor(step: CompiledStep, failed: Failed) -> str:
    """Explains a loss or a gradient leaf that is a multiple of one device's."""
    check = LOSS if LOSS in failed else GRADIENTS
    row = failed.get(check)
    if row is None or math.isnan(row.scaling) or abs(row.scaling - 1) < _CLOSE:
        return ""
    what = "the loss" if check == LOSS else f"the gradient of {row.leaf}"
    sizes = {axis: size for axis, size in step.mesh.shape.items() if size > 1}
    for axes in _subsets(sizes):
        n = math.prod(sizes[axis] for axis in axes)
        over = format_mesh({axis: sizes[axis] for axis in axes})
        if abs(row.scaling / n - 1) < _CLOSE:
            return f"{what} is summed {n} times, once on each device of {over}"
        if abs(row.scaling * n - 1) < _CLOSE:
            return f"{what} lacks a sum over {over}, or has a mean in its place"
    # Only a multiple of the whole leaf is a factor; the row's error is then the factor's own.
    if abs(abs(row.scaling - 1) - row.error) < _CLOSE * row.error:
        return f"{what} is scaled by {row.scaling:.3g}"
    return ""


def _subsets(axes: Collection[str]) -> list[tuple[str, ...]]:
    sizes = range(1, len(axes) + 1)
    return [subset for n in sizes for subset in itertools.combinations(axes, n)]


def _draws(step: CompiledStep) -> bool:
    names = {equation.primitive.name for equation in equations(step.program.jaxpr.jaxpr)}
    return "random_bits" in names
