"""Searches for arrays whose layout disagrees with the strategy, or with that of their uses."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from jax.sharding import PartitionSpec

from ..._core.tracing import equations
from ..._core.tree import path_to_glob
from .._placed_leaf import PlacedLeaf
from .._program import Program
from ..communication._governing import find_governing
from ..communication._ledger import LedgerRow
from ..hlo._hlo import parse_shapes
from ..hlo._source_lines import Sources
from ..hlo._sources import ComputedError, find_argument
from ..memory._saved import SavedActivation, find_saved_activations
from ._finding import SMALL, Finding, about_rows
from ._messages import InvoluntaryRemat, find_involuntary_remats, format_spec

# Saved activations below 1 MiB are not worth a constraint.
_LARGE = 2**20


def involuntary_remats(program: Program) -> Iterator[Finding]:
    """What XLA itself warns of: arrays that it gathers whole to change their layout."""
    remats = find_involuntary_remats(program.log, program.mesh)
    sources = Sources(program.hlo, program.module) if remats else None
    for remat in remats:
        yield Finding(
            "involuntary_remat",
            scope=remat.scope,
            axes=remat.axes,
            bytes=remat.nbytes,
            source=sources.at(remat.place) if sources else None,
            why=f"{remat.shape} goes from {remat.source} to {remat.target}; XLA gathers it whole "
            "on every device first, since it has no direct path",
            fix=f"{_suggest_constraint_between(remat, program)}; then measure: removing it is not "
            "always faster",
        )


def _suggest_constraint_between(remat: InvoluntaryRemat, program: Program) -> str:
    """A constraint that lets one mesh axis move at a time, in logical axis names if possible."""
    if not remat.between:
        return "constrain producer and consumer to specs that differ in one dim"
    names = {
        axes: name
        for leaf in program.declared.constraints
        for name, axes in zip(leaf.leaf.axes or (), leaf.dims(), strict=False)
        if axes and name
    }
    code = f"jax.lax.with_sharding_constraint(x, NamedSharding(mesh, {format_spec(remat.between)}))"
    if all(axes in names for axes in remat.between if axes):
        dims = ", ".join(repr(names[axes]) if axes else "None" for axes in remat.between)
        code = f"sk.nn.constrain(x, {dims})"
    return f"{code} in between, so that one mesh axis moves at a time"


def replicated_leaves(program: Program) -> Iterator[Finding]:
    """State that every device holds whole though no rule declares it replicated."""
    axes = tuple(name for name, size in program.mesh if size > 1)
    for leaf in program.leaves:
        state = leaf.part in ("params", "opt_state", "model_state")
        if not axes or not state or leaf.declared_replicated or leaf.axes() or not leaf.leaf.shape:
            continue
        yield Finding(
            "replicated",
            leaf=leaf.name,
            axes=axes,
            bytes=leaf.device_bytes(program.sizes),
            why=f"all {math.prod(program.sizes.values())} devices hold the whole of "
            f"{leaf.leaf}, and no rule declares it",
            fix=_suggest_rule(leaf, program.mesh),
        )


def _suggest_rule(leaf: PlacedLeaf, mesh: Sequence[tuple[str, int]]) -> str:
    """A rule that splits the largest dim that the largest possible axis divides."""
    shape, part, glob = leaf.leaf.shape, leaf.part, path_to_glob(leaf.leaf.path)
    for axis, size in sorted(mesh, key=lambda one: -one[1]):
        dims = [dim for dim in range(len(shape)) if shape[dim] % size == 0]
        if size > 1 and dims:
            longest = max(dims, key=lambda dim: shape[dim])
            spec = format_spec([(axis,) if dim == longest else () for dim in range(len(shape))])
            rule = f'sk.PathRules({{"{glob}": {spec}}})'
            # Optimizer state that the rule passes on follows its parameter, without first_match.
            own = rule if part == "opt_state" else f"sk.first_match({rule}, strategy.{part})"
            return f"{part}={own}, or sk.REPLICATED if intended"
    return f'{part}=sk.PathRules({{"{glob}": sk.REPLICATED}}): no mesh axis divides it'


def replicated_activations(program: Program) -> Iterator[Finding]:
    """Saved activations that are replicated over an axis that could split them."""
    declared = program.declared
    if program.jaxpr is None:
        return
    axes = program.batch_axes | {
        axis
        for axis in declared.activation_axes
        if not (kind := declared.kind_of(axis)) or {"heads", "length"} & kind.splits
    }
    rows = [axis for axis, size in program.mesh if axis in program.batch_axes]
    groups: dict[tuple[str, tuple[str, ...]], list[SavedActivation]] = {}
    parameters = {n for n, leaf in enumerate(program.leaves) if leaf.part == "params"}
    for activation in find_saved_activations(
        program.module, program.jaxpr, program.sizes, rows, parameters
    ):
        apart = axes - set(activation.axes)
        missing = tuple(axis for axis, size in program.mesh if size > 1 and axis in apart)
        if missing:
            groups.setdefault((activation.scope, missing), []).append(activation)
    for (scope, missing), activations in groups.items():
        if sum(activation.shape.nbytes for activation in activations) >= _LARGE:
            yield _replicated_finding(program, scope, missing, activations)


def _replicated_finding(
    program: Program,
    scope: str,
    axes: tuple[str, ...],
    saved: list[SavedActivation],
) -> Finding:
    names = ", ".join(axes)
    largest = max(saved, key=lambda activation: activation.shape.nbytes)
    whole = dataclasses.replace(largest.shape, dims=largest.global_shape)
    others = f" and {len(saved) - 1} more of this scope are" if len(saved) > 1 else " is"
    devices = math.prod(program.sizes[axis] for axis in axes)
    constraint = _constraint_of(largest.global_shape, axes, program)
    source, declared = largest.source, program.declared
    forced = source and find_governing(source, axes, declared.governing, program.batch_axes)
    return Finding(
        "replicated_activation",
        scope=scope,
        axes=axes,
        bytes=sum(activation.shape.nbytes for activation in saved),
        source=forced or source,
        why=f"{whole}{others} kept for the backward pass, the same on all {devices} devices "
        f"of {names}" + (f"; {constraint}" if constraint else ""),
        fix=_suggest_constraint(program, axes),
    )


def _constraint_of(whole: tuple[int, ...], axes: tuple[str, ...], program: Program) -> str:
    """The spec of the model's constraint of this shape, or of one layer of it; "" if none."""
    for shape in (whole, whole[1:]):
        for constraint in program.declared.constraints:
            if constraint.leaf.shape == shape and not set(axes) & set(constraint.axes()):
                return format_leaf(constraint)
    return ""


def _suggest_constraint(program: Program, axes: tuple[str, ...]) -> str:
    if set(axes) & program.batch_axes:
        return 'sk.nn.constrain(x, "batch", ...) where it is made, with "batch" on the rows\' axes'
    kinds = [program.declared.kind_of(axis) for axis in axes]
    fixes = {kind.activation_fix if kind else "" for kind in kinds}
    keep_less = "" if _recomputes_layers(program) else ', or remat="full" to keep less'
    if len(fixes) == 1 and any(fixes):
        return f"{fixes.pop()}{keep_less}"
    return f"sk.nn.constrain(x, ...) with a name that activations map there{keep_less}"


def _recomputes_layers(program: Program) -> bool:
    """Whether the strategy has `remat="full"` already."""
    if program.jaxpr is None:
        return False
    policies = (eqn.params.get("policy") for eqn in equations(program.jaxpr.jaxpr))
    return any(getattr(policy, "name", "").startswith("full") for policy in policies)


def parameter_gathers(program: Program) -> Iterator[Finding]:
    """Parameters that are gathered over an axis whose kind does not gather weights."""
    groups: dict[tuple[PlacedLeaf, tuple[str, ...]], list[tuple[LedgerRow, float]]] = {}
    for row in program.ledger.where(kind="all-gather"):
        if (
            set(row.axes) <= _gathered_axes(program)
            or row.payload_bytes <= SMALL
            or row.by_optimizer
        ):
            continue
        if not any(_mismatched_specs(row, program)):
            for leaf, share in _gathered_parameters(row, program):
                groups.setdefault((leaf, row.axes), []).append((row, share))
    for (leaf, axes), gathers in groups.items():
        yield Finding(
            "parameter_gather",
            leaf=leaf.name,
            scope=gathers[0][0].scope,
            axes=axes,
            bytes=round(sum(row.wire_bytes * share for row, share in gathers)),
            **about_rows(program.ledger, [row for row, _ in gathers]),
            why=f"{leaf.leaf} is split over {', '.join(axes)} and gathered whole "
            f"by {len(gathers)} × all-gather",
            fix=_suggest_operand_constraint(leaf, axes),
        )


def _suggest_operand_constraint(leaf: PlacedLeaf, axes: Sequence[str]) -> str:
    """A constraint of the activation that a parameter is multiplied with."""
    named = zip(leaf.leaf.axes or (), leaf.dims(), strict=False)
    names = [repr(name) for name, dim in named if name and set(dim) & set(axes)]
    name = names[0] if names else f"a name that activations map to {', '.join(axes)}"
    why = "on the activation that it is multiplied with, so that the product stays split"
    return f"sk.nn.constrain(x, ..., {name}) {why}"


def _gathered_axes(program: Program) -> set[str]:
    """Axes whose kind gathers parameters; without kinds, the axes of the batch."""
    kinds = program.declared.kinds
    gathered = {kind.axis for kind in kinds if {"weights", "optimizer_state"} & kind.splits}
    return gathered if kinds else program.batch_axes


def _gathered_parameters(row: LedgerRow, program: Program) -> Iterator[tuple[PlacedLeaf, float]]:
    """The parameters whose shards a gather collects, with the share of its bytes."""
    here = program.module.computations[row.computation].instructions
    shapes = [here[name].shapes[0] for name in here[row.name].operands]
    total = sum(shape.nbytes for shape in shapes if shape.dtype == row.dtype)
    for name, shape in zip(here[row.name].operands, shapes, strict=True):
        leaf = _find_leaf(row, name, program) if shape.dtype == row.dtype else None
        if leaf and leaf.part == "params" and set(row.axes) <= set(leaf.axes()):
            yield leaf, shape.nbytes / total


def _find_leaf(row: LedgerRow, operand: str, program: Program) -> PlacedLeaf | None:
    """The argument that an operand of a collective is a form of."""
    here = program.module.computations[row.computation]
    try:
        number = find_argument(program.module, here, operand)
    except ComputedError:
        return None
    return None if number is None else dict(enumerate(program.leaves)).get(number)


def spec_mismatches(program: Program) -> Iterator[Finding]:
    """Large gathers caused by two specs of one array: two constraints, or a parameter's and one."""
    groups: dict[tuple[PlacedLeaf, PlacedLeaf, tuple[str, ...]], list[LedgerRow]] = {}
    for row in program.ledger:
        if not (row.kind == "all-gather" or row.windowed):
            continue
        if row.payload_bytes <= SMALL or row.by_optimizer:
            continue
        gathered = set(row.axes) <= _gathered_axes(program)
        if not (gathered and any(_gathered_parameters(row, program))):
            for pair in _mismatched_specs(row, program):
                groups.setdefault((*pair, row.axes), []).append(row)
                break
    for (source, target, axes), rows in groups.items():
        if _is_intended(source, axes, program):
            continue
        kinds = Counter(row.phase for row in rows)
        phases = ", ".join(f"{n} × {phase}" for phase, n in kinds.items())
        yield Finding(
            "spec_mismatch",
            scope=rows[0].scope,
            axes=axes,
            bytes=sum(row.wire_bytes for row in rows),
            **about_rows(program.ledger, rows),
            why=f"{format_leaf(source)} meets {format_leaf(target)}: gathered over "
            f"{', '.join(axes)} ({phases})",
            fix=_suggest_common_spec(source, target),
        )


def _mismatched_specs(row: LedgerRow, program: Program) -> Iterator[tuple[PlacedLeaf, PlacedLeaf]]:
    """Finds (source, target): two declared specs of one array between which a row gathers.

    The source is a constraint or the parameter that is gathered, the target a constraint. On mesh
    (data=2, tensor=4), for an all-gather over tensor of f32[4,8]:

        source  constrain('batch', 'mlp')    f32[8,32] as P('data', 'tensor')   shard [4,8]: sent
        target  constrain('batch', 'embed')  f32[8,32] as P('data', None)       tensor is gone
    """
    sent = [_drop_unit_dims(shape.dims) for text in row.operands for shape in parse_shapes(text)]
    constraints = program.declared.constraints
    parameters = [leaf for leaf, _ in _gathered_parameters(row, program)]
    in_loop = [_unstack_leaf(leaf) for leaf in parameters if leaf.leaf.shape and row.trips != 1]
    for source in (*constraints, *parameters, *in_loop):
        if not set(row.axes) <= set(source.axes()):
            continue
        if _drop_unit_dims(source.shard(program.sizes)) not in sent:
            continue
        # What the gather makes of the source's spec: its axes gone, all other axes where they were.
        gathered = tuple(tuple(a for a in dim if a not in row.axes) for dim in source.dims())
        for target in constraints:
            if target.leaf.shape == source.leaf.shape and target.dims() == gathered:
                yield source, target


def _unstack_leaf(leaf: PlacedLeaf) -> PlacedLeaf:
    """One layer of a stacked parameter, as a loop over the first dim slices it."""
    layer = dataclasses.replace(leaf.leaf, shape=leaf.leaf.shape[1:])
    return dataclasses.replace(leaf, leaf=layer, spec=PartitionSpec(*leaf.spec[1:]))


def _is_intended(source: PlacedLeaf, axes: tuple[str, ...], program: Program) -> bool:
    """Whether a kind that stores activations in shards gathers them here (sequence parallelism)."""
    named = list(zip(source.leaf.axes or (), source.dims(), strict=False))
    kinds = {axis: program.declared.kind_of(axis) for axis in axes}
    return all(
        any(kind and name in kind.gathered_activations and axis in dim for name, dim in named)
        for axis, kind in kinds.items()
    )


def _suggest_common_spec(source: PlacedLeaf, target: PlacedLeaf) -> str:
    """Code that makes both specs the same."""
    dims = zip(source.leaf.axes or (), source.dims(), target.dims(), strict=False)
    names = [name for name, own, other in dims if own != other]
    if source.part == "params":
        own, other = format_spec(source.dims()), format_spec(target.dims())
        leaf = source.leaf.path or source.part
        return (
            f"constrain it where it is used as {own} too, or give {leaf} a rule that "
            f"makes it {other}, if the gather is not intended"
        )
    table = ", ".join(f"{name!r}: None" for name in dict.fromkeys(names))
    return (
        f"use one name for both dims, or strategy.with_names(activations={{{table}}}), "
        "if the gather is not intended"
    )


def format_leaf(leaf: PlacedLeaf) -> str:
    """Returns `constrain('batch', 'embed') f32[8,16] as P('data', None)`, or a parameter's."""
    return f"{leaf.leaf} as {format_spec(leaf.dims())}"


def _drop_unit_dims(dims: Sequence[int]) -> list[int]:
    """Sizes of an array without dims of size 1, which compilers drop and add."""
    return [size for size in dims if size > 1]
