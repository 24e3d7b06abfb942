"""How a step with explicit collectives is laid out on shards, and what it cannot do.

The model is traced once on whole arrays: what it marks (`use_param`, `constrain`) decides for each
parameter whether its layers gather it, and every problem is found before anything is compiled.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from ..._core.errors import Problem
from ..._core.split_rng import RandomDraws
from ..._core.tree import Leaf, list_leaves
from ..._core.types import Accumulate
from ...nn._manual_axis_rules import Axes, Dims, ManualAxisRules, Names, ShardMapLoss
from ...rules import axes_of
from .._bound_spec import BoundSpec
from .._layout import Layout
from ._buckets import Parameter, flat
from ._problems import (
    Marks,
    compression_problems,
    head_problems,
    leaf_problems,
    name_problems,
    refuse,
)


@dataclasses.dataclass(frozen=True)
class ManualPlan:
    """How the loss runs on shards.

    Attributes:
      bound: mesh, precision and compression.
      accumulate: micro-batches; `"end"` gathers weights once per step and reduces gradients
        once, `"every"` does both in every micro-batch, layer by layer.
      rows: mesh axes that the rows of the batch are split over.
      tokens: mesh axes that split activations along dims that no parameter has, beside `rows`.
      parameters: of each leaf of the parameters, in order.
      meaning: what logical names mean on shards.
      specs: of `(params, model_state, batch)`.
      gradients: specs of the gradients, as the update takes them.
      draws: which random draws of the loss grow.
    """

    bound: BoundSpec
    accumulate: Accumulate
    rows: Axes
    tokens: Axes
    parameters: tuple[Parameter, ...]
    meaning: ManualAxisRules
    specs: tuple[Any, Any, Any]
    gradients: Any
    draws: RandomDraws = dataclasses.field(default_factory=lambda: RandomDraws(1))

    @property
    def mesh(self) -> Mesh:
        """The device mesh."""
        return self.bound.mesh

    @property
    def apart(self) -> bool:
        """Whether auto partitioning would keep gradients apart; then keys are of micro-batches."""
        return self.accumulate.reduce == "end" and self.bound.spec.precision.reduces_separately

    def count(self, axes: Axes) -> int:
        """Number of devices along mesh axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)


def plan_of(bound: BoundSpec, layout: Layout, jaxpr: Any, accumulate: Accumulate) -> Any:
    """Lays a loss out on shards.

    Args:
      bound: the spec and its mesh.
      layout: every sharding.
      jaxpr: the loss, traced on whole arrays.
      accumulate: micro-batches.

    Returns:
      A `ManualPlan`, as yet without its draws.

    Raises:
      StepError: with everything that explicit collectives cannot do.
    """
    marks, own = Marks.of(jaxpr.jaxpr), isinstance(bound.spec.loss_fn, ShardMapLoss)
    rules = bound.spec.strategy.activations
    table = tuple((n, rules.mesh_axes(n)) for n, _ in rules.table) if rules else ()
    meant, rows = ManualAxisRules(table), layout.row_axes
    problems: list[Problem] = []
    found = list_leaves(layout.state.params, layout.axes)
    specs = jax.tree.map(lambda s: s.spec, layout.shardings)
    updated = jax.tree.map(lambda s: s.spec, layout.update or layout.shardings.params)
    named_dims = {name for leaf in found for name in leaf.axes or ()}
    split = meant.axes(*(n for n in marks.activations if n not in named_dims))
    tokens = () if own else tuple(axis for axis in split if axis not in rows)
    keep = accumulate.micro_batches > 1 and accumulate.reduce == "end"
    parameters, gathered = [], {}
    pairs = zip(jax.tree.leaves(specs.params), jax.tree.leaves(updated), strict=True)
    for leaf, (spec, finer) in zip(found, pairs, strict=True):
        stored, update = (_dims(one, len(leaf.shape)) for one in (spec, finer))
        surplus = ((),) * len(stored) if own else _surplus(leaf, stored, meant)
        if not own:
            problems += leaf_problems(leaf, stored, surplus, meant, marks, rows)
        mark = None if keep or own else _mark(leaf, surplus, marks)
        if mark and any(surplus):
            gathered[mark] = surplus[-len(mark) :]
        whole = ((),) * len(stored) if mark else surplus
        more = tuple(b[len(a) :] for a, b in zip(stored, update, strict=True))
        scattered = tuple(a + b for a, b in zip(whole, more, strict=True))
        taken = {*flat(stored), *flat(more)}
        summed = tuple(axis for axis in (*rows, *tokens) if axis not in taken)
        parameters.append(Parameter(stored, whole, scattered, summed))
    problems += name_problems(meant, marks)
    problems += head_problems(meant, marks)
    problems += compression_problems(bound, parameters, rows)
    refuse(bound, problems)
    precision = bound.spec.precision
    reduce = precision.reduce_dtype if precision.reduces_separately else None
    batch = jax.tree.map(lambda s: s.spec, layout.batch_shardings)
    return ManualPlan(
        bound,
        accumulate,
        rows,
        tokens,
        tuple(parameters),
        ManualAxisRules(table, tuple(gathered.items()), kept_axes(bound), reduce),
        (specs.params, specs.model_state, batch),
        updated,
    )


def kept_axes(bound: BoundSpec) -> Axes:
    """Mesh axes over which a strategy keeps gathered weights."""
    return tuple(one.axis for name, one in bound.spec.strategy.overrides if name == "use_param")


def _dims(spec: PartitionSpec, rank: int) -> Dims:
    return tuple(axes_of(entry) for entry in (*spec, *[None] * (rank - len(spec))))


def _mark(leaf: Leaf, surplus: Dims, marks: Marks) -> Names | None:
    """The names by which a model marks a leaf, perhaps after a scan took its first dim off."""
    for names in (leaf.axes, leaf.axes[1:] if leaf.axes and not surplus[0] else None):
        if names in marks.weights:
            return names
    return None


def _surplus(leaf: Leaf, stored: Dims, meant: ManualAxisRules) -> Dims:
    """Mesh axes per dim that split a parameter in storage and not in its products."""
    names = leaf.axes or (None,) * len(stored)
    return tuple(
        axes[len(meant.axes(name)) :] if axes[: len(meant.axes(name))] == meant.axes(name) else axes
        for name, axes in zip(names, stored, strict=True)
    )
