"""Searches for arrays that lie otherwise than the strategy or their neighbours say."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from jax.sharding import PartitionSpec

from ..._core.tree import path_to_glob
from .._program import Placed, Program
from ..communication._ledger import Row
from ..hlo._hlo import shapes_of
from ..memory._saved import Saved, saved
from ._arguments import Computed, argument_of
from ._finding import SMALL, Facts, Finding
from ._messages import spec_text

# Saved activations that take less are not worth a sharding of their own.
_LARGE = 2**20


def replicated_leaves(facts: Facts) -> Iterator[Finding]:
    """State that every device holds whole, and no rule says so."""
    axes = tuple(name for name, size in facts.program.mesh if size > 1)
    for leaf in facts.program.leaves:
        state = leaf.part in ("params", "opt_state", "model_state")
        if not axes or not state or leaf.meant_whole or leaf.axes() or not leaf.leaf.shape:
            continue
        yield Finding(
            "replicated",
            leaf=leaf.name,
            scope="",
            axes=axes,
            bytes=leaf.device_bytes(facts.program.sizes),
            why=f"all {math.prod(facts.program.sizes.values())} devices hold the whole of "
            f"{leaf.leaf}, and no rule says so",
            fix=_split(leaf, facts.program.mesh),
        )


def _split(leaf: Placed, mesh: Sequence[tuple[str, int]]) -> str:
    """A rule that splits a leaf: its largest dim that the largest axis divides."""
    shape, part, glob = leaf.leaf.shape, leaf.part, path_to_glob(leaf.leaf.path)
    for axis, size in sorted(mesh, key=lambda one: -one[1]):
        dims = [dim for dim in range(len(shape)) if shape[dim] % size == 0]
        if size > 1 and dims:
            longest = max(dims, key=lambda dim: shape[dim])
            spec = spec_text([(axis,) if dim == longest else () for dim in range(len(shape))])
            rule = f'sk.PathRules({{"{glob}": {spec}}})'
            # What a rule for optimizer state passes follows its parameter.
            own = rule if part == "opt_state" else f"sk.first_match({rule}, strategy.{part})"
            return f"{part}={own}, or sk.REPLICATED if meant"
    return f'{part}=sk.PathRules({{"{glob}": sk.REPLICATED}}): no mesh axis divides it'


def replicated_activations(facts: Facts) -> Iterator[Finding]:
    """Activations that wait for the backward pass whole over an axis that could split them."""
    program, declared = facts.program, facts.program.declared
    if program.jaxpr is None:
        return
    axes = facts.rows_over | {
        axis
        for axis in declared.activation_axes
        if not (kind := declared.kind_of(axis)) or {"heads", "length"} & kind.splits
    }
    rows = [axis for axis, size in program.mesh if axis in facts.rows_over]
    groups: dict[tuple[str, tuple[str, ...]], list[Saved]] = {}
    parameters = {n for n, leaf in enumerate(program.leaves) if leaf.part == "params"}
    for one in saved(program.module, program.jaxpr, program.sizes, rows, parameters):
        missing = tuple(a for a, n in program.mesh if n > 1 and a in axes and a not in one.axes)
        if missing:
            groups.setdefault((one.scope, missing), []).append(one)
    for (scope, missing), found in groups.items():
        held = sum(one.shape.nbytes for one in found)
        if held >= _LARGE:
            yield _replicated(facts, scope, missing, found, held)


def _replicated(
    facts: Facts, scope: str, axes: tuple[str, ...], found: list[Saved], held: int
) -> Finding:
    names = ", ".join(axes)
    largest = max(found, key=lambda one: one.shape.nbytes)
    whole = dataclasses.replace(largest.shape, dims=largest.whole)
    more = f" and {len(found) - 1} more of this scope are" if len(found) > 1 else " is"
    ways = math.prod(facts.program.sizes[axis] for axis in axes)
    stated = _constraint_of(largest.whole, axes, facts.program)
    return Finding(
        "replicated_activation",
        leaf="",
        scope=scope,
        axes=axes,
        bytes=held,
        why=f"{whole}{more} kept for the backward pass, the same on all {ways} devices of {names}"
        + (f"; {stated}" if stated else ""),
        fix=_fix(facts, axes),
    )


def _constraint_of(whole: tuple[int, ...], axes: tuple[str, ...], program: Program) -> str:
    """What the model's constraint of an array of this shape, or of one layer of it, became."""
    stated = [one for one in program.declared.constraints if not set(axes) & set(one.axes())]
    of_shape = [one for shape in (whole, whole[1:]) for one in stated if one.leaf.shape == shape]
    return _named(of_shape[0]) if of_shape else ""


def _fix(facts: Facts, axes: tuple[str, ...]) -> str:
    if set(axes) & facts.rows_over:
        return 'sk.nn.constrain(x, "batch", ...) where it is made, with "batch" on the rows\' axes'
    kinds = [facts.program.declared.kind_of(axis) for axis in axes]
    fixes = {kind.activation_fix if kind else "" for kind in kinds}
    if len(fixes) == 1 and any(fixes):
        return f'{fixes.pop()}, or remat="full" to keep less'
    return 'sk.nn.constrain(x, ...) with a name that activations map there, or remat="full"'


def parameter_gathers(facts: Facts) -> Iterator[Finding]:
    """Parameters that are gathered whole over an axis where nothing asks for it."""
    groups: dict[tuple[str, tuple[str, ...]], list[tuple[Row, Placed]]] = {}
    for row in facts.ledger.where(kind="all-gather"):
        if set(row.axes) <= _gathering(facts) or row.payload_bytes <= SMALL or row.by_optimizer:
            continue
        leaf = _parameter(row, facts.program)
        if leaf and not any(_pairs(row, facts.program)):
            groups.setdefault((leaf.name, row.axes), []).append((row, leaf))
    for (path, axes), found in groups.items():
        row, leaf = found[0]
        yield Finding(
            "parameter_gather",
            leaf=path,
            scope=row.scope,
            axes=axes,
            bytes=sum(one.wire_bytes for one, _ in found),
            why=f"{leaf.leaf} is split over {', '.join(axes)} and gathered whole "
            f"by {len(found)} × all-gather",
            fix=_meets(leaf, axes),
        )


def _meets(leaf: Placed, axes: Sequence[str]) -> str:
    """The constraint of what a parameter is multiplied with, by the parameter's own name."""
    named = zip(leaf.leaf.axes or (), leaf.dims(), strict=False)
    names = [repr(name) for name, dim in named if name and set(dim) & set(axes)]
    name = names[0] if names else f"a name that activations map to {', '.join(axes)}"
    why = "on the activation that meets it, so that the product stays split"
    return f"sk.nn.constrain(x, ..., {name}) {why}"


def _gathering(facts: Facts) -> set[str]:
    """Axes over which parameters are meant to be gathered: those that split rows as well do."""
    kinds = facts.program.declared.kinds
    meant = {kind.axis for kind in kinds if {"weights", "optimizer_state"} & kind.splits}
    return meant if kinds else facts.rows_over


def _parameter(row: Row, program: Program) -> Placed | None:
    """The parameter whose shards a gather collects.

    That is the argument that it is given; where that cannot be told, as in a loop, one of the same
    shape, whole or one layer of it.
    """
    here = program.module.computations[row.computation]
    try:
        numbers = [
            argument_of(program.module, here, o) for o in here.instructions[row.name].operands
        ]
    except Computed:
        return None
    told = [program.leaves[n] for n in numbers if n is not None and n < len(program.leaves)]
    if told and len(told) == len(numbers):
        split = (leaf for leaf in told if set(row.axes) <= set(leaf.axes()))
        return next((leaf for leaf in split if leaf.part == "params"), None)
    sent = [_shape(shape.dims) for text in row.operands for shape in shapes_of(text)]
    for leaf in program.leaves:
        if leaf.part != "params" or not set(row.axes) <= set(leaf.axes()):
            continue
        shard = leaf.shard(program.sizes)
        if _shape(shard) in sent or (row.trips != 1 and _shape(shard[1:]) in sent):
            return leaf
    return None


def disagreements(facts: Facts) -> Iterator[Finding]:
    """Large gathers between two specs that disagree: of constraints, or of a parameter and one."""
    found: dict[tuple[Placed, Placed, tuple[str, ...]], list[Row]] = {}
    for row in facts.ledger:
        if not (row.kind == "all-gather" or row.windowed):
            continue
        if row.payload_bytes <= SMALL or row.by_optimizer:
            continue
        if not (set(row.axes) <= _gathering(facts) and _parameter(row, facts.program)):
            for pair in _pairs(row, facts.program):
                found.setdefault((*pair, row.axes), []).append(row)
                break
    for (made, used, axes), rows in found.items():
        if _meant(made, axes, facts):
            continue
        kinds = Counter(row.phase for row in rows)
        phases = ", ".join(f"{n} × {phase}" for phase, n in kinds.items())
        yield Finding(
            "spec_disagreement",
            leaf="",
            scope=rows[0].scope,
            axes=axes,
            bytes=sum(row.wire_bytes for row in rows),
            why=f"{_named(made)} meets {_named(used)}: gathered over {', '.join(axes)} ({phases})",
            fix=_agree(made, used),
        )


def _pairs(row: Row, program: Program) -> Iterator[tuple[Placed, Placed]]:
    """Two specs of one array of which the first gives what a gather takes, the second the rest.

    The second is a constraint's, the first a constraint's or a parameter's. Dims that a gather
    does not touch lie alike in both.
    """
    sent = [_plain(shape.dims) for text in row.operands for shape in shapes_of(text)]
    stated = program.declared.constraints
    parameters = [leaf for leaf in program.leaves if leaf.part == "params"]
    in_loop = [_of_one_layer(leaf) for leaf in parameters if leaf.leaf.shape and row.trips != 1]
    for made in (*stated, *parameters, *in_loop):
        if not set(row.axes) <= set(made.axes()):
            continue
        if _plain(made.shard(program.sizes)) not in sent:
            continue
        without = tuple(tuple(a for a in dim if a not in row.axes) for dim in made.dims())
        for used in stated:
            if used.leaf.shape == made.leaf.shape and used.dims() == without:
                yield made, used


def _of_one_layer(leaf: Placed) -> Placed:
    """A stacked parameter as a loop over its first dim sees it."""
    one = dataclasses.replace(leaf.leaf, shape=leaf.leaf.shape[1:])
    return dataclasses.replace(leaf, leaf=one, spec=PartitionSpec(*leaf.spec[1:]))


def _meant(made: Placed, axes: tuple[str, ...], facts: Facts) -> bool:
    """Whether a gather is the one that a kind which splits activations between uses asks for."""
    named = list(zip(made.leaf.axes or (), made.dims(), strict=False))
    kinds = {axis: facts.program.declared.kind_of(axis) for axis in axes}
    return all(
        any(kind and name in kind.gathered_activations and axis in dim for name, dim in named)
        for axis, kind in kinds.items()
    )


def _agree(made: Placed, used: Placed) -> str:
    """What to write so that both lie alike."""
    names = {
        name: dim
        for name, dim, other in zip(made.leaf.axes or (), made.dims(), used.dims(), strict=False)
        if dim != other
    }
    if made.part == "params":
        own, other = spec_text(made.dims()), spec_text(used.dims())
        leaf = made.leaf.path or made.part
        return (
            f"constrain it where it is used as {own} too, or give {leaf} a rule that "
            f"makes it {other}, where the gather is not what you want"
        )
    table = ", ".join(f"{name!r}: None" for name in names)
    return (
        f"use one name for both dims, or strategy.with_names(activations={{{table}}}), "
        "where the gather is not what you want"
    )


def resharding(facts: Facts) -> Iterator[Finding]:
    """Activations that an all-to-all moves from one dim to another."""
    for row in facts.ledger.where(kind="all-to-all"):
        if "all_to_all" in row.op_name or row.payload_bytes <= SMALL or row.by_optimizer:
            continue
        declared = facts.program.declared
        if row.axes and all("all-to-all" in declared.explains(axis) for axis in row.axes):
            continue  # the strategy moves tokens by stating where they are to be
        between = _ends(row, facts.program)
        yield Finding(
            "resharding",
            leaf="",
            scope=row.scope,
            axes=row.axes,
            bytes=row.wire_bytes,
            why=f"{row.operands[0]} is moved from one dim to another over {', '.join(row.axes)}: "
            + (between or "what makes it and what uses it are split differently"),
            fix="constrain both to one spec: sk.nn.constrain(x, ...) right after it is made",
        )


def _ends(row: Row, program: Program) -> str:
    """The two constraints that an all-to-all goes between, where they can be told."""
    stated = program.declared.constraints
    sent = sum(math.prod(shape.dims) for text in row.operands for shape in shapes_of(text))
    for made in stated:
        for used in stated:
            same = made.leaf.shape == used.leaf.shape and made.dims() != used.dims()
            moved = set(row.axes) <= set(made.axes()) & set(used.axes())
            if same and moved and math.prod(made.shard(program.sizes)) == sent:
                return f"{_named(made)} meets {_named(used)}"
    return ""


def _named(one: Placed) -> str:
    """Returns `constrain('batch', 'embed') f32[8,16] as P('data', None)`, or a parameter's."""
    return f"{one.leaf} as {spec_text(one.dims())}"


def _shape(dims: Sequence[int]) -> list[int]:
    """Sizes of an array up to transposition and dims of one."""
    return sorted(_plain(dims))


def _plain(dims: Sequence[int]) -> list[int]:
    """Sizes of an array without dims of one, which compilers drop and add."""
    return [size for size in dims if size > 1]
