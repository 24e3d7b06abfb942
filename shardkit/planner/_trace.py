"""A traced model: its gradient as a flat program, and its costs under a strategy."""

import dataclasses
from collections.abc import Callable, Container, Mapping
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr
from jax.sharding import AbstractMesh, AxisType

from .._core.own_sharding import on_any_mesh
from .._core.precision import cast_floats
from .._core.row_dims import RowDims, with_dim
from .._core.tree import list_leaves
from .._core.types import Batch, Key, Params, PyTree
from ..nn._remat import apply_policy, parse_policy, use_policy
from ..parallel import Strategy
from ..rules import axes_of
from ..step import (
    AbstractState,
    StepLayout,
    StepSpec,
    abstract_state,
    build_objective,
    find_partition,
    list_row_dims,
    resolve_layout,
)
from ._costs import CostLog
from ._dataflow import Dims, find_dim_sizes
from ._program import FlatProgram, flatten_jaxpr
from ._propagator import Propagator
from ._region_probe import LOCAL_EXPERTS, ROWS, ROWS_WITHOUT_EXPERT, MarkedRegions, probe_regions
from ._symbolic_sharding import (
    MICRO,
    Axes,
    SymbolicBytes,
    SymbolicSharding,
    replicated,
    sharding_of_spec,
)


@dataclasses.dataclass(frozen=True)
class TracedModel:
    """The parts of a spec that do not depend on a mesh, traced once."""

    spec: StepSpec  # loss, optimizer, init, batch, precision
    abstract: AbstractState  # the state's shapes and the parameters' logical axes
    # (remat policy, whether attention is one operation) → gradient, once traced
    programs: dict[tuple[str, bool], FlatProgram] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, spec: StepSpec) -> "TracedModel":
        """Traces `init` and the optimizer."""
        return cls(spec, on_any_mesh(abstract_state)(spec))

    def with_length(self, lengths: Container[int], factor: float) -> "TracedModel | None":
        """The same model for rows of another length; None where the batch has no such dim.

        Dims of the batch, but its rows, grow by `factor` if their size is one of `lengths`: the
        sizes of the dims that the model names `length`.
        """

        def resize(x: Any, row_dim: int | None) -> jax.ShapeDtypeStruct:
            longer = (int(n * factor) if n in lengths else n for n in x.shape)
            sizes = zip(x.shape, longer, strict=True)
            shape = tuple(n if d == row_dim else m for d, (n, m) in enumerate(sizes))
            return jax.ShapeDtypeStruct(shape, x.dtype)

        leaves, structure = jax.tree.flatten(self.spec.batch)
        batch = structure.unflatten(map(resize, leaves, self.row_dims))
        shapes = [[x.shape for x in jax.tree.leaves(b)] for b in (batch, self.spec.batch)]
        if shapes[0] == shapes[1]:
            return None
        return dataclasses.replace(self, spec=self.spec.replace(batch=batch), programs={})

    @property
    def row_dims(self) -> RowDims:
        """The dim of each leaf of the batch that counts rows; planned strategies have no rule."""
        return list_row_dims(list_leaves(self.spec.batch), self.spec.row_dims)

    @property
    def compute_dtype(self) -> str:
        """The dtype in which most of the parameters are computed."""
        return self.spec.precision.compute_dtypes(self.abstract[0].params).main

    def layout(self, sizes: Mapping[str, int], strategy: Strategy, steps: int = 1) -> StepLayout:
        """Resolves every rule of a strategy on a mesh; raises ShardingError with all that fails."""
        return resolve_layout(
            self.spec,
            abstract_mesh(sizes),
            strategy=strategy,
            micro_batches=steps,
            abstract=self.abstract,
        )

    def program(self, remat: str, probed: bool = False) -> FlatProgram:
        """The gradient of the loss under a remat policy, for the whole batch at once.

        It is `probed` to have attention as one operation, as where its length is split.
        """
        if (remat, probed) not in self.programs:
            with probe_regions(attention=probed):
                self.programs[remat, probed] = flatten_jaxpr(self.gradient_jaxpr(remat))
        return self.programs[remat, probed]

    def regions(self) -> MarkedRegions:
        """The regions that the loss marks."""
        spec, (state, _) = self.spec, self.abstract
        with probe_regions():
            loss = on_any_mesh(jax.make_jaxpr(build_objective(spec.loss_fn)))(
                self._compute_params(), state.model_state, spec.batch, state.key
            )
        return MarkedRegions.of(loss.jaxpr)

    def gradient_jaxpr(self, remat: str) -> ClosedJaxpr:
        """The gradient of the loss under a remat policy, as JAX traces it."""
        spec, (state, _) = self.spec, self.abstract
        loss, named = build_objective(spec.loss_fn), parse_policy(remat)

        def run(params: Params, model_state: PyTree, batch: Batch, key: Key) -> PyTree:
            params = cast_floats(params, spec.precision.compute_dtype)
            partition = find_partition(spec, params)
            of_trained = jax.grad(partition.of_trained(checkpointed, params), has_aux=True)
            return of_trained(partition.trained(params), model_state, batch, key)

        low = self._compute_params()
        args = (low, state.model_state, spec.batch, state.key)
        checkpointed = on_any_mesh(apply_policy)(loss, named, *args)
        with use_policy(named):
            trace = on_any_mesh(jax.make_jaxpr(run))
            return trace(state.params, state.model_state, spec.batch, state.key)

    def _compute_params(self) -> Params:
        """Shapes of the parameters in the dtype that is computed with."""
        dtype = self.spec.precision.compute_dtype
        return jax.eval_shape(lambda p: cast_floats(p, dtype), self.abstract[0].params)


def abstract_mesh(sizes: Mapping[str, int]) -> Any:
    """A mesh of sizes alone, all axes of type Auto."""
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """Costs of one loss and gradient, symbolic in the sizes of the mesh axes."""

    log: CostLog  # collectives, products and writes of one micro-batch
    live_bytes: list[SymbolicBytes]  # the distinct sums of bytes alive at an operation
    problems: tuple[str, ...]  # what could not be costed
    lengths: frozenset[int]  # sizes of the dims that the model names `length`


def propagate_step(
    flat: FlatProgram,
    layout: StepLayout,
    strategy: Strategy,
    *,
    tile_width: int = 1,
    attention: str = "",
) -> StepCosts:
    """Propagates a strategy through a traced gradient, for any size of its axes.

    The layout has the shardings of its arguments and gradients; for `tile_width` and `attention`
    see `Propagator`.
    """
    state, shardings = layout.state, layout.shardings
    ins = _symbolic(shardings.params, state.params, is_param=True)
    gradients = _symbolic(layout.gradients, layout.partition.trained(state.params))
    required: list[Dims | None] = [gradient.dims for gradient in gradients]
    ins += _symbolic(shardings.model_state, state.model_state)
    batch = _symbolic(layout.batch_shardings, layout.batch)
    ins += map(_in_micro_batches, batch, layout.row_dims)
    ins += [replicated(0)]  # the PRNG key
    propagator = Propagator(_make_resolver(strategy), tile_width, attention)
    required += [None] * (len(flat.outputs) - len(required))
    _, live = propagator.run(flat, ins, required)
    distinct = [dict(point) for point in {frozenset(p.items()) for p in live}]
    lengths = find_dim_sizes(flat, dict(strategy.names).get("length", "length"))
    return StepCosts(propagator.costs, distinct, flat.problems, lengths)


def _symbolic(shardings: PyTree, arrays: PyTree, is_param: bool = False) -> list[SymbolicSharding]:
    pairs = zip(jax.tree.leaves(shardings), jax.tree.leaves(arrays), strict=True)
    return [sharding_of_spec(s.spec, len(x.shape), is_param=is_param) for s, x in pairs]


def _in_micro_batches(sharding: SymbolicSharding, row_dim: int | None) -> SymbolicSharding:
    """Rows are split into micro-batches first."""
    dims = sharding.dims
    if row_dim is None:
        return sharding
    return sharding.with_dims(with_dim(dims, row_dim, (MICRO, *dims[row_dim])))


def _make_resolver(strategy: Strategy) -> Callable[..., Dims]:
    table, rows = strategy.activations, dict(strategy.names).get("batch", "batch")
    expert_axes = {kind.axis for kind in strategy.kinds if "experts" in kind.splits}

    def resolve(names: tuple[str | None, ...], shape: tuple[int, ...]) -> Dims:
        if table is None:
            return ((),) * len(names)
        replaced = {ROWS: rows, ROWS_WITHOUT_EXPERT: rows, LOCAL_EXPERTS: None}
        logical = tuple(replaced.get(n or "", n) for n in names)
        dims: list[Axes] = [axes_of(entry) for entry in table.spec(logical)]
        dims += [()] * (len(shape) - len(dims))
        if LOCAL_EXPERTS in names:
            # Rows over (data, expert) become rows over data, and the dim of experts over expert.
            first, *others = dims
            moved = tuple(axis for axis in first if axis in expert_axes)
            dims = [tuple(a for a in first if a not in expert_axes), moved, *others[1:]]
        return tuple(dims)

    return resolve
