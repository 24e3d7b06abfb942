"""What to change where all other declarations disagree with one: that one, to their layout."""

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from jax.sharding import PartitionSpec

from ..._core.source import Source
from ..._core.tree import format_bytes
from .._placed_leaf import PlacedLeaf
from .._program import Program
from ..communication._governing import OddDeclaration, SplitDim, layouts_of_others
from ..communication._ledger import Ledger
from ..hlo._hlo import parse_shapes
from ._finding import AGREE, MOVE, Finding, bytes_by_source
from ._messages import format_axes, format_spec

# What says of an array that it is moved, or kept whole, and not what to do with both its layouts.
_KINDS = frozenset(
    """parameter_gather resharding dim_gather product_gather activation_gather gradient_gather
    stored_contraction split_contraction spec_mismatch replicated_activation""".split()
)
_OF_PRODUCTS = ("product_gather", "split_contraction")
Axes = tuple[str, ...]
_WHY = "which all other declarations agree with"


def correct_declarations(program: Program, findings: Iterable[Finding]) -> Iterator[Finding]:
    """The findings; of all that one such declaration sends there is one, its layout as the fix."""
    caused: dict[tuple[str, ...], list[tuple[Finding, OddDeclaration]]] = {}
    for finding in findings:
        odd = _find_blamed(finding, program.ledger, program.declared.odd)
        if odd is None:
            yield _with_another_dim(finding, program)
        elif finding.rows:
            caused.setdefault(odd.together, []).append((finding, odd))
        else:  # what it keeps in memory
            yield _with_layouts(finding, [odd], program)
    others = {one.together: one for one in program.declared.odd if not one.either}
    others = {names: one for names, one in others.items() if names not in caused}
    for found in sorted(caused.values(), key=lambda found: -sum(one.bytes for one, _ in found)):
        finding, odd = _join(found)
        # What several cause together is sent at the lines of one.
        also = [one for one in others.values() if one.axes & odd.axes]
        others = {names: one for names, one in others.items() if one not in also}
        yield _with_layouts(finding, [odd, *also], program)


def _with_layouts(finding: Finding, odd: Sequence[OddDeclaration], program: Program) -> Finding:
    return dataclasses.replace(
        finding,
        source=_find_line(finding, odd[0], program),
        fix=f"{' and '.join(_suggest_layouts(odd, program))}, {_WHY}",
        alternatives=(AGREE,),
        declarations=tuple(name for one in odd for name in one.together),
    )


def _with_another_dim(finding: Finding, program: Program) -> Finding:
    """The finding; of a dim that an operation of its line needs, with what splits another one."""
    tried = finding.alternatives or not finding.rows or finding.kind not in _KINDS
    moved = () if tried else move_dims(finding, program)
    if not moved:
        return finding
    axes = {*finding.axes}
    names = [
        axis for axis in program.sizes if axis in axes & {a for one in moved for a in one.axes}
    ]
    why = f"so that what is computed at {moved[0].source} has all of the dim that "
    why += f"{', '.join(names)} splits"
    if finding.kind == "gradient_gather" and not {*finding.axes} & {
        a for one in moved for leaf in one.leaves for a in leaf.axes()
    }:
        why = "as their gradients are split"
    return dataclasses.replace(
        finding,
        fix=f"{' and '.join(_suggest_layouts(moved, program))}, {why}",
        alternatives=(MOVE,),
        declarations=tuple(one.declared_by for one in moved),
    )


def move_dims(finding: Finding, program: Program) -> tuple[OddDeclaration, ...]:
    """What splits a dim that an operation of a finding's line needs, with another dim split.

    Of weights that nothing says that of, those that the line's products multiply with: what they
    sum becomes their columns, and the other way round; or their gradient's own split.
    """
    line = finding.source
    read = program.weights.get((line.file, line.line), []) if line else []
    stored = [leaf for leaf in read if leaf.name == finding.leaf]
    moved = [(leaf, _without_rows(leaf, finding.axes, program)) for leaf in stored]
    split = _find_split_dim(finding, program.declared.split_dims)
    if split is not None and split.declarations and all(d == one.dims() for one, d in moved):
        return split.declarations
    if line is None:
        return ()
    if finding.kind == "gradient_gather":
        moved = [(leaf, _like_gradient(leaf, finding, program)) for leaf in read]
    elif finding.kind in _OF_PRODUCTS:
        moved = [(leaf, _swap(leaf, finding.axes, program)) for leaf in read]
    return tuple(
        OddDeclaration(
            line,
            frozenset(finding.axes),
            f"{leaf.declared_by} of {leaf.name}",
            shape=leaf.leaf.shape,
            layout=dims,
            sums=frozenset(),
            leaves=(leaf,),
        )
        for leaf, dims in moved
        if dims != leaf.dims()
    )


def _without_rows(leaf: PlacedLeaf, axes: Sequence[str], program: Program) -> tuple[Axes, ...]:
    """The dims of a parameter, whole over axes of rows: nothing declares that these store it."""
    rows = {*axes} & program.batch_axes
    return tuple(tuple(a for a in dim if a not in rows) for dim in leaf.dims())


def _like_gradient(leaf: PlacedLeaf, finding: Finding, program: Program) -> tuple[Axes, ...]:
    """The dims of a parameter, split as the parts of its gradient that a finding's rows gather."""
    rows = (program.ledger[number] for number in finding.rows)
    texts = (text for row in rows for text in row.operands)
    parts = {tuple(sorted(shape.dims)) for text in texts for shape in parse_shapes(text)}
    for dim, axes in enumerate(leaf.dims()):
        split = (*leaf.dims()[:dim], (*axes, *finding.axes), *leaf.dims()[dim + 1 :])
        like = dataclasses.replace(leaf, spec=PartitionSpec(*split))
        if (
            not {*finding.axes} & {*leaf.axes()}
            and tuple(sorted(like.shard(program.sizes))) in parts
        ):
            return split
    return leaf.dims()


def _swap(leaf: PlacedLeaf, axes: Collection[str], program: Program) -> tuple[Axes, ...]:
    """The dims of a matrix, or of a stack of these, with axes on its other dim if that divides."""
    *stack, rows, columns = ((), *leaf.dims()) if len(leaf.leaf.shape) < 2 else leaf.dims()
    here = {*axes} & {*rows, *columns}
    swapped = [
        (*(a for a in own if a not in here), *(a for a in other if a in here))
        for own, other in ((rows, columns), (columns, rows))
    ]
    sizes = zip(leaf.leaf.shape[-2:], swapped, strict=False)
    fits = all(n % math.prod(program.sizes[a] for a in dim) == 0 for n, dim in sizes)
    return (*stack, *swapped) if len(leaf.leaf.shape) > 1 and fits else leaf.dims()


def _find_split_dim(finding: Finding, split_dims: Iterable[SplitDim]) -> SplitDim | None:
    """The dim of the largest arrays, of those that an operation of a finding's line needs whole.

    Compilers can give a gather the line before. So it is the only one of the step, too.
    """
    at = finding.source
    line = at and (at.file, at.line)
    split = [one for one in split_dims if one.axis in finding.axes]
    here = [one for one in split if (one.source.file, one.source.line) == line]
    if not here and len({(one.source, one.declarations) for one in split}) == 1:
        here = split
    sizes = {one: sum(math.prod(of.shape) for of in one.declarations) for one in here}
    return max(sizes, key=sizes.__getitem__, default=None)


def _find_line(finding: Finding, odd: OddDeclaration, program: Program) -> Source:
    """The line of the constraint; of a leaf the one, of those that read it, that sends the most."""
    rows = (program.ledger[number] for number in finding.rows)
    lines = bytes_by_source((row, row.wire_bytes) for row in rows)
    read = (line for line in lines if (line.file, line.line) in odd.readers)
    return next(read, odd.source)


def _join(
    found: Sequence[tuple[Finding, OddDeclaration]],
) -> tuple[Finding, OddDeclaration]:
    """One finding of what several say of one declaration, that with the most bytes first."""
    (largest, odd), *_ = sorted(found, key=lambda one: -one[0].bytes)
    findings = [one for one, _ in found]
    others = [one for one in findings if one is not largest]
    by_kind: dict[str, list[int]] = {}
    for one in others:
        by_kind.setdefault(one.kind, []).append(one.bytes)
    beside = (
        f"{f'{len(sizes)} × ' if len(sizes) > 1 else ''}{kind}, {format_bytes(sum(sizes))}"
        for kind, sizes in by_kind.items()
    )
    joined = dataclasses.replace(
        largest,
        bytes=sum(one.bytes for one in findings),
        rows=tuple(dict.fromkeys(row for one in (largest, *others) for row in one.rows)),
        why=largest.why + (f"; beside it {'; '.join(beside)}" if others else ""),
    )
    return joined, odd


def _find_blamed(
    finding: Finding, ledger: Ledger, declarations: Sequence[OddDeclaration]
) -> OddDeclaration | None:
    """The declaration that causes what a finding says; None if none of these does."""
    if finding.kind not in _KINDS:
        return None
    rows = [ledger[number] for number in finding.rows]
    declared = Counter(end.declared_by for row in rows for end in row.ends)
    named = [
        odd
        for odd in declarations
        # What is kept in the layout that a constraint forces is of no collective.
        if (odd.declared_by in declared or not (finding.rows or odd.leaves))
        and (odd.source == finding.source or odd.leaves)
        and (odd.axes & {*finding.axes} or not odd.leaves)
    ]
    return max(named, key=lambda odd: declared[odd.declared_by], default=None)


def _suggest_layouts(odd: Sequence[OddDeclaration], program: Program) -> Iterator[str]:
    """The code of each constraint and of each part of the step."""
    for one in (one for one in odd if not one.leaves):
        if one.mapped:
            table = ", ".join(f"{name!r}: {format_axes(axes)}" for name, axes in one.mapped)
            yield f"strategy.with_names(activations={{{table}}})"
        if one.names or not one.mapped:
            dims = one.dims(program.sizes)
            spec = format_spec([axes for axes in dims if axes is not None])
            if one.names:
                spec = f"sk.nn.constrain(x, {', '.join(map(repr, one.names))})"
            yield f"{spec} in the constraint at {one.source}"
    known = {leaf: leaf.dims() for leaf in program.leaves if leaf.part == "batch"}
    for part, dims in layouts_of_others(odd, program.sizes).items():
        if part == "batch":
            yield f"batch={_rules(known | dims)}"
        else:
            yield f"{part}=sk.first_match({_rules(dims)}, strategy.{part})"


def _rules(layouts: Mapping[PlacedLeaf, Sequence[Sequence[str]]]) -> str:
    """`sk.PathRules({"scale": P(None)})`."""
    specs = (f'"{leaf.leaf.path}": {format_spec(dims)}' for leaf, dims in layouts.items())
    return f"sk.PathRules({{{', '.join(specs)}}})"
