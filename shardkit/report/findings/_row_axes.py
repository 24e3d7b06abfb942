"""Searches for traffic beyond weights and gradients over axes that split the rows of a batch.

Where each device computes on its own rows, it sends nothing but weights (fsdp) and gradients. A
partitioner that loses the rows of an array sends activations instead. On mesh (fsdp=4), with
`table` and `up` split over `embed`:

    x = table[tokens]          tokens gathered over fsdp; x[B, T, D_fsdp], its rows are whole
    h = x @ up                 contracts D_fsdp, the dim that `up` is stored by: h is all-reduced

A constraint of x to its rows turns both back into gathers of weights.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from ..._core.equations import source_of_equation
from ..._core.source import Source
from ..._core.tracing import equations
from ..._core.tree import format_bytes
from .._placed_leaf import PlacedLeaf
from .._program import Program
from ..communication._entries import EXPLICIT, PRODUCTS
from ..communication._governing import OddDeclaration
from ..communication._ledger import LedgerRow
from ..communication._minimum import axis_wire_bytes, judging_kinds, weight_axes
from ..communication._reductions import (
    REDUCING,
    gradient_reductions,
    repeats_reductions,
)
from ..hlo._hlo import parse_shapes
from ..hlo._scope import last_name
from ._finding import SMALL, Finding, bytes_by_source, row_numbers

# What a kind splits that moves weights and gradients over its axis, and no activations.
_STORED = frozenset({"rows", "weights", "optimizer_state"})
_MOVING = ("all-gather", "all-to-all", "collective-permute")
COMPUTING = ("forward", "backward", "recompute")
_LINES = 3
# Below this share of the minimum of its axes nothing is a finding, as a lookup in a split table.
_WORTH = 0.1
Part = tuple[int, LedgerRow, int]  # number of the row, the row, index of its operand


def row_axes(program: Program) -> set[str]:
    """Axes that split rows, over which no declared kind moves activations."""
    declared = program.declared
    kinds = (*declared.kinds, *declared.by_specs)
    over = {axis: [kind for kind in kinds if kind.axis == axis] for axis in program.batch_axes}
    return {
        axis
        for axis, on_axis in over.items()
        if all(kind.splits and kind.splits <= _STORED for kind in on_axis)
        and (on_axis or not declared.kinds)
    }


def activation_gathers(program: Program, claimed: Collection[int]) -> Iterator[Finding]:
    """Activations, or the batch, gathered or moved over an axis that splits their rows."""
    names = {"all-gather": "gathered", "all-to-all": "moved", "collective-permute": "moved"}
    for axes, parts in activation_parts(program, claimed, is_moved):
        kinds = sorted({names[row.kind] for _, row, _ in parts})
        what = f"of activations, {' and '.join(kinds)} over {', '.join(axes)}, which splits rows"
        yield from _with_remedy(
            program, build_finding(program, "activation_gather", axes, parts, what)
        )


def stored_contractions(program: Program, claimed: Collection[int]) -> Iterator[Finding]:
    """Products that contract a dim that weights are only stored by: results are reduced."""
    for axes, parts in activation_parts(program, claimed, is_contracted):
        what = f"of results of products that contract a dim split over {', '.join(axes)}: weights "
        what += "that are stored so are multiplied in place, where gathering them would do"
        yield from _with_remedy(
            program, build_finding(program, "stored_contraction", axes, parts, what)
        )


def repeated_reductions(program: Program, claimed: Collection[int]) -> Iterator[Finding]:
    """Gradients of a parameter used several times, reduced for each use and added afterwards."""
    ledger, leaves, sizes = program.ledger, program.leaves, program.sizes
    for axis in sorted(row_axes(program)):
        repeated = repeats_reductions(ledger, axis, leaves, sizes)
        if program.declared.accumulate > 1 or repeated:
            continue  # `reduction_in_loop` says it
        sent = axis_wire_bytes(ledger, axis, sizes, weight_axes(leaves))
        beyond = sent - _minimum(program, [axis])
        for gradients in _gradients_by_size(program, axis).values() if beyond >= SMALL else ():
            yield from _repeated(program, axis, gradients, claimed)


def _repeated(
    program: Program, axis: str, leaves: Sequence[PlacedLeaf], claimed: Collection[int]
) -> Iterator[Finding]:
    """A finding if more arrays of a size are reduced than there are gradients of it."""
    numbers = row_numbers(program.ledger)
    reduced = [
        (row, times, row.wire_bytes * share)
        for row, times, share in _reductions_of(program, axis, leaves)
        if numbers[id(row)] not in claimed
    ]
    times = sum(times for _, times, _ in reduced)
    wire = sum(size for _, _, size in reduced)
    spare = wire * (1 - len(leaves) / times) if times > len(leaves) + 0.01 else 0
    if spare < SMALL:
        return
    yield Finding(
        "repeated_reduction",
        leaf=leaves[0].name if len(leaves) == 1 else "",
        axes=(axis,),
        bytes=round(spare),
        rows=tuple(dict.fromkeys(numbers[id(row)] for row, _, _ in reduced)),
        source=next(iter(bytes_by_source((row, size) for row, _, size in reduced)), None),
        why=f"{times:.3g} gradients are reduced over {axis!r} where {len(leaves)} would do, of "
        f"{', '.join(leaf.name for leaf in leaves[:3])}{', …' if leaves[3:] else ''}: one for each "
        "use of a parameter",
        fix='mode="shard_map", which adds them up on each device and reduces once'
        if program.fits_shard_map
        else "",
        alternatives=("shard_map",) if program.fits_shard_map else (),
    )


def activation_parts(
    program: Program,
    claimed: Collection[int],
    wanted: Callable[[LedgerRow, int, Program], bool],
    over: Collection[str] | None = None,
    forms: "ParameterForms | None" = None,
    phases: Collection[str] = COMPUTING,
) -> Iterator[tuple[tuple[str, ...], list[Part]]]:
    """Parts of rows that send activations over row axes, or over others, by their axes.

    Those that a declaration causes which all others disagree with are apart.
    """
    over = set(row_axes(program) if over is None else over)
    forms = forms or ParameterForms(program)
    groups: dict[tuple[tuple[str, ...], str], list[Part]] = {}
    for number, row in enumerate(program.ledger):
        if number in claimed or not over & set(row.axes) or not row.ends:
            continue
        if row.by_optimizer or last_name(row.op_name) in EXPLICIT:
            continue
        for index, phase in enumerate(row.phases):
            declared = row.ends[index].declared_by if is_odd(row, index, program) else ""
            # What is caused by such a declaration is neither a product's, nor a parameter, nor of
            # the step's own, as what moves an argument can seem.
            certain = declared and phase in (*phases, "other")
            likely = phase in phases and not row.windowed and not forms.has(row, index)
            if (certain or likely) and wanted(row, index, program):
                groups.setdefault((row.axes, declared), []).append((number, row, index))
    yield from ((axes, parts) for (axes, _), parts in groups.items())


def is_moved(row: LedgerRow, index: int, program: Program) -> bool:
    """Whether a part of a row moves an activation or a leaf of the batch."""
    made = row.ends[index].made_by.partition("/")[0]
    return row.kind in _MOVING and made not in ("params", "opt_state", "model_state")


def is_odd(row: LedgerRow, index: int, program: Program) -> bool:
    """Whether a declaration that all others disagree with causes a part of a row."""
    return find_odd(row, index, program) is not None


def find_odd(row: LedgerRow, index: int, program: Program) -> OddDeclaration | None:
    """The declaration that all others disagree with and that causes a part of a row, if any."""
    declared = row.ends[index].declared_by
    return next((odd for odd in program.declared.odd if odd.declared_by == declared), None)


def is_contracted(row: LedgerRow, index: int, program: Program) -> bool:
    """Whether a part of a row sums the results of products with weights split over its axes."""
    stored = {axis for leaf in program.leaves if leaf.part == "params" for axis in leaf.axes()}
    product = row.ends[index].made_by.startswith(PRODUCTS)
    return row.kind in REDUCING and product and bool(stored & set(row.axes))


class ParameterForms:
    """Shapes of a parameter's shards and gradients, which are no activations."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._known: dict[tuple[str, ...], set[tuple[int, ...]]] = {}

    def has(self, row: LedgerRow, index: int) -> bool:
        """Whether an operand has the shape of a parameter, or of one layer of it.

        The arguments of a backward pass are not traced to their parameters. So an activation of
        that shape, too, is passed over.
        """
        (shape,) = parse_shapes(row.operands[index])
        if row.axes not in self._known:
            self._known[row.axes] = set(self._shapes(row.axes))
        known = self._known[row.axes]
        dims = tuple(sorted(size for size in shape.dims if size > 1))
        return dims in known or (row.kind in REDUCING and (math.prod(dims),) in known)

    def _shapes(self, axes: Sequence[str]) -> Iterator[tuple[int, ...]]:
        """Sorted dims of shards, and sizes of gradients before they are reduced over `axes`."""
        sizes = self._program.sizes
        whole = {**sizes, **dict.fromkeys(axes, 1)}
        for leaf in self._program.leaves:
            if leaf.part != "params":
                continue
            for shard in (leaf.shard(sizes), leaf.shard(whole)):
                for dims in (shard, shard[1:]):
                    yield tuple(sorted(size for size in dims if size > 1))
            yield (math.prod(leaf.shard(whole)),)
            yield (math.prod(leaf.shard(whole)[1:]),)


def build_finding(
    program: Program, kind: str, axes: tuple[str, ...], parts: Sequence[Part], what: str
) -> Finding | None:
    """A finding about parts of rows, as yet without a fix; None if they send too little."""
    shares = [
        (row, row.wire_bytes * row.operand_bytes[index] / sum(row.operand_bytes), index)
        for _, row, index in parts
    ]
    sent = sum(size for _, size, _ in shares)
    odd = find_odd(parts[0][1], parts[0][2], program)  # of one declaration, or of none
    if sent <= SMALL or (sent < _WORTH * _minimum(program, axes) and odd is None):
        return None
    lines = bytes_by_source((row, size) for row, size, _ in shares)
    largest, _, index = max(shares, key=lambda one: one[1])
    listed = [f"{line} {format_bytes(round(size))}" for line, size in lines.items()][:_LINES]
    return Finding(
        kind,
        scope=largest.scope,
        axes=axes,
        bytes=round(sent),
        rows=tuple(dict.fromkeys(number for number, _, _ in parts)),
        source=_first_line(program, axes, lines) if odd is None or odd.leaves else odd.source,
        why=f"{len(parts)} × {largest.kind} {what}; the largest is {largest.operands[index]}, "
        f"{largest.ends[index]}" + (f"; by line: {', '.join(listed)}" if listed else ""),
        fix="",
    )


def _with_remedy(program: Program, finding: Finding | None) -> Iterator[Finding]:
    """The finding with what ends it: a constraint where rows are lost first, or another mode."""
    if finding is None:
        return
    first, mode = finding.source, ["shard_map"] if program.fits_shard_map else []
    where = f" at {first}" if first else ""
    line = (first.file, first.line) if first else ("", 0)
    axes = tuple(axis for axis in program.sizes if axis in program.batch_axes)
    entry = axes[0] if len(axes) == 1 else axes
    rule = f'sk.AxisRules({{"batch": {entry!r}}})'
    known = set(axes) <= set(program.declared.activation_axes)
    code = f'sk.nn.constrain(x, "batch", {_other_dims(line, program)})'
    if any((one.source.file, one.source.line) == line for one in program.declared.governing):
        fix, lost = f"{code}{where}: rows stay where they are", []
    elif mode and any(line in one.lines for one in program.declared.governing):
        fix, lost = f'mode="shard_map", which gathers the weights used{where} instead', mode
    else:
        fix = f"x = {code} with the result{where}, where rows are lost first"
        fix += "" if known else f", and activations={rule}"
        fix += '; or mode="shard_map"' if mode else ""
        lost = ["constrain", *mode] if first else mode
    yield dataclasses.replace(finding, fix=fix, alternatives=tuple(lost))


def _other_dims(line: tuple[str, int], program: Program) -> str:
    """`None` for each dim but the rows of the last activation that a line computes; or `...`."""
    batch = [leaf for leaf in program.leaves if leaf.part == "batch" and leaf.dims()]
    rows = {leaf.leaf.shape[0] for leaf in batch if {*leaf.dims()[0]} & program.batch_axes}
    known = "..."
    for eqn in equations(program.jaxpr.jaxpr) if program.jaxpr else ():
        made: Any = eqn.outvars[0].aval if eqn.outvars else None
        shape = getattr(made, "shape", ())
        if len(shape) > 1 and shape[0] in rows and jnp.issubdtype(made.dtype, jnp.floating):
            source = source_of_equation(eqn)
            if source and (source.file, source.line) == line:
                known = ", ".join(["None"] * (len(shape) - 1))
    return known


def _minimum(program: Program, axes: Sequence[str]) -> float:
    """The textbook minimum over some axes together, as far as it is known."""
    kinds = judging_kinds(program)
    return sum(kinds[axis].minimum(program) or 0 for axis in axes if axis in kinds)


def _first_line(
    program: Program, axes: tuple[str, ...], lines: Mapping[Source, float]
) -> Source | None:
    """The line of the first activation that is sent over some axes; of `lines` where none is known.

    What comes after it is a consequence, also what is sent over one of these axes and others. The
    order is that of the traced step.
    """
    groups = activation_parts(program, (), lambda *part: is_moved(*part) or is_contracted(*part))
    sent = (part for over, parts in groups if {*over} & {*axes} for part in parts)
    rows = [row for _, row, _ in sent if row.phase == "forward"]
    known = {(line.file, line.line): line for row in rows for line in row.sources if line}
    known = known or {(line.file, line.line): line for line in lines}
    for equation in equations(program.jaxpr.jaxpr) if program.jaxpr and len(known) > 1 else ():
        source = source_of_equation(equation)
        if source and (source.file, source.line) in known:
            return known[source.file, source.line]
    return next(iter(known.values()), None)


def _gradients_by_size(program: Program, axis: str) -> dict[float, list[PlacedLeaf]]:
    """Matrices by the elements of their gradient on one device, before it is reduced.

    Vectors are left out: sums over rows have their shape, as those of batch statistics.
    """
    whole = {**program.sizes, axis: 1}
    groups: dict[float, list[PlacedLeaf]] = {}
    for leaf in program.leaves:
        if leaf.part == "params" and sum(size > 1 for size in leaf.leaf.shape) > 1:
            groups.setdefault(math.prod(leaf.shard(whole)), []).append(leaf)
    return groups


def _reductions_of(
    program: Program, axis: str, leaves: Sequence[PlacedLeaf]
) -> Iterator[tuple[LedgerRow, float, float]]:
    """Reductions of gradients of one size, or of one layer of them in a loop over layers.

    Yields:
      The row, how many gradients it reduces per step, and its share of the row's bytes.
    """
    size = math.prod(leaves[0].shard({**program.sizes, axis: 1}))
    layers = {leaf.leaf.shape[0] for leaf in leaves if leaf.leaf.shape}
    for row, elements in gradient_reductions(program.ledger, axis, program.leaves, program.sizes):
        counted = sum(
            math.prod(shape.dims) for text in row.operands for shape in parse_shapes(text)
        )
        in_layers = row.counted_trips in layers and elements * row.counted_trips == size
        once = row.counted_trips == 1 and elements == size
        if (once or in_layers) and last_name(row.op_name) not in EXPLICIT:
            yield row, elements / size * row.runs, elements / counted
