"""Builds the `Program` of a compiled step, from which a report is compiled."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import Mesh

from .._core.scope_markers import OWNED, RING_BLOCKS, UNDIVIDED
from .._core.tracing import SETTINGS, recorded_facts
from .._core.tree import Leaf, list_leaves, path_ends, short_dtype
from ..nn._constrain import GRADIENT_SHARDS
from ..parallel import CONVENTIONAL, Strategy, infer_kinds
from ..report import (
    CompiledBytes,
    Declarations,
    PlacedLeaf,
    Program,
    TickTable,
    find_batch_axes,
    restore_paths,
)
from ..rules import (
    AxisRules,
    DeadEntry,
    Rule,
    find_dead_entries,
    list_ruled,
    list_rules,
    place_leaf,
)
from ._activations import Activations, constraints
from ._bound_spec import BoundSpec
from ._governing import find_governing_constraints
from ._layout import StepLayout
from ._own_constraints import DROPPED

if TYPE_CHECKING:
    from ._compile import CompiledProgram


def find_unused_rules(
    bound: BoundSpec, layout: StepLayout, constrained: Sequence[Leaf]
) -> tuple[str, ...]:
    """Lists the entries of a strategy's rules that decide nothing, as text.

    It omits logical axes that `sk.strategies` list for any model, and a last `**`. Leaves in
    `constrained` are the model's constraints, with their logical axes.
    """
    strategy, state = bound.spec.strategy, layout.state
    params = list_leaves(state.params, layout.axes)
    uses: list[tuple[str, object, Sequence[Leaf]]] = [
        ("params", strategy.params, list_ruled(params, bound.spec.follows)),
        ("opt_state", strategy.opt_state, list_leaves(state.opt_state)),
        ("model_state", strategy.model_state, list_leaves(state.model_state)),
        ("batch", strategy.batch, list_leaves(layout.batch)),
        ("activations", strategy.activations, [_drop_mapped_dims(leaf) for leaf in constrained]),
    ]
    sizes = dict(bound.mesh.shape)
    return tuple(
        f"{field}: {entry}"
        for field, rule, of in uses
        if isinstance(rule, Rule) and of
        for entry in find_dead_entries(
            rule, [place_leaf(rule, leaf, sizes) for leaf in of if leaf.shape]
        )
        if not _is_expected(entry, rule)
    )


def _drop_mapped_dims(leaf: Leaf) -> Leaf:
    """A constraint without the names of dims that a `jax.vmap` added."""
    names = tuple(None if n and n.startswith("(") else n for n in leaf.axes or ())
    return dataclasses.replace(leaf, axes=names)


def _is_expected(unused: DeadEntry, rule: Rule) -> bool:
    """Whether an unused entry needs no report."""
    name = unused.entry.key
    if name == "**":
        return True
    if name not in CONVENTIONAL:
        return False
    return not unused.matched or name not in set(_mapped_axes(rule))


def _mapped_axes(rule: Rule) -> Iterator[str]:
    """Logical axes that tables in a rule map to a mesh axis."""
    for part in list_rules(rule):
        if isinstance(part, AxisRules):
            yield from (name for name, axes in part.table if axes)


# From this many bytes on, a leaf that only its axis names leave replicated is worth a finding.
_SMALL = 2**20
_NO_STACKS = (
    "the program was traced without stacks (jax_include_full_tracebacks_in_locations is off): "
    "functions and callers of lines are unknown, and lines that only libraries have."
)
# Rules whose user wrote the layout of a leaf by its path, or as `REPLICATED`.
_EXPLICIT = ("REPLICATED", "PathRules")


def build_program(
    bound: BoundSpec, layout: StepLayout, compiled: "CompiledProgram", retraced: Sequence[str]
) -> Program:
    """Collects what `Report.of` reads from an executable, its spec and the layout of its state.

    `retraced` says how each other compiled batch variant differs, as text.
    """
    mesh = bound.mesh
    device = mesh.devices.flat[0]
    placed, hlo = tuple(list_arguments(bound, layout)), restore_paths(compiled.hlo)
    notes = _list_notes(bound, compiled.jaxpr.jaxpr)
    return Program(
        hlo=hlo,
        mesh=tuple(mesh.shape.items()),
        platform=device.platform,
        device_kind=device.device_kind,
        leaves=placed,
        memory=CompiledBytes.of(compiled.compiled.memory_analysis()),
        jaxpr=compiled.jaxpr,
        log=compiled.messages,
        compiles=1 + len(retraced),
        retraced=tuple(retraced),
        declared=_build_declared(bound, layout, compiled.jaxpr, placed),
        dcn=_dcn_axes(mesh),
        notes=(*notes, *([_NO_STACKS] if hlo != compiled.hlo else [])),
        ticks=tuple(_list_ticks(bound)),
        seconds=dict(zip(("trace", "lower", "compile"), compiled.seconds, strict=True)),
    )


def _list_notes(bound: BoundSpec, jaxpr: core.Jaxpr) -> Iterator[str]:
    if bound.were_explicit:
        axes = ", ".join(bound.were_explicit)
        yield f"mesh axes of type Explicit are taken as Auto, the partitioner's: {axes}."
    for place, spec, *axes in recorded_facts(jaxpr, DROPPED):
        split = ", ".join(map(str, axes))
        yield f"{place}: {spec} splits a gradient shard no further over {split}."


def _list_ticks(bound: BoundSpec) -> Iterator[TickTable]:
    for _, override in bound.spec.strategy.overrides:
        if table := override.tick_table(dict(bound.mesh.shape)):
            yield TickTable(override.axis, *table)


def _dcn_axes(mesh: Mesh) -> tuple[tuple[str, int], ...]:
    """Mesh axes along which the slice changes, with the number of slices along each."""
    # Only TPU devices have a `slice_index`.
    slices = np.vectorize(lambda device: getattr(device, "slice_index", 0))(mesh.devices)
    along = [len(np.unique(_first_line_along(slices, dim))) for dim in range(slices.ndim)]
    return tuple((axis, n) for axis, n in zip(mesh.axis_names, along, strict=True) if n > 1)


def _first_line_along(grid: np.ndarray, dim: int) -> np.ndarray:
    """The first 1-d line of a grid along one dim."""
    return np.moveaxis(grid, dim, 0).reshape(grid.shape[dim], -1)[:, 0]


def list_arguments(bound: BoundSpec, layout: StepLayout) -> Iterator[PlacedLeaf]:
    """The arguments of `(state, batch)` in the executable's order."""
    state, shardings, strategy = layout.state, layout.shardings, bound.spec.strategy
    params = _deciding_rules(strategy.params, list_leaves(state.params, layout.axes), bound)
    # The layout of such a leaf is declared, also where it is whole.
    params |= {f.path: f"REPLICATED, or split like {f.of}" for f in bound.spec.follows}
    moments = _deciding_rules(strategy.opt_state, list_leaves(state.opt_state), bound)
    moments |= {
        leaf.path: next((params[end] for end in path_ends(leaf.path) if end in params), "")
        for leaf in list_leaves(state.opt_state)
        if leaf.path not in moments
    }
    model_state = _deciding_rules(strategy.model_state, list_leaves(state.model_state), bound)
    parts = (
        ("rest", {"step": state.step}, shardings.step, {}),
        ("params", state.params, shardings.params, params),
        ("opt_state", state.opt_state, shardings.opt_state, moments),
        ("model_state", state.model_state, shardings.model_state, model_state),
        ("rest", {"key": state.key}, shardings.key, {}),
        ("rest", {"halted": state.halted}, shardings.halted, {}),
    )
    names = {"params": layout.axes, "opt_state": _moment_axes(layout)}
    for part, tree, placed, rules in parts:
        named = names.get(part)
        for leaf, sharding in zip(list_leaves(tree, named), jax.tree.leaves(placed), strict=True):
            rule = rules.get(leaf.path, "")
            yield PlacedLeaf(
                part,
                leaf,
                sharding.spec,
                donated=not SETTINGS.jax_debug_nans,
                declared_replicated=rule.startswith(_EXPLICIT) or leaf.nbytes < _SMALL,
                declared_by=rule,
                frozen=part == "params" and leaf.path in layout.partition.frozen,
            )
    placed = jax.tree.leaves(layout.batch_shardings)
    for leaf, sharding in zip(list_leaves(layout.batch), placed, strict=True):
        yield PlacedLeaf("batch", leaf, sharding.spec, declared_by="the batch spec")


def _moment_axes(layout: StepLayout) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of optimizer state: those of the parameter with its shape and path suffix."""
    params = list_leaves(layout.state.params, layout.axes)
    named = {(leaf.path, leaf.shape): leaf.axes for leaf in params if leaf.axes}
    found = {
        moment.path: [
            named[end, moment.shape]
            for end in path_ends(moment.path)
            if (end, moment.shape) in named
        ]
        for moment in list_leaves(layout.state.opt_state)
    }
    return {path: axes[0] for path, axes in found.items() if axes}


def _deciding_rules(rule: Rule | None, of: list[Leaf], bound: BoundSpec) -> dict[str, str]:
    """Path of each leaf → the entry of the rule that decided its spec."""
    if rule is None:
        return {}
    sizes = dict(bound.mesh.shape)
    return {leaf.path: place_leaf(rule, leaf, sizes).source for leaf in of}


def _build_declared(
    bound: BoundSpec, layout: StepLayout, jaxpr: core.ClosedJaxpr, placed: Sequence[PlacedLeaf]
) -> Declarations:
    strategy, precision = bound.spec.strategy, bound.spec.precision
    activations = Activations(bound.mesh, strategy.activations, layout.shard_axes)
    compute = precision.compute_dtypes(layout.state.params).only
    reduce = precision.reduce_dtype or compute
    constrained = list(dict.fromkeys(constraints(jaxpr.jaxpr)))
    rows = find_batch_axes(placed, strategy.kinds, layout.row_axes)
    governing, odd, split_dims = find_governing_constraints(jaxpr.jaxpr, activations, placed, rows)
    ring_blocks = [cast(int, blocks) for (blocks,) in recorded_facts(jaxpr.jaxpr, RING_BLOCKS)]
    return Declarations(
        kinds=strategy.kinds,
        by_specs=infer_kinds(bound.mesh.shape, placed, strategy.kinds),
        accumulate=bound.spec.accumulate.micro_batches,
        reduce_at_end=bound.spec.accumulate.reduce == "end",
        compute_dtype=compute and short_dtype(jnp.dtype(compute)),
        reduce_dtype=reduce and short_dtype(jnp.dtype(reduce)),
        activation_bytes=_activation_bytes(bound, layout, constrained),
        layers=_dim_size("layers", list_leaves(layout.state.params, layout.axes), strategy),
        choices=_dim_size("choices", constrained, strategy),
        ring_blocks=min(ring_blocks, default=None),
        rules=find_unused_rules(bound, layout, constrained),
        constraints=tuple(
            PlacedLeaf(
                "activation", _conventional(leaf, strategy), activations.spec(leaf.axes or ())
            )
            for leaf in constrained
        ),
        activation_axes=_activation_axes(bound),
        row_axes=layout.row_axes,
        undivided=bool(recorded_facts(jaxpr.jaxpr, UNDIVIDED)),
        owned=cast(tuple[tuple[str, float], ...], tuple(*recorded_facts(jaxpr.jaxpr, OWNED))),
        governing=tuple(governing),
        odd=tuple(odd),
        split_dims=tuple(split_dims),
    )


def _activation_axes(bound: BoundSpec) -> tuple[str, ...]:
    """Mesh axes that the strategy splits some activation over, in mesh order."""
    table = bound.spec.strategy.activations
    split = {axis for _, axes in table.table for axis in axes} if table else set()
    return tuple(axis for axis in bound.mesh.shape if axis in split)


def _activation_bytes(
    bound: BoundSpec, layout: StepLayout, constrained: Sequence[Leaf]
) -> int | None:
    """Bytes per device of `[batch, length, embed]`, from a constraint with these names."""
    strategy = bound.spec.strategy
    table = dict(strategy.activations.table) if strategy.activations else {}
    axes = {*layout.row_axes, *table.get(dict(strategy.names).get("length", "length"), ())}
    devices = math.prod(bound.mesh.shape.get(axis, 1) for axis in axes)
    for leaf in (_conventional(leaf, strategy) for leaf in constrained):
        names = dict(zip(leaf.axes or (), leaf.shape, strict=True))
        if (
            {"batch", "length", "embed"}
            <= names.keys()
            <= {"batch", "length", "embed", GRADIENT_SHARDS}
        ):
            row = names["length"] * names["embed"] * jnp.dtype(leaf.dtype).itemsize
            return layout.rows * row // devices
    return None


def _conventional(leaf: Leaf, strategy: Strategy) -> Leaf:
    """The leaf with the conventional names of its dims, where the strategy renames them."""
    if leaf.axes is None:
        return leaf
    return dataclasses.replace(leaf, axes=strategy.conventional_names(leaf.axes))


def _dim_size(name: str, of: Iterable[Leaf], strategy: Strategy) -> int | None:
    """Size of the first dim with this logical axis, by its conventional name."""
    for leaf in (_conventional(leaf, strategy) for leaf in of):
        if leaf.axes and name in leaf.axes:
            return leaf.shape[leaf.axes.index(name)]
    return None
