"""Searches for declarations that do nothing, and for arrays that every device holds whole."""

import math
from collections.abc import Iterator

from ..._core.tree import format_bytes
from .._placed_leaf import PlacedLeaf
from .._program import Program
from ..hlo._scope import scope_of
from ._finding import FOLLOW, Finding

# Smaller constants are usually tables of the model, such as rotary frequencies.
_LARGE_CONSTANT = 2**20


def idle_axis(program: Program) -> Iterator[Finding]:
    """Mesh axes that split no array."""
    busy = {axis for leaf in program.leaves for axis in leaf.axes()}
    busy |= {axis for row in program.ledger for axis in row.axes}
    for axis, size in program.mesh:
        if size == 1 or axis in busy or not program.leaves:
            continue
        yield Finding(
            "idle_axis",
            axes=(axis,),
            why=f"mesh axis {axis!r} splits no array: its {size} devices do the same work",
            fix=f"name {axis!r} in the batch, a rule or the strategy, or leave it out of the mesh",
        )
    yield from _axes_of_the_update(program)


def _axes_of_the_update(program: Program) -> Iterator[Finding]:
    """Mesh axes that split the update alone: the loss is computed as if they were not there."""
    parts = {axis: set[str]() for axis, _ in program.mesh}
    for leaf in program.leaves:
        for axis in leaf.axes():
            parts[axis].add(leaf.part)
    for row in program.ledger:
        for axis in row.axes if not set(row.phases) <= {"update", "other"} else ():
            parts[axis].add("loss")
    for one in program.declared.governing:
        for axis in (axis for dim in one.dims for axis in dim):
            parts[axis].add("loss")
    for axis in (axis for axis, size in program.mesh if size > 1 and parts[axis] == {"opt_state"}):
        yield Finding(
            "idle_axis",
            axes=(axis,),
            why=f"mesh axis {axis!r} splits the optimizer state, and nothing in the loss: its "
            f"{program.sizes[axis]} devices compute the same gradients",
            fix=f"name {axis!r} in the batch too, so that its devices have other rows",
        )


def idle_options(program: Program) -> Iterator[Finding]:
    """Options that change nothing, or nothing for the better."""
    for why, fix in program.declared.idle_options:
        yield Finding("idle_option", why=why, fix=fix)
    for kind in program.declared.kinds:
        n = program.sizes.get(kind.axis, 1)
        if "layers" not in kind.splits or n == 1 or not program.leaves:
            continue
        if not program.param_bytes(kind.axis, None, split=True):
            whole = program.param_bytes(kind.axis, None, split=False)
            yield Finding(
                "idle_option",
                axes=(kind.axis,),
                bytes=whole * (n - 1) // n,
                why=f"{kind.name}: no parameter is split over {kind.axis!r}, so that each of its "
                f"{n} stages holds the parameters of all layers, and sums their gradients",
                fix='name their first dim "layers": sk.WithAxes(w, ("layers", ...)), or params='
                f'sk.PathRules({{"layers/**": P({kind.axis!r})}})',
            )


def unused_rules(program: Program) -> Iterator[Finding]:
    """Entries of rules that decide nothing."""
    for text in program.declared.rules:
        yield Finding(
            "unused_rule",
            why=text,
            fix="correct it, remove it, or move it before the rule that decides",
        )


def replicated_optimizer_state(program: Program) -> Iterator[Finding]:
    """Optimizer state that ZeRO cannot split, or that is split less than its parameter."""
    declared, sizes = program.declared, program.sizes
    axes = [kind.axis for kind in declared.kinds if "optimizer_state" in kind.splits]
    for axis in (axis for axis in axes if sizes.get(axis, 1) > 1):
        for leaf in program.leaves:
            single = math.prod(leaf.leaf.shape) == 1
            if leaf.part != "opt_state" or axis in leaf.axes() or single:
                continue
            yield Finding(
                "replicated_optimizer_state",
                leaf=leaf.name,
                axes=(axis,),
                bytes=leaf.device_bytes(sizes) * (sizes[axis] - 1) // sizes[axis],
                why=f"no dim of {leaf.leaf} is a multiple of {axis}={sizes[axis]} in shards of the "
                f"other axes: all {sizes[axis]} devices hold and update the same state",
                fix=f"sizes that divide, or another size of {axis!r}; a small leaf costs little",
            )
    yield from _unsplit_moments(program)


def _unsplit_moments(program: Program) -> Iterator[Finding]:
    """Optimizer state that is whole over axes which split its parameter, by its rule."""
    whole: dict[tuple[str, tuple[str, ...]], list[tuple[PlacedLeaf, PlacedLeaf]]] = {}
    for leaf, own in program.moments.items():
        axes = tuple(axis for axis in own.axes() if axis not in leaf.axes())
        if axes:
            whole.setdefault((leaf.declared_by, axes), []).append((leaf, own))
    for (rule, axes), leaves in whole.items():
        ways = math.prod(program.sizes[axis] for axis in axes)
        size = sum(leaf.device_bytes(program.sizes) for leaf, _ in leaves)
        leaf, own = max(leaves, key=lambda one: one[0].device_bytes(program.sizes))
        more = f" and {len(leaves) - 1} more like it" if leaves[1:] else ""
        yield Finding(
            "replicated_optimizer_state",
            leaf=leaf.name,
            axes=axes,
            bytes=size * (ways - 1) // ways,
            why=f"{', '.join(axes)} splits {own.name} and not {leaf.leaf}{more}, by {rule}, so "
            "that the update gathers what it computes of it",
            fix="no opt_state= for it: optimizer state follows its parameter",
            alternatives=(FOLLOW,),
        )


def replicated_model_state(program: Program) -> Iterator[Finding]:
    """Model state that no rule lays out, beside parameters that are split."""
    params = sum(leaf.device_bytes(program.sizes) for leaf in program.leaves if _is_param(leaf))
    over = {axis for leaf in program.leaves if _is_param(leaf) for axis in leaf.axes()}
    axes = [axis for axis, size in program.mesh if size > 1 and axis in over]
    for leaf in program.leaves:
        size = leaf.device_bytes(program.sizes)
        split = [
            axis for axis in axes if any(n % program.sizes[axis] == 0 for n in leaf.leaf.shape)
        ]
        by_default = leaf.part == "model_state" and leaf.declared_by == "REPLICATED"
        if by_default and split and size * 10 > params:
            yield Finding(
                "replicated_model_state",
                leaf=leaf.name,
                axes=(split[0],),
                bytes=size - size // program.sizes[split[0]],
                why=f"every device holds the whole of {leaf.leaf}, {format_bytes(size)}, while the "
                f"parameters are split and take {format_bytes(params)}",
                fix="model_state=strategy.params, or a rule of its own; where it is meant, "
                'model_state=sk.PathRules({"**": sk.REPLICATED})',
            )


def large_constants(program: Program) -> Iterator[Finding]:
    """Large arrays that are part of the program, outside of memory classes and rules."""
    for computation in program.module.computations.values():
        for instruction in computation.instructions.values():
            size = sum(shape.nbytes for shape in instruction.shapes)
            if instruction.opcode == "constant" and size >= _LARGE_CONSTANT:
                yield Finding(
                    "large_constant",
                    scope=scope_of(instruction.op_name),
                    bytes=size,
                    why=f"{instruction.shapes[0]} is a constant of the program: every device "
                    "holds it, in full if a function closes over it, outside of the memory table",
                    fix="do not close over it: pass it as a parameter, as model_state or in the "
                    "batch, and give it a rule",
                )


def _is_param(leaf: PlacedLeaf) -> bool:
    return leaf.part == "params"
