"""What a compiled step hands over to be inspected."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .._core.tree import Leaf, ends_path, list_leaves, short_dtype
from ..nn._constrain import GRADIENT_SHARDS
from ..parallel import Strategy, infer_kinds
from ..report import CompiledBytes, Declared, Placed, Program
from ..rules import Rule, place_leaf
from ._activations import Activations, Constraint, constraints
from ._bound_spec import BoundSpec
from ._compile import CompiledProgram as Executable
from ._layout import Layout
from ._unused_rules import idle_rules

# A leaf that names alone leave whole is worth a finding from this many bytes on.
_SMALL = 2**20


def inspected(
    bound: BoundSpec, layout: Layout, made: Executable, retraced: Sequence[str]
) -> Program:
    """Brings an executable and its spec to the form that `Report.of` reads.

    Args:
      bound: the spec and its mesh.
      layout: of its state and batch.
      made: the executable.
      retraced: what changed in its batch each time that the step was compiled again.
    """
    mesh = bound.mesh
    device = mesh.devices.flat[0]
    placed = tuple(arguments(bound, layout))
    return Program(
        hlo=made.compiled.as_text(),
        mesh=tuple(mesh.shape.items()),
        platform=device.platform,
        device_kind=device.device_kind,
        leaves=placed,
        memory=CompiledBytes.of(made.compiled.memory_analysis()),
        jaxpr=made.jaxpr,
        log=made.messages,
        compiles=1 + len(retraced),
        retraced=tuple(retraced),
        declared=_declared(bound, layout, made.jaxpr, placed),
        dcn=_dcn(mesh),
        seconds=dict(zip(("trace", "lower", "compile"), made.seconds, strict=True)),
    )


def _dcn(mesh: Mesh) -> tuple[tuple[str, int], ...]:
    """Mesh axes along which the slice changes, and slices along each."""
    # `slice_index` exists only on devices that know of slices.
    slices = np.vectorize(lambda device: getattr(device, "slice_index", 0))(mesh.devices)
    along = [len(np.unique(_line(slices, dim))) for dim in range(slices.ndim)]
    return tuple((axis, n) for axis, n in zip(mesh.axis_names, along, strict=True) if n > 1)


def _line(grid: np.ndarray, dim: int) -> np.ndarray:
    """The first line of a grid along one dim."""
    return np.moveaxis(grid, dim, 0).reshape(grid.shape[dim], -1)[:, 0]


def arguments(bound: BoundSpec, layout: Layout) -> Iterator[Placed]:
    """The arguments of `(state, batch)` in the executable's order."""
    state, shardings, strategy = layout.state, layout.shardings, bound.spec.strategy
    spelled = _spelled(strategy.params, list_leaves(state.params, layout.axes), bound)
    moments = _spelled(strategy.opt_state, list_leaves(state.opt_state), bound)
    moments |= {
        leaf.path
        for leaf in list_leaves(state.opt_state)
        if any(ends_path(leaf.path, path) for path in spelled)
    }
    model_state = _spelled(strategy.model_state, list_leaves(state.model_state), bound)
    parts = (
        ("rest", {"step": state.step}, shardings.step, set()),
        ("params", state.params, shardings.params, spelled),
        ("opt_state", state.opt_state, shardings.opt_state, moments),
        ("model_state", state.model_state, shardings.model_state, model_state),
        ("rest", {"key": state.key}, shardings.key, set()),
        ("rest", {"halted": state.halted}, shardings.halted, set()),
    )
    names = {"params": layout.axes, "opt_state": _names_of_moments(layout)}
    for part, tree, placed, meant in parts:
        named = names.get(part)
        for leaf, sharding in zip(list_leaves(tree, named), jax.tree.leaves(placed), strict=True):
            whole = leaf.path in meant or leaf.nbytes < _SMALL
            yield Placed(part, leaf, sharding.spec, donated=True, meant_whole=whole)
    placed = jax.tree.leaves(layout.batch_shardings)
    for leaf, sharding in zip(list_leaves(layout.batch), placed, strict=True):
        yield Placed("batch", leaf, sharding.spec)


def _names_of_moments(layout: Layout) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of the state that has a parameter's shape below a path that ends as its own."""
    parameters = list_leaves(layout.state.params, layout.axes)
    return {
        leaf.path: own.axes
        for own in sorted(parameters, key=lambda own: len(own.path))
        for leaf in list_leaves(layout.state.opt_state)
        if own.axes and own.shape == leaf.shape and ends_path(leaf.path, own.path)
    }


def _spelled(rule: Rule | None, of: list[Leaf], bound: BoundSpec) -> set[str]:
    """Paths of the leaves whose layout a user wrote down by path, or spelled `REPLICATED`."""
    if rule is None:
        return set()
    sizes = dict(bound.mesh.shape)
    found = {leaf.path: place_leaf(rule, leaf, sizes).source for leaf in of}
    return {
        path for path, source in found.items() if source.startswith(("REPLICATED", "PathRules"))
    }


def _declared(bound: BoundSpec, layout: Layout, jaxpr: Any, placed: Sequence[Placed]) -> Declared:
    strategy, precision = bound.spec.strategy, bound.spec.precision
    activations = Activations(bound.mesh, strategy.activations, layout.lane_axes)
    named = list(dict.fromkeys(constraints(jaxpr.jaxpr)))
    return Declared(
        kinds=strategy.kinds,
        by_specs=infer_kinds(bound.mesh.shape, placed, strategy.kinds),
        accumulate=bound.spec.accumulate.micro_batches,
        compute_dtype=short_dtype(jnp.dtype(precision.compute_dtype)),
        reduce_dtype=short_dtype(jnp.dtype(precision.reduce_dtype or precision.compute_dtype)),
        activation_bytes=_activation_bytes(bound, layout, jaxpr),
        layers=_layers(strategy, layout),
        choices=_choices(strategy, jaxpr),
        rules=idle_rules(bound, layout, named),
        constraints=tuple(
            Placed("activation", conventional, activations.spec(leaf.axes or ()))
            for leaf, conventional in zip(named, _conventional(strategy, named), strict=True)
        ),
        activation_axes=_activation_axes(bound),
    )


def _activation_axes(bound: BoundSpec) -> tuple[str, ...]:
    """Mesh axes that the strategy splits some activation over, in mesh order."""
    table = bound.spec.strategy.activations
    split = {axis for _, axes in table.table for axis in axes} if table else set()
    return tuple(axis for axis in bound.mesh.shape if axis in split)


def _activation_bytes(bound: BoundSpec, layout: Layout, jaxpr: Any) -> int | None:
    """Bytes of `[batch, length, embed]` on a device, as a model's constraints show it."""
    strategy = bound.spec.strategy
    table = dict(strategy.activations.table) if strategy.activations else {}
    axes = {*layout.row_axes, *table.get(dict(strategy.names).get("length", "length"), ())}
    ways = math.prod(bound.mesh.shape.get(axis, 1) for axis in axes)
    for leaf in _conventional(strategy, constraints(jaxpr.jaxpr)):
        names = dict(zip(leaf.axes or (), leaf.shape, strict=True))
        if (
            {"batch", "length", "embed"}
            <= names.keys()
            <= {"batch", "length", "embed", GRADIENT_SHARDS}
        ):
            row = names["length"] * names["embed"] * jnp.dtype(leaf.dtype).itemsize
            return layout.rows * row // ways
    return None


def _conventional(strategy: Strategy, named: Iterable[Constraint]) -> list[Constraint]:
    """Constraints with the conventional names of their dims, where the strategy renames them."""
    return [dataclasses.replace(x, axes=strategy.conventional_names(x.axes)) for x in named]


def _choices(strategy: Strategy, jaxpr: Any) -> int | None:
    """Length of the dim that a model's constraints name `choices`."""
    for leaf in _conventional(strategy, constraints(jaxpr.jaxpr)):
        if leaf.axes and "choices" in leaf.axes:
            return leaf.shape[leaf.axes.index("choices")]
    return None


def _layers(strategy: Strategy, layout: Layout) -> int | None:
    """Length of the dim that parameters name `layers`."""
    shapes = {leaf.path: leaf.shape for leaf in list_leaves(layout.state.params)}
    for path, names in layout.axes.items():
        names = strategy.conventional_names(names)
        if "layers" in names:
            return shapes[path][names.index("layers")]
    return None
