"""What a user would want to know about a compiled step: one small function per kind of finding."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from .._program import Program
from ..communication._ledger import LedgerRow
from ..communication._reductions import (
    REDUCING,
    gradient_reductions,
    reductions_per_step,
    repeats_reductions,
)
from ..hlo._hlo import aliased_parameters, dtype_bits
from ..hlo._scope import scope_of
from ._finding import SMALL, Finding, source_of_rows
from ._messages import InvoluntaryRemat, find_involuntary_remats, format_spec
from ._miscompiled import miscompiled
from ._spec_mismatches import (
    parameter_gathers,
    replicated_activations,
    replicated_leaves,
    resharding,
    spec_mismatches,
)

# Smaller constants are usually tables of the model, such as rotary frequencies.
_LARGE_CONSTANT = 2**20


def find_findings(program: Program) -> tuple[Finding, ...]:
    """Runs every search; the most bytes first."""
    findings = [finding for search in _SEARCHES.values() for finding in search(program)]
    return tuple(sorted(findings, key=lambda finding: -finding.bytes))


def _involuntary_remat(program: Program) -> Iterator[Finding]:
    for remat in find_involuntary_remats(program.log, program.mesh):
        yield Finding(
            "involuntary_remat",
            scope=remat.scope,
            axes=remat.axes,
            bytes=remat.nbytes,
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


def _unaliased_donation(program: Program) -> Iterator[Finding]:
    reused = aliased_parameters(program.hlo)
    for number, leaf in enumerate(program.leaves):
        if leaf.donated and number not in reused:
            yield Finding(
                "unaliased_donation",
                leaf=leaf.name,
                bytes=leaf.device_bytes(program.sizes),
                why=f"{leaf.leaf} is donated, but no output reuses its buffer",
                fix="return it with the shape, dtype and spec of the argument",
            )


def _second_compile(program: Program) -> Iterator[Finding]:
    if program.compiles > 1:
        yield Finding(
            "second_compile",
            leaf=program.retraced[0].partition(" ")[0] if program.retraced else "",
            why="; ".join([f"the step was compiled {program.compiles} times", *program.retraced]),
            fix='pad batches to one shape and dtype; compile_step(..., on_retrace="error") shows '
            "where another one comes from",
        )


def _reduction_in_loop(program: Program) -> Iterator[Finding]:
    leaves, sizes = program.leaves, program.sizes
    for axis in sorted(program.batch_axes):
        times = reductions_per_step(program.ledger, axis, leaves, sizes)
        steps = program.declared.accumulate
        accumulates = steps > 1 or repeats_reductions(program.ledger, axis, leaves, sizes)
        if times < 1.5 or not accumulates:
            continue
        reductions = gradient_reductions(program.ledger, axis, leaves, sizes)
        rows = list(dict.fromkeys(row for row, _ in reductions))
        wire = sum(row.wire_bytes for row in rows)
        if steps > 1:
            context = f", with {steps} micro-batches"
            fix = f'accumulate=sk.Accumulate({steps}, reduce="end")'
        else:
            context = ", in a loop that adds up the results"
            fix = 'accumulate=sk.Accumulate(k, reduce="end") in place of a loop over parts of the '
            fix += "batch; in any other loop, use each parameter once"
        yield Finding(
            "reduction_in_loop",
            scope=max(rows, key=lambda row: row.wire_bytes).scope,
            axes=(axis,),
            bytes=round(wire * (1 - 1 / times)),
            source=source_of_rows(rows),
            why=f"each gradient is reduced {times:.3g} times per step over {axis!r}{context}",
            fix=fix,
        )


def _unexplained_collective(program: Program) -> Iterator[Finding]:
    declared = program.declared
    if not declared.kinds:
        return
    axes = {axis for row in program.ledger for axis in row.axes}
    explained = {axis: declared.explains(axis) for axis in axes}
    groups: dict[tuple[str, tuple[str, ...], str], list[LedgerRow]] = {}
    for row in program.ledger:
        known = all(
            row.kind in explained[axis] or _implements_explained(row, explained[axis], program)
            for axis in row.axes
        )
        if not known and row.payload_bytes > SMALL and not row.by_optimizer:
            groups.setdefault((row.kind, row.axes, row.scope), []).append(row)
    for (kind, axes, scope), rows in groups.items():
        yield Finding(
            "unexplained_collective",
            scope=scope,
            axes=axes,
            bytes=sum(row.wire_bytes for row in rows),
            source=source_of_rows(rows),
            why=f"{len(rows)} × {kind} over {', '.join(axes)} of {', '.join(rows[0].operands[:3])}"
            " that the strategy does not explain",
            fix="sk.nn.constrain(x, ...) the inputs and outputs of this scope: two specs disagree"
            + _suggest_declaration(axes, kind, program),
        )


def _suggest_declaration(axes: Sequence[str], kind: str, program: Program) -> str:
    """How to declare the axes that no kind of the strategy is on."""
    unknown = [axis for axis in axes if not program.declared.kind_of(axis)]
    own = [f"strategies.own({axis!r}, sends=({kind!r},))" for axis in unknown]
    return f"; or | {' | '.join(own)} if the model sends it on purpose" if own else ""


def _implements_explained(row: LedgerRow, kinds: frozenset[str], program: Program) -> bool:
    """Whether the compiler uses this collective to implement one that the strategy explains.

    Windowed permutes implement a gather or a scatter. An all-reduce over slices becomes a
    reduce-scatter within each, an all-reduce between them, and an all-gather within each.
    """
    if row.kind in ("reduce-scatter", "all-gather") and set(row.axes) & set(dict(program.dcn)):
        return "all-reduce" in kinds
    return row.windowed and bool({"all-gather", "reduce-scatter", "all-reduce"} & kinds)


def _upcast_collective(program: Program) -> Iterator[Finding]:
    """Collectives in a wider dtype than the policy's, one finding per set of axes.

    Below 1 % of the traffic they are no finding: the f32 sums of a softmax over a split vocabulary
    are intended.
    """
    declared = program.declared
    if declared.compute_dtype is None:
        return
    narrow = dtype_bits(declared.compute_dtype)
    groups: dict[tuple[str, ...], list[tuple[int, LedgerRow]]] = {}
    for row in program.ledger:
        allowed = narrow
        if row.kind in REDUCING and program.batch_axes & set(row.axes) and declared.reduce_dtype:
            allowed = max(allowed, dtype_bits(declared.reduce_dtype))
        small = row.payload_bytes <= SMALL or row.phase in ("update", "other")
        bits = dtype_bits(row.dtype)
        if not small and row.dtype.startswith(("f", "bf")) and bits > allowed:
            saving = row.wire_bytes * (bits - allowed) // bits
            groups.setdefault(row.axes, []).append((saving, row))
    name = {"bf16": "bfloat16", "f16": "float16"}.get(declared.compute_dtype, "float32")
    fix = f"x.astype(jnp.{name}) before the value crosses devices"
    if program.platform == "cpu":
        fix += (
            "; XLA's CPU backend itself widens bf16: check with --target tpu:... or gpu:... first"
        )
    for axes, wide in groups.items():
        saving = sum(bytes for bytes, _ in wide)
        if _is_negligible(saving, axes, program):
            continue
        rows = [row for _, row in sorted(wide, key=lambda one: -one[0])]
        kinds = Counter(row.kind for row in rows)
        intended = ""
        if program.batch_axes & set(axes) and set(REDUCING) & kinds.keys():
            intended = f'; precision=sk.Precision(compute_dtype="{name}", reduce_dtype="float32") '
            intended += "if wide sums of gradients are intended"
        yield Finding(
            "upcast_collective",
            scope=", ".join(dict.fromkeys(row.scope for row in rows if row.scope)),
            axes=axes,
            bytes=saving,
            source=source_of_rows(rows),
            why=f"{', '.join(f'{n} × {kind}' for kind, n in kinds.items())} under a "
            f"{declared.compute_dtype} policy, the largest of {', '.join(rows[0].operands[:3])}",
            fix=fix + intended,
        )


def _is_negligible(bytes: float, axes: tuple[str, ...], program: Program) -> bool:
    """Whether these bytes are below 1 % of the traffic over any of these axes."""
    over = set(axes)
    return bytes * 100 < sum(row.wire_bytes for row in program.ledger if over & set(row.axes))


def _optimizer_collective(program: Program) -> Iterator[Finding]:
    groups: dict[tuple[str, ...], list[LedgerRow]] = {}
    for row in program.ledger:
        if row.by_optimizer and row.payload_bytes > SMALL:
            groups.setdefault(row.axes, []).append(row)
    for axes, rows in groups.items():
        # Negligible: the norm of the gradients for clipping, and what is combined with it.
        if _is_negligible(sum(row.wire_bytes for row in rows), axes, program):
            continue
        kinds = Counter(row.kind for row in rows)
        names = ", ".join(axes)
        yield Finding(
            "optimizer_collective",
            scope="update",
            axes=axes,
            bytes=sum(row.wire_bytes for row in rows),
            source=source_of_rows(rows),
            why=f"{', '.join(f'{n} × {kind}' for kind, n in kinds.items())}: the optimizer "
            f"multiplies or sums over dims that {names} {'split' if len(axes) > 1 else 'splits'}, "
            "as muon does with matrices",
            fix="an element-wise optimizer (adamw), or rules that do not split over "
            f"{names} the matrices that it multiplies; otherwise it is the price of this optimizer",
        )


def _replicated_optimizer_state(program: Program) -> Iterator[Finding]:
    """Optimizer state that ZeRO cannot split, since no dim divides."""
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


def _large_constants(program: Program) -> Iterator[Finding]:
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


def _idle_axis(program: Program) -> Iterator[Finding]:
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


def _unused_rules(program: Program) -> Iterator[Finding]:
    for text in program.declared.rules:
        yield Finding(
            "unused_rule",
            why=text,
            fix="correct it, remove it, or move it before the rule that decides",
        )


_SEARCHES: dict[str, Callable[[Program], Iterator[Finding]]] = {
    "miscompiled": miscompiled,
    "involuntary_remat": _involuntary_remat,
    "replicated": replicated_leaves,
    "replicated_activation": replicated_activations,
    "unaliased_donation": _unaliased_donation,
    "second_compile": _second_compile,
    "reduction_in_loop": _reduction_in_loop,
    "unexplained_collective": _unexplained_collective,
    "parameter_gather": parameter_gathers,
    "spec_mismatch": spec_mismatches,
    "upcast_collective": _upcast_collective,
    "optimizer_collective": _optimizer_collective,
    "resharding": resharding,
    "replicated_optimizer_state": _replicated_optimizer_state,
    "large_constant": _large_constants,
    "idle_axis": _idle_axis,
    "unused_rule": _unused_rules,
}
FINDINGS = tuple(_SEARCHES)
# Findings that missing messages, or missing rows of the ledger, can hide.
FROM_MESSAGES = frozenset({"involuntary_remat"})
FROM_LEDGER = frozenset(
    """reduction_in_loop unexplained_collective parameter_gather spec_mismatch upcast_collective
    optimizer_collective resharding""".split()
)
