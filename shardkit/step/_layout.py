"""From a spec to shardings: abstract state, every rule resolved, every failure at once."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._core.errors import Problem, ShardingError, count, raise_all
from .._core.precision import Precision, cast_floats
from .._core.train_state import TrainState
from .._core.tree import Leaf, join_path, list_leaves, path_str
from .._core.types import Variables, WithAxes
from ..parallel import Strategy, check_axes_used, check_composition, suggest_options, update_specs
from ..rules import Rule, axes_of, check_batch, first_match, format_mesh, resolve_all
from .optim._follow import FollowParams

# Where `state.model_state` keeps what compression left out, one copy of each parameter per device.
RESIDUALS = "compression"

Specs = Mapping[str, PartitionSpec]
# The state's shapes, and the logical axes of its parameters.
Abstract = tuple[TrainState, dict[str, tuple[str | None, ...]]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The abstract state and batch of a step, and where every leaf of them lives.

    Attributes:
      state: `TrainState` of `jax.ShapeDtypeStruct`.
      shardings: `TrainState` of `NamedSharding`.
      batch: pytree of `jax.ShapeDtypeStruct`.
      batch_shardings: pytree of `NamedSharding`.
      rows: number of rows of the global batch; 0 where no leaf has a dim.
      row_axes: mesh axes that the rows are split over.
      manual_row_axes: those of them that lanes may be split over: where rows leave their device inside
        the loss (tokens for experts), no lane can end at the device's border.
      axes: `{path: logical axes}` of the parameters.
      gradients: pytree of `NamedSharding`, how gradients are left for the update.
      update: pytree of `NamedSharding`, how parameters are split for the update; None where the
        update is computed as the parameters lie.
    """

    state: TrainState
    shardings: TrainState
    batch: Any
    batch_shardings: Any
    rows: int
    row_axes: tuple[str, ...]
    lane_axes: tuple[str, ...]
    axes: Mapping[str, tuple[str | None, ...]]
    gradients: Any
    update: Any

    @property
    def storing(self) -> tuple[str, ...]:
        """Mesh axes of the rows that parameters are split over too."""
        specs = [s.spec for s in jax.tree.leaves(self.shardings.params)]
        split = {axis for spec in specs for entry in spec for axis in axes_of(entry)}
        return tuple(axis for axis in self.row_axes if axis in split)


def initial_state(
    init: Callable[[Any], Any], precision: Precision, copies: int = 0
) -> Callable[[Any], TrainState]:
    """Builds `key → TrainState`, as yet without the optimizer's state.

    Args:
      init: `key → params` or `key → Variables`.
      precision: dtype of the parameters.
      copies: devices that each keep what compression left out of their gradients; 0 for none.
    """

    def run(key: Any) -> TrainState:
        for_init, for_steps = jax.random.split(key)
        made = _as_variables(init(for_init))
        params = _bare(made, precision)
        model_state = _with_residuals(made.model_state, params, copies)
        return _first_state(params, None, model_state, for_steps)

    return run


def _first_state(params: Any, opt_state: Any, model_state: Any, key: Any) -> TrainState:
    return TrainState(
        jnp.zeros((), jnp.int32), params, opt_state, model_state, key, jnp.zeros((), jnp.bool)
    )


def compressing(strategy: Strategy, mesh: Mesh) -> int:
    """Number of devices between which gradients are compressed; 0 where they are not."""
    return mesh.shape.get(strategy.compression.axis, 0) if strategy.compression else 0


def _with_residuals(model_state: Any, params: Any, copies: int) -> Any:
    if not copies:
        return model_state
    zeros = jax.tree.map(lambda p: jnp.zeros((copies, *p.shape), jnp.float32), params)
    return {**model_state, RESIDUALS: zeros}


def initial_optimizer(optimizer: optax.GradientTransformation) -> Callable[[Any], Any]:
    """Builds `params → opt_state`, as arrays that share no buffer with the parameters."""

    def run(params: Any) -> Any:
        return jax.tree.map(lambda x: jnp.array(x, copy=True), optimizer.init(params))

    return run


def _bare(made: Variables, precision: Precision) -> Any:
    bare = jax.tree.map(lambda x: x.value if _named(x) else x, made.params, is_leaf=_named)
    return cast_floats(jax.tree.map(jnp.asarray, bare), precision.param_dtype)


def abstract_state(
    init: Callable[[Any], Any],
    optimizer: optax.GradientTransformation,
    precision: Precision,
    copies: int,
) -> Abstract:
    """The state's shapes, and the logical axes that `init` named, from one trace."""
    names: dict[str, tuple[str | None, ...]] = {}

    def run(key: Any) -> TrainState:
        made = _as_variables(init(key))
        names.update(_axis_names(made.params))
        params = _bare(made, precision)
        opt_state = initial_optimizer(optimizer)(params)
        model_state = _with_residuals(made.model_state, params, copies)
        return _first_state(params, opt_state, model_state, key)

    return jax.eval_shape(run, jax.eval_shape(lambda: jax.random.key(0))), names


def resolve_layout(
    init: Callable[[Any], Any],
    optimizer: optax.GradientTransformation,
    batch: Any,
    mesh: Mesh,
    strategy: Strategy,
    precision: Precision,
    steps: int,
    abstract: Abstract | None = None,
) -> Layout:
    """Resolves every rule of a strategy on a mesh.

    Args:
      init: `key → params` or `key → Variables`.
      optimizer: any optax chain.
      batch: pytree of abstract arrays.
      mesh: the device mesh.
      strategy: the declared layout.
      precision: dtype of the parameters.
      steps: micro-batches per step, which the rows must divide into.
      abstract: what `abstract_state` returned, for many meshes; None traces `init` for this one.

    Raises:
      ShardingError: the strategies fit neither each other nor the mesh; or with every leaf of
        parameters, optimizer state, model_state and batch that cannot be laid out.
    """
    sizes = dict(mesh.shape)
    check_composition(strategy, sizes)
    copies = compressing(strategy, mesh)
    state, names = abstract or abstract_state(init, optimizer, precision, copies)

    problems: list[Problem] = []
    params = list_leaves(state.params, names)
    specs = _resolved(strategy.params, params, sizes, "params", problems)
    models = (
        {k: x for k, x in state.model_state.items() if k != RESIDUALS}
        if copies
        else state.model_state
    )
    model_state = _resolved(
        strategy.model_state, list_leaves(models), sizes, "model_state", problems
    )
    if strategy.compression:
        model_state |= _residual_specs(strategy.compression.axis, specs)
    # A parameter that could not be laid out is reported once, not again for its moments.
    moments = list_leaves(state.opt_state)
    updated = update_specs(strategy.zero, params, specs, sizes)
    follow = FollowParams(
        tuple((p, updated.get(p.path, PartitionSpec())) for p in params),
        frozenset(leaf.path for leaf in moments),
    )
    rule = first_match(strategy.opt_state, follow) if strategy.opt_state else follow
    opt_state = _resolved(rule, moments, sizes, "opt_state", problems)
    batch_leaves = list_leaves(batch)
    batch_specs = _batch_specs(strategy, batch_leaves, sizes, problems)
    rows, row_axes = _rows(batch_leaves, batch_specs, sizes, steps, problems)
    lost = count(len({problem.subject for problem in problems}), "leaf")
    raise_all(ShardingError, f"{lost} cannot be laid out on mesh {format_mesh(sizes)}.", problems)
    placements = [
        *specs.values(),
        *model_state.values(),
        *opt_state.values(),
        *batch_specs.values(),
    ]
    check_axes_used(strategy, sizes, {axis for spec in placements for e in spec for axis in axes_of(e)})

    scalar = NamedSharding(mesh, PartitionSpec())
    shardings = TrainState(
        step=scalar,
        params=_shardings(state.params, specs, mesh),
        opt_state=_shardings(state.opt_state, opt_state, mesh),
        model_state=_shardings(state.model_state, model_state, mesh),
        key=scalar,
        halted=scalar,
    )
    placed = _shardings(batch, batch_specs, mesh)
    split = _shardings(state.params, updated, mesh) if strategy.zero else None
    left = split if strategy.zero and strategy.zero.stage == 2 else shardings.params
    carried = {override.axis for _, override in strategy.overrides if override.moves_rows}
    lanes = tuple(axis for axis in row_axes if axis not in carried)
    return Layout(state, shardings, batch, placed, rows, row_axes, lanes, names, left, split)


def _axis_names(params: Any) -> dict[str, tuple[str | None, ...]]:
    boxed = [
        (path_str(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_named)
        if _named(leaf)
    ]
    problems = [
        Problem(
            join_path("params", path),
            f"{len(leaf.axes)} names {leaf.axes} for {leaf.value.ndim} dims",
        )
        for path, leaf in boxed
        if len(leaf.axes) != leaf.value.ndim
    ]
    raise_all(ShardingError, "Logical axes do not fit.", problems, "one name or None per dim")
    return {path: tuple(leaf.axes) for path, leaf in boxed}


def _resolved(
    rule: Rule, of: Sequence[Leaf], sizes: Mapping[str, int], tree: str, problems: list[Problem]
) -> dict[str, PartitionSpec]:
    specs, found = resolve_all(rule, of, sizes, what=f"leaves of {tree}")
    problems += _in_tree(tree, of, suggest_options(found, sizes))
    return specs


def _in_tree(tree: str, of: Sequence[Leaf], problems: Sequence[Problem]) -> list[Problem]:
    """Says which tree a leaf is of: a parameter and a batch leaf may have the same path."""
    full = {str(leaf): str(leaf.within(tree)) for leaf in of}
    return [dataclasses.replace(p, subject=full.get(p.subject, p.subject)) for p in problems]


def _residual_specs(axis: str, specs: Specs) -> dict[str, PartitionSpec]:
    """Each device along an axis holds its own copy, split as the parameter is."""

    def spec(own: PartitionSpec) -> PartitionSpec:
        # A parameter that is split over the axis itself is refused when its gradients are planned.
        taken = axis in (name for entry in own for name in axes_of(entry))
        return PartitionSpec(axis) if taken else PartitionSpec(axis, *own)

    return {join_path(RESIDUALS, path): spec(own) for path, own in specs.items()}


def _batch_specs(
    strategy: Strategy, of: Sequence[Leaf], sizes: Mapping[str, int], problems: list[Problem]
) -> dict[str, PartitionSpec]:
    if not isinstance(strategy.batch, PartitionSpec):
        return _resolved(strategy.batch, of, sizes, "batch", problems)
    entries = tuple(strategy.batch)
    specs = {leaf.path: PartitionSpec(*entries[: len(leaf.shape)]) for leaf in of}
    problems += _in_tree("batch", of, check_batch(of, specs, sizes))
    return specs


def _rows(
    of: Sequence[Leaf], specs: Specs, sizes: Mapping[str, int], steps: int, problems: list[Problem]
) -> tuple[int, tuple[str, ...]]:
    """Rows of the batch and the mesh axes that split them: the same for every leaf."""
    with_rows = [leaf for leaf in of if leaf.shape]
    if not with_rows:
        return 0, ()
    first = with_rows[0]
    spec = specs.get(first.path, PartitionSpec())
    axes = axes_of(spec[0]) if len(spec) else ()
    for leaf in with_rows[1:]:
        if leaf.shape[0] != first.shape[0]:
            why = f"has {leaf.shape[0]} rows, {first.path} has {first.shape[0]}"
            problems.append(
                Problem(str(leaf.within("batch")), why, "dim 0 of every batch leaf counts rows")
            )
    ways = 1
    for axis in axes:
        ways *= sizes.get(axis, 1)
    rows = first.shape[0]
    if steps > 1 and rows % (steps * ways):
        split = " x ".join(f"{axis}={sizes.get(axis, 1)}" for axis in axes) or "1 device"
        why = f"{rows} rows do not split into accumulate={steps} micro-batches over {split}"
        fix = f"a multiple of {steps * ways} rows, such as {_near(rows, steps * ways)}"
        problems.append(Problem(str(first.within("batch")), why, fix))
    return rows, axes


def _near(rows: int, unit: int) -> int:
    return max(unit, round(rows / unit) * unit)


def _shardings(tree: Any, specs: Specs, mesh: Mesh) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, specs[path_str(path)]), tree
    )


def _as_variables(made: Any) -> Variables:
    return made if isinstance(made, Variables) else Variables(made, {})


def _named(x: Any) -> bool:
    return isinstance(x, WithAxes)
