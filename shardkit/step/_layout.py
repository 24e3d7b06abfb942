"""Resolves a strategy's rules on a mesh: the sharding of every leaf, or every problem at once."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._core.errors import Problem, ShardingError, count, raise_all
from .._core.partition import Partition
from .._core.precision import cast_floats
from .._core.row_dims import RowDims
from .._core.train_state import TrainState
from .._core.tree import Leaf, join_path, leaves_by_path, list_leaves, path_str
from .._core.types import Batch, Follows, Key, Params, PyTree, strip_axes
from ..data import rows_of_shardings
from ..nn._manual_axis_rules import Dims
from ..parallel import (
    Kind,
    Strategy,
    check_axes_used,
    check_composition,
    suggest_options,
    suggest_renames,
    update_specs,
)
from ..rules import Rule, axes_of, check_batch, first_match, format_mesh, resolve_all
from ._batch_rows import BatchRows, arrange_specs
from ._trainable import find_partition
from ._user_functions import check_initial, collect_axes, to_variables
from .optim._extra_args import call_init
from .optim._follow import FollowParams

if TYPE_CHECKING:
    from ._spec import StepSpec

# Key of `state.model_state` for what compression left out of the gradients (error feedback):
# f32[devices, *param] per parameter.
RESIDUALS = "compression"

# Folded into the key of the state for the key that steps draw from.
_STEPS = np.uint32(2**32 - 2)

Specs = Mapping[str, PartitionSpec]
# The abstract state, and `{path: logical axes}` of its parameters.
AbstractState = tuple[TrainState, dict[str, tuple[str | None, ...]]]


@dataclasses.dataclass(frozen=True)
class StepLayout:
    """The abstract state and batch of a step, and the sharding of every leaf."""

    state: TrainState  # `TrainState` of `jax.ShapeDtypeStruct`
    shardings: TrainState  # `TrainState` of `NamedSharding`
    batch: Batch  # pytree of `jax.ShapeDtypeStruct`
    batch_shardings: PyTree  # pytree of `NamedSharding`
    batch_rows: BatchRows  # which dims of the batch count its rows
    # mesh axes of the rows that separate gradient shards. Along an axis over which rows move
    # between devices inside the loss (tokens to their experts), gradients cannot be kept apart.
    # Those that split parameters too come first: in another order XLA on CPU takes parts of the
    # rows for others (benchmarks/xla_faults.py), and shards may be in any.
    shard_axes: tuple[str, ...]
    axes: Mapping[str, tuple[str | None, ...]]  # `{path: logical axes}` of the parameters
    gradients: PyTree  # pytree of `NamedSharding` of the gradients that the update receives
    # pytree of `NamedSharding` of the parameters during the update, where it is split further than
    # the parameters; otherwise None
    update: PyTree | None
    partition: Partition  # which parameters are trained; `gradients` and `update` have these alone

    @property
    def trained_shardings(self) -> PyTree:
        """Pytree of `NamedSharding` of the trained parameters."""
        return self.partition.trained(self.shardings.params)

    @property
    def rows(self) -> int:
        """Number of rows of the global batch; 0 where no leaf has any, or that is unclear."""
        return self.batch_rows.number

    @property
    def row_dims(self) -> RowDims:
        """The dim of each leaf of the batch that counts rows."""
        return self.batch_rows.dims

    @property
    def row_axes(self) -> tuple[str, ...]:
        """Mesh axes that the rows are split over."""
        return self.batch_rows.axes

    @functools.cached_property
    def local_rows(self) -> np.ndarray:
        """Rows of the global batch that the devices of this process hold, i64[n]."""
        return rows_of_shardings(self.batch_shardings, self.rows, self.row_dims)

    @property
    def inner_axes(self) -> tuple[str, ...]:
        """Mesh axes that split the rows inside of a gradient shard."""
        return tuple(axis for axis in self.row_axes if axis not in self.shard_axes)

    @property
    def storage_axes(self) -> tuple[str, ...]:
        """Mesh axes that split both the rows and some parameter."""
        specs = [s.spec for s in jax.tree.leaves(self.shardings.params)]
        split = {axis for spec in specs for entry in spec for axis in axes_of(entry)}
        return tuple(axis for axis in self.row_axes if axis in split)

    def gathered_dims(self, kinds: Sequence[Kind]) -> tuple[tuple[str, Dims], ...]:
        """Path and mesh axes per dim of each parameter that is stored in shards, gathered for use.

        It is gathered over axes that split the rows too, but for those whose kind says otherwise:
        experts stay where they are.
        """
        kept = {kind.axis for kind in kinds} - {k.axis for k in kinds if "weights" in k.splits}
        over, gathered = set(self.storage_axes) - kept, []
        shardings = jax.tree.leaves(self.shardings.params)
        for leaf, sharding in zip(list_leaves(self.state.params), shardings, strict=True):
            whole = [()] * (len(leaf.shape) - len(sharding.spec))
            stored = (*map(axes_of, sharding.spec), *whole)
            dims = tuple(tuple(a for a in axes if a not in over) for axes in stored)
            gathered += [(leaf.path, dims)] if dims != stored else []
        return tuple(gathered)


def build_model_init(spec: "StepSpec", residual_copies: int = 0) -> Callable[[Key], TrainState]:
    """Builds `key → TrainState` with `opt_state=None`.

    `residual_copies` is the number of devices that keep residuals of gradient compression, 0 for
    none.
    """

    def run(key: Key) -> TrainState:
        # `init` gets the key as it is, so that the parameters are those of the user's own call.
        step_key = jax.random.fold_in(key, _STEPS)
        return _assemble_state(spec, spec.init(key), step_key, residual_copies)

    return run


def _assemble_state(
    spec: "StepSpec", initial: PyTree, key: Key, residual_copies: int
) -> TrainState:
    """The state, as yet without `opt_state`, of what `init` returned."""
    variables = to_variables(initial)
    bare = jax.tree.map(jnp.asarray, strip_axes(variables.params))
    partition = find_partition(spec, bare)
    trained = cast_floats(partition.trained(bare), spec.precision.param_dtype)
    params = partition.merge(trained, bare)
    model_state = variables.model_state
    if residual_copies:
        zeros = jax.tree.map(lambda p: jnp.zeros((residual_copies, *p.shape), jnp.float32), trained)
        model_state = {**model_state, RESIDUALS: zeros}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=None,
        model_state=model_state,
        key=key,
        halted=jnp.zeros((), jnp.bool),
    )


def count_residual_copies(strategy: Strategy, mesh: Mesh) -> int:
    """Number of devices that keep residuals of gradient compression; 0 without compression."""
    return mesh.shape.get(strategy.compression.axis, 0) if strategy.compression else 0


def build_optimizer_init(spec: "StepSpec") -> Callable[[Params], PyTree]:
    """Builds `params → opt_state` of the trained parameters, in buffers of its own."""

    def run(params: Params) -> PyTree:
        trained = find_partition(spec, params).trained(params)
        return call_init(spec.optimizer, trained)

    return run


def abstract_state(spec: "StepSpec", residual_copies: int = 0) -> AbstractState:
    """The shapes of the state, and the logical axes that `init` names, from one trace."""
    names: dict[str, tuple[str | None, ...]] = {}

    def run(key: Key) -> TrainState:
        initial = spec.init(key)
        check_initial(initial)
        names.update(collect_axes(to_variables(initial).params))
        state = _assemble_state(spec, initial, key, residual_copies)
        opt_state = build_optimizer_init(spec)(state.params)
        return dataclasses.replace(state, opt_state=opt_state)

    state = jax.eval_shape(run, jax.eval_shape(lambda: jax.random.key(0)))
    for name in ("params", "model_state", "opt_state"):
        leaves_by_path(getattr(state, name), name)  # refuses two leaves of one path
    # Shapes that are evaluated under a mesh name it.
    return jax.tree.map(lambda x: x.update(sharding=None), state), names


def resolve_layout(
    spec: "StepSpec",
    mesh: Mesh,
    *,
    strategy: Strategy | None = None,
    micro_batches: int | None = None,
    abstract: AbstractState | None = None,
) -> StepLayout:
    """Resolves every rule of a strategy, by default the spec's own, on a mesh.

    `micro_batches`, else those of the spec, must divide the rows. `abstract`, the result of
    `abstract_state`, resolves many meshes from one trace of `init`. Raises ShardingError if the
    strategies do not fit each other or the mesh; or with every leaf of parameters, optimizer state,
    model_state and batch that cannot be laid out.
    """
    strategy, batch, sizes = strategy or spec.strategy, spec.batch, dict(mesh.shape)
    micro_batches = micro_batches or spec.accumulate.micro_batches
    check_composition(strategy, sizes)
    state, names = abstract or abstract_state(spec, count_residual_copies(strategy, mesh))
    partition = find_partition(spec, state.params)
    resolver = _Resolver(spec, strategy, sizes)
    specs, problems = resolver.resolve((state, names), partition), resolver.problems
    leaves = list_leaves(batch)
    rows = BatchRows.of(leaves, specs.batch, strategy, spec.row_dims)
    by_spec = isinstance(strategy.batch, PartitionSpec)
    if rows.problem and (micro_batches > 1 or (by_spec and rows.axes)):
        problems.append(rows.problem)
    elif micro_batches > 1:
        problems += _split_problems(rows, leaves, sizes, micro_batches)
    failed = count(len({problem.subject for problem in problems}), "leaf")
    raise_all(ShardingError, f"{failed} cannot be laid out on mesh {format_mesh(sizes)}.", problems)
    check_axes_used(strategy, sizes, specs.mesh_axes)

    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = TrainState(
        step=replicated,
        params=_build_shardings(state.params, specs.params, mesh),
        opt_state=_build_shardings(state.opt_state, specs.opt_state, mesh),
        model_state=_build_shardings(state.model_state, specs.model_state, mesh),
        key=replicated,
        halted=replicated,
    )
    trained = partition.trained(state.params)
    update = _build_shardings(trained, specs.update, mesh) if strategy.zero else None
    scatters_gradients = strategy.zero is not None and strategy.zero.stage == 2
    moves_rows = {override.axis for _, override in strategy.overrides if override.moves_rows}
    return StepLayout(
        state=state,
        shardings=shardings,
        batch=batch,
        batch_shardings=_build_shardings(batch, specs.batch, mesh),
        batch_rows=rows,
        shard_axes=_weights_first([a for a in rows.axes if a not in moves_rows], specs.params),
        axes=names,
        gradients=update if scatters_gradients else partition.trained(shardings.params),
        update=update,
        partition=partition,
    )


def _weights_first(axes: Sequence[str], specs: Specs) -> tuple[str, ...]:
    split = {axis for spec in specs.values() for entry in spec for axis in axes_of(entry)}
    return tuple(sorted(axes, key=lambda axis: axis not in split))


@dataclasses.dataclass(frozen=True)
class _Specs:
    """The spec of every leaf, `{path: spec}` per tree; `update` is of parameters in the update."""

    params: Specs
    update: Specs
    opt_state: Specs
    model_state: Specs
    batch: Specs

    @property
    def mesh_axes(self) -> set[str]:
        """Mesh axes that split a leaf that is stored, or of the batch."""
        trees = (self.params, self.opt_state, self.model_state, self.batch)
        specs = [spec for tree in trees for spec in tree.values()]
        return {axis for spec in specs for entry in spec for axis in axes_of(entry)}


@dataclasses.dataclass(frozen=True)
class _Resolver:
    """Resolves the rules of a strategy on a mesh of these sizes, and collects the problems."""

    spec: "StepSpec"
    strategy: Strategy
    sizes: Mapping[str, int]
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def resolve(self, abstract: AbstractState, partition: Partition) -> _Specs:
        """The spec of every leaf that can be laid out."""
        (state, names), strategy = abstract, self.strategy
        params = list_leaves(state.params, names)
        specs = self._resolve_rule(strategy.params, params, "params", self.spec.follows)
        self.problems[:] = suggest_renames(self.problems, strategy)
        trained = [leaf for leaf in params if leaf.path not in partition.frozen]
        model_state = state.model_state
        residuals: Specs = {}
        if strategy.compression:
            model_state = {k: x for k, x in model_state.items() if k != RESIDUALS}
            kept = {leaf.path: specs[leaf.path] for leaf in trained if leaf.path in specs}
            residuals = _residual_specs(strategy.compression.axis, kept)
        model_leaves = list_leaves(model_state)
        model_specs = self._resolve_rule(strategy.model_state, model_leaves, "model_state")
        update = update_specs(strategy.zero, trained, specs, self.sizes)
        moments = list_leaves(state.opt_state)
        # `specs` lacks a parameter that cannot be laid out. Its moments pass as replicated, so that
        # the error names the parameter once and not once more for mu and nu.
        follow = FollowParams(
            tuple((leaf, update.get(leaf.path, PartitionSpec())) for leaf in trained),
            frozenset(leaf.path for leaf in moments),
        )
        rule = first_match(strategy.opt_state, follow) if strategy.opt_state else follow
        return _Specs(
            params=specs,
            update=update,
            opt_state=self._resolve_rule(rule, moments, "opt_state"),
            model_state={**model_specs, **residuals},
            batch=self._resolve_batch(list_leaves(self.spec.batch)),
        )

    def _resolve_rule(
        self, rule: Rule, of: Sequence[Leaf], tree: str, follows: Sequence[Follows] = ()
    ) -> dict[str, PartitionSpec]:
        what = f"leaves of {tree}"
        specs, failures = resolve_all(rule, of, self.sizes, what=what, field=tree, follows=follows)
        self._add(tree, of, suggest_options(failures, self.sizes))
        return specs

    def _resolve_batch(self, of: Sequence[Leaf]) -> dict[str, PartitionSpec]:
        rule = self.strategy.batch
        if not isinstance(rule, PartitionSpec):
            return self._resolve_rule(rule, of, "batch")
        specs = arrange_specs(rule, of, self.spec.row_dims)
        self._add("batch", of, check_batch(of, specs, self.sizes))
        return specs

    def _add(self, tree: str, of: Sequence[Leaf], problems: Sequence[Problem]) -> None:
        """Prefixes subjects with their tree: a parameter and a batch leaf can share a path."""
        full = {str(leaf): str(leaf.within(tree)) for leaf in of}
        self.problems.extend(
            dataclasses.replace(p, subject=full.get(p.subject, p.subject)) for p in problems
        )


def _residual_specs(axis: str, specs: Specs) -> dict[str, PartitionSpec]:
    """Specs of `f32[devices, *param]`: each device along `axis` holds its own residuals."""

    def residual_spec(param: PartitionSpec) -> PartitionSpec:
        # `_problems.compression_problems` rejects a parameter that is split over the axis itself.
        is_split = axis in (name for entry in param for name in axes_of(entry))
        return PartitionSpec(axis) if is_split else PartitionSpec(axis, *param)

    return {join_path(RESIDUALS, path): residual_spec(param) for path, param in specs.items()}


def _split_problems(
    rows: BatchRows, of: Sequence[Leaf], sizes: Mapping[str, int], micro_batches: int
) -> list[Problem]:
    """Why the rows of a batch do not split into micro-batches."""
    unit = micro_batches * math.prod(sizes.get(axis, 1) for axis in rows.axes)
    if rows.number % unit == 0:
        return []
    first = next(leaf for leaf, dim in zip(of, rows.dims, strict=True) if dim is not None)
    split = " x ".join(f"{axis}={sizes.get(axis, 1)}" for axis in rows.axes) or "1 device"
    why = f"{rows.number} rows do not split into accumulate={micro_batches} micro-batches over "
    fix = f"a multiple of {unit} rows, such as {max(unit, round(rows.number / unit) * unit)}"
    return [Problem(str(first.within("batch")), why + split, fix)]


def _build_shardings(tree: PyTree, specs: Specs, mesh: Mesh) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, specs[path_str(path)]), tree
    )
