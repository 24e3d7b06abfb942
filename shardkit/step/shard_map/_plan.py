"""Plans how a loss runs on shards with explicit collectives.

The model is traced once on whole arrays. Its calls of `use_param` and `constrain` decide for each
parameter whether a layer gathers it, and every problem is found before compiling.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import Mesh, PartitionSpec

from ..._core.errors import Problem
from ..._core.partition import Partition
from ..._core.row_dims import RowDims
from ..._core.split_rng import RandomDraws
from ..._core.tracing import uses_dtype
from ..._core.tree import Leaf, list_leaves
from ..._core.types import Accumulate, PyTree, Scalar
from ...nn._manual_axis_rules import Axes, Dims, ManualAxisRules, ShardMapLoss, varying_axes
from ...rules import axes_of
from .._bound_spec import BoundSpec
from .._layout import StepLayout
from ._axis_types import follow_types
from ._buckets import ParamPlan, flatten_dims
from ._layer_gathers import find_layer_gathers
from ._problems import (
    MarkedAxes,
    compression_problems,
    head_problems,
    leaf_problems,
    name_problems,
    raise_problems,
)


@dataclasses.dataclass(frozen=True)
class ShardMapPlan:
    """How the loss runs on shards."""

    bound: BoundSpec  # the spec and its mesh
    # micro-batches; `"end"` gathers weights and reduces gradients once per step, `"every"` does
    # both in every micro-batch, layer by layer
    accumulate: Accumulate
    row_dims: RowDims  # the dim of each leaf of the batch that counts rows
    row_axes: Axes  # mesh axes that split the rows of the batch
    token_axes: Axes  # the other mesh axes that split activations along dims that no parameter has
    parameters: tuple[ParamPlan, ...]  # plan of each parameter, in the order of the leaves
    partition: Partition  # which parameters are trained
    axis_rules: ManualAxisRules  # logical axes → mesh axes on shards
    specs: tuple[PyTree, PyTree, PyTree]  # specs of `(params, model_state, batch)`
    gradients: PyTree  # specs of the gradients that the update receives
    # for each leaf of the new model state, whether no row decides it, as in power iterations
    equal_state: tuple[bool, ...]
    # whether the loss computes in float16, which sums leave the range of
    uses_float16: bool = False
    # which random draws of the loss grow with rows and length
    draws: RandomDraws = dataclasses.field(default_factory=lambda: RandomDraws(1))

    @property
    def trained(self) -> tuple[ParamPlan, ...]:
        """Plans of the parameters that are trained."""
        every = jax.tree.unflatten(jax.tree.structure(self.specs[0]), self.parameters)
        return tuple(jax.tree.leaves(self.partition.trained(every)))

    @property
    def mesh(self) -> Mesh:
        """The device mesh."""
        return self.bound.mesh

    def common_weight(self, weight: Scalar) -> Scalar:
        """What gradients are divided by until they are reduced, equal on all devices.

        It is 1 but for float16, since the weight of all rows takes a collective of its own.
        """
        if not self.uses_float16:
            return jnp.ones((), weight.dtype)
        axes = tuple(sorted(varying_axes(weight)))
        return jax.lax.psum(weight, axes) if axes else weight

    def count(self, axes: Axes) -> int:
        """Number of devices along mesh axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)


def build_plan(
    bound: BoundSpec, layout: StepLayout, jaxpr: core.ClosedJaxpr, accumulate: Accumulate
) -> ShardMapPlan:
    """Plans how a loss, traced on whole arrays, runs on shards; the result has no draws yet.

    Raises StepError with every problem that `shard_map` mode finds in the spec or the model.
    """
    marked = MarkedAxes.of(jaxpr.jaxpr)
    rules, precision = bound.spec.strategy.activations, bound.spec.precision
    table = tuple((name, rules.mesh_axes(name)) for name, _ in rules.table) if rules else ()
    axis_rules, row_axes = ManualAxisRules(table), layout.row_axes
    params = list_leaves(layout.state.params, layout.axes)
    specs = jax.tree.map(lambda s: s.spec, layout.shardings)
    partition = layout.partition
    update = jax.tree.map(lambda s: s.spec, layout.update or layout.trained_shardings)
    # A frozen parameter is updated by nobody, so its update is laid out as it is stored.
    updated = partition.merge(update, specs.params)
    whole_loss = not isinstance(bound.spec.loss_fn, ShardMapLoss)
    token_axes = _token_axes(layout, axis_rules, marked) if whole_loss else ()
    # With one reduction after the last micro-batch, weights are gathered once before the first.
    layers_gather = whole_loss and not (accumulate.micro_batches > 1 and accumulate.reduce == "end")

    every_stored, every_finer = (_list_dims(params, of) for of in (specs.params, updated))
    storages, problems = [((),) * len(dims) for dims in every_stored], list[Problem]()
    if whole_loss:
        pairs = zip(params, every_stored, strict=True)
        storages = [_storage_only_dims(*pair, axis_rules) for pair in pairs]
        given = {"axis_rules": axis_rules, "marked": marked, "row_axes": row_axes}
        for leaf in zip(params, every_stored, storages, strict=True):
            problems += leaf_problems(*leaf, **given)
    find = find_layer_gathers if layers_gather else lambda *_: ({}, storages)
    gathered, by_step = find(jaxpr.jaxpr, params, storages)
    parameters = [
        _plan_param(*dims, row_axes + token_axes)
        for dims in zip(every_stored, every_finer, by_step, strict=True)
    ]
    problems += name_problems(axis_rules, marked)
    problems += head_problems(axis_rules, marked)
    problems += compression_problems(bound, params, parameters, row_axes)
    raise_problems(bound, problems)
    reduce_dtype = precision.reduce_dtype if precision.reduces_separately else None
    batch = jax.tree.map(lambda s: s.spec, layout.batch_shardings)
    return ShardMapPlan(
        bound=bound,
        accumulate=accumulate,
        row_dims=layout.row_dims,
        row_axes=row_axes,
        token_axes=token_axes,
        parameters=tuple(parameters),
        partition=partition,
        axis_rules=ManualAxisRules(table, tuple(gathered.items()), kept_axes(bound), reduce_dtype),
        specs=(specs.params, specs.model_state, batch),
        gradients=update,
        equal_state=_find_equal_state(layout, jaxpr.jaxpr, parameters),
        uses_float16=uses_dtype(jaxpr.jaxpr, jnp.float16),
    )


def _find_equal_state(
    layout: StepLayout, loss: core.Jaxpr, parameters: Sequence[ParamPlan]
) -> tuple[bool, ...]:
    """Whether each leaf of the new model state is the same on all devices of the rows."""
    rows, state = frozenset(layout.row_axes), jax.tree.leaves(layout.shardings.model_state)
    # A parameter that its layer gathers is a shard until then.
    split = [{*flatten_dims(p.stored)} - {*flatten_dims(p.gathered)} for p in parameters]
    split += [{*flatten_dims(_spec_dims(x.spec, len(x.spec)))} for x in state]
    others = [rows] * (len(loss.invars) - len(split))
    types, _ = follow_types(loss, [*(rows & axes for axes in split), *others])
    return tuple(not axes for axes in types[len(types) - len(state) :])


def _plan_param(stored: Dims, finer: Dims, gathered: Dims, summed_axes: Axes) -> ParamPlan:
    """Plans one parameter, by mesh axes per dim, and those along which gradients differ.

    With rows over (data, fsdp), a weight `P("fsdp")`, and an update that is split over data too:

        stored     (fsdp,)         the parameter's own spec
        finer      (fsdp, data)    that of the update
        gathered   (fsdp,)         before the loss, or () if the layer gathers it
        scattered  (fsdp, data)    the gathered axes, then those that only the update is split over
        summed     ()              data, if the update were not split over it
    """
    only_update = tuple(b[len(a) :] for a, b in zip(stored, finer, strict=True))
    split = {*flatten_dims(stored), *flatten_dims(only_update)}
    return ParamPlan(
        stored=stored,
        gathered=gathered,
        scattered=tuple(a + b for a, b in zip(gathered, only_update, strict=True)),
        summed=tuple(axis for axis in summed_axes if axis not in split),
    )


def _token_axes(layout: StepLayout, axis_rules: ManualAxisRules, marked: MarkedAxes) -> Axes:
    """Mesh axes that split activations, neither along rows nor along a dim of a parameter.

    `constrain(x, "batch", "length", "embed")` with length over context, and parameters that name
    embed but not length: `("context",)`.
    """
    of_params = {name for names in layout.axes.values() for name in names}
    split = axis_rules.axes(*(name for name in marked.activations if name not in of_params))
    return tuple(axis for axis in split if axis not in layout.row_axes)


def kept_axes(bound: BoundSpec) -> Axes:
    """Mesh axes over which gathered weights are kept from forward to backward."""
    overrides = bound.spec.strategy.overrides
    return tuple(override.axis for name, override in overrides if name == "use_param")


def _list_dims(params: Sequence[Leaf], specs: PyTree) -> list[Dims]:
    """The mesh axes per dim of each parameter, by a tree of specs."""
    pairs = zip(params, jax.tree.leaves(specs), strict=True)
    return [_spec_dims(spec, len(leaf.shape)) for leaf, spec in pairs]


def _spec_dims(spec: PartitionSpec, rank: int) -> Dims:
    return tuple(axes_of(entry) for entry in (*spec, *[None] * (rank - len(spec))))


def _storage_only_dims(leaf: Leaf, stored: Dims, axis_rules: ManualAxisRules) -> Dims:
    """Mesh axes per dim that split a parameter in storage but not in its products.

    "mlp" over tensor in products, stored over (tensor, fsdp): `("fsdp",)`.
    """
    names = leaf.axes or (None,) * len(stored)

    def storage_only(name: str | None, axes: Axes) -> Axes:
        used = axis_rules.axes(name)
        return axes[len(used) :] if axes[: len(used)] == used else axes

    return tuple(map(storage_only, names, stored))
