"""What to change where all other declarations disagree with one: that one, to their layout."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .._placed_leaf import PlacedLeaf
from .._program import Program
from ..communication._governing import OddDeclaration
from ..communication._ledger import Ledger
from ._finding import Finding
from ._messages import format_spec

AGREE = "agree"
# What says of an array that it is moved, or kept whole, and not what to do with both its layouts.
_KINDS = frozenset(
    """parameter_gather resharding dim_gather product_gather activation_gather gradient_gather
    stored_contraction split_contraction replicated_activation""".split()
)
_WHY = "which all other declarations agree with"


def correct_declarations(program: Program, findings: Iterable[Finding]) -> Iterator[Finding]:
    """The findings; those of what such a declaration causes have its layout as their fix."""
    for finding in findings:
        odd = find_blamed(finding, program.ledger, program.declared.odd)
        if odd is None:
            yield finding
        else:
            fix = _suggest_layout(odd, program)
            yield dataclasses.replace(finding, fix=fix, alternatives=(AGREE,))


def find_blamed(
    finding: Finding, ledger: Ledger, declarations: Iterable[OddDeclaration]
) -> OddDeclaration | None:
    """The declaration that causes what a finding says; None if none of these does."""
    if finding.kind not in _KINDS:
        return None
    rows = [ledger[number] for number in finding.rows]
    declared = {end.declared_by for row in rows for end in row.ends}
    for odd in declarations:
        # What is kept in the layout that a constraint forces is of no collective.
        named = odd.declared_by in declared or not (finding.rows or odd.leaves)
        at_line = odd.source == finding.source or odd.leaves
        if named and at_line and odd.axes & {*finding.axes}:
            return odd
    return None


def _suggest_layout(odd: OddDeclaration, program: Program) -> str:
    if not odd.leaves:
        dims = odd.dims(program.sizes)
        spec = format_spec([axes for axes in dims if axes is not None])
        return f"{spec} in the constraint at {odd.source}, {_WHY}"
    known = {leaf: leaf.dims() for leaf in program.leaves if leaf.part == "batch"}
    code = (
        f"batch={_rules(known | dims)}"
        if part == "batch"
        else f"{part}=sk.first_match({_rules(dims)}, strategy.{part})"
        for part, dims in odd.layouts(program.sizes).items()
    )
    return f"{' and '.join(code)}, {_WHY}"


def _rules(layouts: Mapping[PlacedLeaf, Sequence[Sequence[str]]]) -> str:
    """`sk.PathRules({"scale": P(None)})`."""
    specs = (f'"{leaf.leaf.path}": {format_spec(dims)}' for leaf, dims in layouts.items())
    return f"sk.PathRules({{{', '.join(specs)}}})"
