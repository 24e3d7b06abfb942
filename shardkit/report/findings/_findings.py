"""What a user would want to know about a compiled step: one small function per kind of finding."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from .._program import Program
from ..communication._ledger import Ledger, Row
from ..communication._reductions import REDUCING, gradient_reductions, reductions_per_step
from ..hlo._hlo import aliased, dtype_bits
from ..hlo._scope import scope_of
from ._finding import SMALL, Facts, Finding
from ._messages import Rematerialization, rematerializations, spec_text
from ._spec_mismatches import (
    disagreements,
    parameter_gathers,
    replicated_activations,
    replicated_leaves,
    resharding,
)

# Tables of a model, as rotary frequencies, are smaller.
_LARGE_CONSTANT = 2**20


def find_all(program: Program, ledger: Ledger) -> tuple[Finding, ...]:
    """Runs every search; the most bytes first."""
    facts = Facts(program, ledger)
    found = [finding for search in _SEARCHES.values() for finding in search(facts)]
    return tuple(sorted(found, key=lambda finding: -finding.bytes))


def _involuntary_remat(facts: Facts) -> Iterator[Finding]:
    for one in rematerializations(facts.program.log, facts.program.mesh):
        yield Finding(
            "involuntary_remat",
            leaf="",
            scope=one.scope,
            axes=one.axes,
            bytes=one.nbytes,
            why=f"{one.shape} goes from {one.source} to {one.target}; XLA knows no way but to "
            "gather it whole on every device first",
            fix=f"{_in_between(one, facts)}; then measure: removing it is not always faster",
        )


def _in_between(one: Rematerialization, facts: Facts) -> str:
    """A constraint by which one mesh axis moves at a time, in the model's names if it has any."""
    if not one.between:
        return "constrain it on both sides to specs that differ in one dim"
    names = {
        axes: name
        for leaf in facts.program.declared.constraints
        for name, axes in zip(leaf.leaf.axes or (), leaf.dims(), strict=False)
        if axes and name
    }
    code = f"jax.lax.with_sharding_constraint(x, NamedSharding(mesh, {spec_text(one.between)}))"
    if all(axes in names for axes in one.between if axes):
        dims = ", ".join(repr(names[axes]) if axes else "None" for axes in one.between)
        code = f"sk.nn.constrain(x, {dims})"
    return f"{code} in between, so that one mesh axis moves at a time"


def _unaliased_donation(facts: Facts) -> Iterator[Finding]:
    reused = aliased(facts.program.hlo)
    for number, leaf in enumerate(facts.program.leaves):
        if leaf.donated and number not in reused:
            yield Finding(
                "unaliased_donation",
                leaf=leaf.name,
                scope="",
                axes=(),
                bytes=leaf.device_bytes(facts.program.sizes),
                why=f"{leaf.leaf} is donated, but no output reuses its buffer",
                fix="return it with the same shape, dtype and spec as it came in",
            )


def _second_compile(facts: Facts) -> Iterator[Finding]:
    if facts.program.compiles > 1:
        yield Finding(
            "second_compile",
            leaf=facts.program.retraced[0].partition(" ")[0] if facts.program.retraced else "",
            scope="",
            axes=(),
            bytes=0,
            why="; ".join(
                [f"the step was compiled {facts.program.compiles} times", *facts.program.retraced]
            ),
            fix='batches of one form: pad them; or compile_step(..., on_retrace="error") to find '
            "who makes another one",
        )


def _reduction_in_loop(facts: Facts) -> Iterator[Finding]:
    leaves, sizes = facts.program.leaves, facts.program.sizes
    for axis in sorted(facts.rows_over):
        times = reductions_per_step(facts.ledger, axis, leaves, sizes)
        if times < 1.5:
            continue
        rows = [row for row, _ in gradient_reductions(facts.ledger, axis, leaves, sizes)]
        wire = sum(row.wire_bytes for row in rows)
        steps = facts.program.declared.accumulate
        if steps > 1:
            beside = f", with {steps} micro-batches"
            fix = f'accumulate=sk.Accumulate({steps}, reduce="end")'
        else:
            beside = " without accumulation: something reduces arrays of their size again, or "
            beside += "whole ones of which the device keeps a shard"
            fix = "use each parameter once, or add what its uses give before it is reduced; "
            fix += "where it is used, sk.nn.constrain(w, ...) as its rule splits it"
        yield Finding(
            "reduction_in_loop",
            leaf="",
            scope=max(rows, key=lambda row: row.wire_bytes).scope,
            axes=(axis,),
            bytes=round(wire * (1 - 1 / times)),
            why=f"each gradient is reduced {times:.3g} times per step over {axis!r}{beside}",
            fix=fix,
        )


def _unexplained_collective(facts: Facts) -> Iterator[Finding]:
    declared = facts.program.declared
    if not declared.kinds:
        return
    axes = {axis for row in facts.ledger for axis in row.axes}
    explained = {axis: declared.explains(axis) for axis in axes}
    groups: dict[tuple[str, tuple[str, ...], str], list[Row]] = {}
    for row in facts.ledger:
        known = all(
            row.kind in explained[axis] or _stands_for(row, explained[axis], facts)
            for axis in row.axes
        )
        if not known and row.payload_bytes > SMALL and not row.by_optimizer:
            groups.setdefault((row.kind, row.axes, row.scope), []).append(row)
    for (kind, axes, scope), rows in groups.items():
        yield Finding(
            "unexplained_collective",
            leaf="",
            scope=scope,
            axes=axes,
            bytes=sum(row.wire_bytes for row in rows),
            why=f"{len(rows)} × {kind} over {', '.join(axes)} of {', '.join(rows[0].operands[:3])}"
            " that the strategy does not account for",
            fix="sk.nn.constrain(x, ...) what goes into this scope and what comes out of it: two "
            "specs disagree" + _undeclared(axes, kind, facts),
        )


def _undeclared(axes: Sequence[str], kind: str, facts: Facts) -> str:
    """How to declare axes of which a strategy says nothing."""
    said = facts.program.declared.kind_of
    more = [f"strategies.own({axis!r}, sends=({kind!r},))" for axis in axes if not said(axis)]
    return f"; or | {' | '.join(more)} where the model sends it itself" if more else ""


def _stands_for(row: Row, kinds: frozenset[str], facts: Facts) -> bool:
    """Whether what the compiler wrote does the work of a collective that is accounted for.

    A windowed permute does that of a gather or a scatter. An all-reduce between slices is a
    scatter in each, an all-reduce between them, and a gather in each.
    """
    if row.kind in ("reduce-scatter", "all-gather") and set(row.axes) & set(
        dict(facts.program.dcn)
    ):
        return "all-reduce" in kinds
    return row.windowed and bool({"all-gather", "reduce-scatter", "all-reduce"} & kinds)


def _wide_collective(facts: Facts) -> Iterator[Finding]:
    """Collectives wider than the policy, one finding for the axes that they share.

    What costs next to nothing is left alone: the sums of a softmax over a split vocabulary are
    in f32 for a reason.
    """
    declared = facts.program.declared
    if declared.compute_dtype is None:
        return
    narrow = dtype_bits(declared.compute_dtype)
    groups: dict[tuple[str, ...], list[tuple[int, Row]]] = {}
    for row in facts.ledger:
        allowed = narrow
        if row.kind in REDUCING and facts.rows_over & set(row.axes) and declared.reduce_dtype:
            allowed = max(allowed, dtype_bits(declared.reduce_dtype))
        small = row.payload_bytes <= SMALL or row.phase in ("update", "other")
        bits = dtype_bits(row.dtype)
        if not small and row.dtype.startswith(("f", "bf")) and bits > allowed:
            more = row.wire_bytes * (bits - allowed) // bits
            groups.setdefault(row.axes, []).append((more, row))
    name = {"bf16": "bfloat16", "f16": "float16"}.get(declared.compute_dtype, "float32")
    fix = f"x.astype(jnp.{name}) before the value crosses devices"
    if facts.program.platform == "cpu":
        fix += (
            "; XLA's CPU backend itself widens bf16, so look at --target tpu:... or gpu:... first"
        )
    for axes, found in groups.items():
        more = sum(bytes for bytes, _ in found)
        if _slight(more, axes, facts):
            continue
        rows = [row for _, row in sorted(found, key=lambda one: -one[0])]
        kinds = Counter(row.kind for row in rows)
        meant = ""
        if facts.rows_over & set(axes) and set(REDUCING) & kinds.keys():
            meant = f'; precision=sk.Precision(compute_dtype="{name}", reduce_dtype="float32") '
            meant += "where wide sums of gradients are meant"
        yield Finding(
            "wide_collective",
            leaf="",
            scope=", ".join(dict.fromkeys(row.scope for row in rows if row.scope)),
            axes=axes,
            bytes=more,
            why=f"{', '.join(f'{n} × {kind}' for kind, n in kinds.items())} under a "
            f"{declared.compute_dtype} policy, the largest of {', '.join(rows[0].operands[:3])}",
            fix=fix + meant,
        )


def _slight(bytes: float, axes: tuple[str, ...], facts: Facts) -> bool:
    """Whether these are less than a hundredth of what travels over any of these axes."""
    over = set(axes)
    return bytes * 100 < sum(row.wire_bytes for row in facts.ledger if over & set(row.axes))


def _optimizer_collective(facts: Facts) -> Iterator[Finding]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in facts.ledger:
        if row.by_optimizer and row.payload_bytes > SMALL:
            groups.setdefault(row.axes, []).append(row)
    for axes, rows in groups.items():
        # The norm of a gradient for clipping; what a compiler puts into one collective with it.
        if _slight(sum(row.wire_bytes for row in rows), axes, facts):
            continue
        kinds = Counter(row.kind for row in rows)
        names = ", ".join(axes)
        yield Finding(
            "optimizer_collective",
            leaf="",
            scope="update",
            axes=axes,
            bytes=sum(row.wire_bytes for row in rows),
            why=f"{', '.join(f'{n} × {kind}' for kind, n in kinds.items())}: the optimizer "
            f"multiplies or sums over dims that {names} {'split' if len(axes) > 1 else 'splits'}, "
            "as muon does with whole matrices",
            fix="an optimizer that acts on each element alone (adamw), or rules that leave what it "
            f"multiplies whole over {names}; else it is the price of this optimizer",
        )


def _unsplit_state(facts: Facts) -> Iterator[Finding]:
    """Optimizer state that ZeRO would split, had it a dim that divides."""
    declared, sizes = facts.program.declared, facts.program.sizes
    axes = [kind.axis for kind in declared.kinds if "optimizer_state" in kind.splits]
    for axis in (axis for axis in axes if sizes.get(axis, 1) > 1):
        for leaf in facts.program.leaves:
            single = math.prod(leaf.leaf.shape) == 1
            if leaf.part != "opt_state" or axis in leaf.axes() or single:
                continue
            yield Finding(
                "unsplit_state",
                leaf=leaf.name,
                scope="",
                axes=(axis,),
                bytes=leaf.device_bytes(sizes) * (sizes[axis] - 1) // sizes[axis],
                why=f"no dim of {leaf.leaf} is a multiple of {axis}={sizes[axis]} beside what "
                f"splits it already: all {sizes[axis]} devices hold and update the same state",
                fix=f"sizes that divide, or another size of {axis!r}; a small leaf costs little",
            )


def _large_constants(facts: Facts) -> Iterator[Finding]:
    """Arrays that the program holds itself, so that no memory class and no rule knows of them."""
    for computation in facts.program.module.computations.values():
        for one in computation.instructions.values():
            size = sum(shape.nbytes for shape in one.shapes)
            if one.opcode == "constant" and size >= _LARGE_CONSTANT:
                yield Finding(
                    "constant",
                    leaf="",
                    scope=scope_of(one.op_name),
                    axes=(),
                    bytes=size,
                    why=f"{one.shapes[0]} is a constant of the program: every device holds it, "
                    "whole where it was closed over, beside what the memory table counts",
                    fix="pass it as a parameter, as model_state or in the batch instead of closing over "
                    "it, and lay it out by a rule",
                )


def _idle_axis(facts: Facts) -> Iterator[Finding]:
    busy = {axis for leaf in facts.program.leaves for axis in leaf.axes()}
    busy |= {axis for row in facts.ledger for axis in row.axes}
    for axis, size in facts.program.mesh:
        if size == 1 or axis in busy or not facts.program.leaves:
            continue
        yield Finding(
            "idle_axis",
            leaf="",
            scope="",
            axes=(axis,),
            bytes=0,
            why=f"mesh axis {axis!r} splits nothing: its {size} devices do the same work",
            fix=f"name {axis!r} in the batch, a rule or the strategy, or leave it out of the mesh",
        )


def _rule(facts: Facts) -> Iterator[Finding]:
    for text in facts.program.declared.rules:
        yield Finding(
            "rule",
            leaf="",
            scope="",
            axes=(),
            bytes=0,
            why=text,
            fix="mend it, remove it, or move it before the rule that decides",
        )


_SEARCHES: dict[str, Callable[[Facts], Iterator[Finding]]] = {
    "involuntary_remat": _involuntary_remat,
    "replicated": replicated_leaves,
    "replicated_activation": replicated_activations,
    "unaliased_donation": _unaliased_donation,
    "second_compile": _second_compile,
    "reduction_in_loop": _reduction_in_loop,
    "unexplained_collective": _unexplained_collective,
    "parameter_gather": parameter_gathers,
    "spec_disagreement": disagreements,
    "wide_collective": _wide_collective,
    "optimizer_collective": _optimizer_collective,
    "resharding": resharding,
    "unsplit_state": _unsplit_state,
    "constant": _large_constants,
    "idle_axis": _idle_axis,
    "rule": _rule,
}
FINDINGS = tuple(_SEARCHES)
# What a gap may hide: with one, that there are none cannot be told.
FROM_MESSAGES = frozenset({"involuntary_remat"})
FROM_LEDGER = frozenset(
    """reduction_in_loop unexplained_collective parameter_gather spec_disagreement wide_collective
    optimizer_collective resharding""".split()
)
