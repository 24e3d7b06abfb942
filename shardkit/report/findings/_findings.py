"""What a user would want to know about a compiled step: one small function per kind of finding."""

from collections import Counter
from collections.abc import Callable, Iterator

from .._program import Program
from ..communication._ledger import LedgerRow
from ..communication._reductions import (
    REDUCING,
    gradient_reductions,
    reductions_per_step,
    repeats_reductions,
)
from ..hlo._hlo import aliased_parameters, dtype_bits
from ._finding import AGREE, FOLLOW, SMALL, Finding, about_rows
from ._idle import (
    idle_axis,
    idle_options,
    large_constants,
    replicated_model_state,
    replicated_optimizer_state,
    unused_rules,
)
from ._miscompiled import miscompiled
from ._odd_declarations import correct_declarations
from ._other_rows import OF_OTHER_ROWS, find_of_other_rows
from ._spec_mismatches import (
    involuntary_remats,
    parameter_gathers,
    replicated_activations,
    replicated_leaves,
    spec_mismatches,
)


def find_findings(program: Program) -> tuple[Finding, ...]:
    """Runs every search; first what one declaration is the cause of, then the most bytes."""
    findings = [finding for search in _SEARCHES.values() for finding in search(program)]
    findings += find_of_other_rows(program, findings)
    findings = list(correct_declarations(program, findings))
    return tuple(sorted(findings, key=lambda one: (not _is_certain(one), -one.bytes)))


def _is_certain(finding: Finding) -> bool:
    """Whether all other declarations, or those of the parameters, disagree with what it sends."""
    memory = not finding.rows and FOLLOW in finding.alternatives
    return bool({AGREE, FOLLOW} & {*finding.alternatives}) and not memory


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
        if steps > 1 and program.declared.reduce_at_end:
            context = f", with {steps} micro-batches: the partitioner reduces them before the end"
            fix, alternative = 'mode="shard_map", which reduces each gradient once', "shard_map"
        elif steps > 1:
            context = f", with {steps} micro-batches"
            fix, alternative = f'accumulate=sk.Accumulate({steps}, reduce="end")', "end"
        else:
            context = ", in a loop that adds up the results"
            alternative = "shard_map" if program.fits_shard_map else ""
            fix = 'mode="shard_map", which reduces them behind the loop; or ' if alternative else ""
            fix += 'accumulate=sk.Accumulate(k, reduce="end") in place of a loop over parts of the '
            fix += "batch; in any other loop, use each parameter once"
        yield Finding(
            "reduction_in_loop",
            scope=max(rows, key=lambda row: row.wire_bytes).scope,
            axes=(axis,),
            bytes=round(wire * (1 - 1 / times)),
            **about_rows(program.ledger, rows),
            why=f"each gradient is reduced {times:.3g} times per step over {axis!r}{context}",
            fix=fix,
            alternatives=(alternative,) if alternative else (),
        )


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
            **about_rows(program.ledger, rows),
            why=f"{', '.join(f'{n} × {kind}' for kind, n in kinds.items())} under a "
            f"{declared.compute_dtype} policy, the largest of {', '.join(rows[0].operands[:3])}",
            fix=_suggest_cast(rows[0], name, program) + intended,
        )


def _suggest_cast(largest: LedgerRow, dtype: str, program: Program) -> str:
    """A cast on the side of a collective where it makes it narrow.

    An element-wise cast takes the spec of what reads it. So one alone, in front of a gather, is
    done behind it: `h.astype(f16)` of f32[32,64] on each of 4 devices becomes a gather of f32.
    """
    cast = f"x.astype(jnp.{dtype})"
    if largest.kind in REDUCING:
        fix = f"{cast} on what is multiplied or added, before the value crosses devices"
    else:
        fix = f"x = sk.nn.constrain({cast}, ...) as x is split, before the value crosses devices"
    if program.platform == "cpu" and dtype == "bfloat16":
        fix += "; XLA's CPU backend itself widens bf16: "
        fix += "check with --target tpu:... or gpu:... first"
    return fix


def _is_negligible(bytes: float, axes: tuple[str, ...], program: Program) -> bool:
    """Whether these bytes are below 1 % of the traffic over any of these axes."""
    over = set(axes)
    return bytes * 100 < sum(row.wire_bytes for row in program.ledger if over & set(row.axes))


def _optimizer_collective(program: Program) -> Iterator[Finding]:
    """What the optimizer's own products and sums send, if it is more than a tenth of the step's."""
    own = [row for row in program.ledger if row.by_optimizer and not row.moves_matrices]
    rows = [row for row in own if row.payload_bytes > SMALL]
    sent = sum(row.wire_bytes for row in rows)
    # Negligible: the norm of the gradients for clipping, and what is combined with it.
    if sent * 10 <= program.ledger.total():
        return
    kinds = Counter(row.kind for row in rows)
    over = {axis for row in rows for axis in row.axes}
    axes = tuple(axis for axis in program.sizes if axis in over)
    names = ", ".join(axes)
    undivided = program.declared.undivided
    fix = "an element-wise optimizer (optax.adamw), which sends none of it, or params rules that "
    fix += f"do not split over {names} the matrices that it multiplies"
    yield Finding(
        "optimizer_collective",
        scope="update",
        axes=axes,
        bytes=sent,
        **about_rows(program.ledger, rows),
        why=f"{', '.join(f'{n} × {kind}' for kind, n in kinds.items())}: the optimizer "
        f"multiplies or sums over dims that {names} {'split' if len(axes) > 1 else 'splits'}, "
        "as muon does with matrices",
        fix=f"{_OWNERS}; or {fix}" if undivided else fix,
        alternatives=("owners",) if undivided else (),
    )


_OWNERS = "StepSpec(owners=True), which moves each matrix whole to one device and back, if the "
_OWNERS += "optimizer does with one matrix what it does with several"


_SEARCHES: dict[str, Callable[[Program], Iterator[Finding]]] = {
    "miscompiled": miscompiled,
    "involuntary_remat": involuntary_remats,
    "replicated": replicated_leaves,
    "replicated_activation": replicated_activations,
    "unaliased_donation": _unaliased_donation,
    "second_compile": _second_compile,
    "reduction_in_loop": _reduction_in_loop,
    "parameter_gather": parameter_gathers,
    "spec_mismatch": spec_mismatches,
    "upcast_collective": _upcast_collective,
    "optimizer_collective": _optimizer_collective,
    "replicated_optimizer_state": replicated_optimizer_state,
    "large_constant": large_constants,
    "replicated_model_state": replicated_model_state,
    "idle_axis": idle_axis,
    "idle_option": idle_options,
    "unused_rule": unused_rules,
}
FINDINGS = (*_SEARCHES, *OF_OTHER_ROWS)
# Findings that missing messages, or missing rows of the ledger, can hide.
FROM_MESSAGES = frozenset({"involuntary_remat"})
FROM_LEDGER = frozenset(
    """reduction_in_loop unexplained_collective parameter_gather spec_mismatch upcast_collective
    optimizer_collective resharding gradient_gather activation_gather stored_contraction
    product_gather dim_gather split_contraction repeated_reduction""".split()
)
