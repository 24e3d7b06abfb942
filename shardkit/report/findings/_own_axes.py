"""What is sent over axes of a layout of the user's own, on which there is no kind of parallelism.

On mesh (data=2, tensor=4), each line with what makes it send too much:

    x @ a @ b                    a, b: P(None, 'tensor'): x @ a is gathered, b's rows would do
    jnp.cumsum(x, 1)             x: P('data', 'tensor'): the whole of dim 1 is gathered
    h @ table.T                  table: P(None, 'tensor'): [rows, vocab] is summed over tensor
    h - labels                   labels: P(None, 'tensor'): so is h's gradient, and that of weights
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from jax.extend import core

from ..._core.equations import source_of_equation
from ..._core.tracing import equations
from .._program import Program
from ..communication._entries import PRODUCTS, splits_matrix
from ..communication._ledger import LedgerRow
from ..communication._reductions import REDUCING
from ..hlo._hlo import parse_shapes
from ..memory._saved import is_shard_summed
from ._finding import Finding, bytes_by_source
from ._row_axes import (
    COMPUTING,
    ParameterForms,
    Part,
    activation_parts,
    build_finding,
    find_odd,
    is_moved,
    is_odd,
)

_Wanted = Callable[[LedgerRow, int, Program], bool]


def product_gathers(program: Program, claimed: Collection[int]) -> Iterator[Finding]:
    """Activations gathered for a product: its weight is split along the wrong dim."""
    for axes, finding in _gathers(program, claimed, "product_gather", "for products", _for_product):
        fix = f"a rule that splits the weight multiplied{_at(finding)} over {axes} along the dim "
        yield dataclasses.replace(
            finding, fix=fix + "that it contracts, so that the array before it stays split"
        )


def dim_gathers(program: Program, claimed: Collection[int]) -> Iterator[Finding]:
    """Activations gathered for another operation, which takes the whole of a split dim."""
    what = "for an operation or a constraint that takes the whole of a split dim"
    for axes, finding in _gathers(program, claimed, "dim_gather", what, _for_whole_dim):
        fix = f'x = sk.nn.constrain(x, "batch", ...){_at(finding)}, with {axes} on '
        if finding.source in {one.source for one in program.declared.governing}:
            fix += "the dim of x that it splits before"
        else:
            fix += "no dim of x, or on one that the operation leaves apart"
        yield dataclasses.replace(finding, fix=fix)


def gradient_gathers(program: Program, claimed: Collection[int]) -> Iterator[Finding]:
    """Gradients of parameters that are whole over an axis, computed in parts and gathered."""
    stored = {k.axis for k in program.declared.kinds if {"weights", "optimizer_state"} & k.splits}
    over = {axis for row in program.ledger for axis in row.axes} - stored
    forms = _NoForms(program)
    # The constraints that a step has for gradients are of no phase of the loss.
    phases = (*COMPUTING, "other")
    gathered = activation_parts(program, claimed, _is_gradient, over, forms=forms, phases=phases)
    for axes, parts in gathered:
        names = ", ".join(axes)
        what = f"of gradients, computed in parts over {names} and gathered: their parameters are "
        what += "whole, and something that they are computed from is split"
        finding = _at_largest(
            program, build_finding(program, "gradient_gather", axes, parts, what), parts
        )
        if finding is not None:
            fix = f"a rule that splits these parameters over {names} like their gradients, or "
            fix += f"another layout of what is read{_at(finding)}, where {names} comes in"
            # No spec splits a dim over a part of an axis, as keys of 2 heads over 4 devices are.
            said = any(row.full_axes for _, row, _ in parts)
            yield dataclasses.replace(finding, fix=fix if said else "")


def split_contractions(program: Program, claimed: Collection[int]) -> Iterator[Finding]:
    """Results of products that are summed over an axis, and larger than what was multiplied."""
    if program.declared.kinds or not program.leaves or program.jaxpr is None:
        return
    over = {axis for row in program.ledger for axis in row.axes} - program.batch_axes
    for axes, parts in activation_parts(program, claimed, _is_widened, over):
        names = ", ".join(axes)
        what = f"of results of products that contract a dim split over {names}, which are larger "
        what += "than the activations multiplied"
        if any(is_odd(row, index, program) for _, row, index in parts):
            what = f"of products and sums over a dim that one declaration alone splits over {names}"
        finding = _at_largest(
            program, build_finding(program, "split_contraction", axes, parts, what), parts
        )
        if finding is not None:
            fix = f"a rule that splits what is multiplied{_at(finding)} over {names} along a dim "
            yield dataclasses.replace(finding, fix=fix + "that the product keeps, in place of this")


def _at_largest(program: Program, finding: Finding | None, parts: Sequence[Part]) -> Finding | None:
    """The finding with the line that sends the most, in place of the first one of the step.

    Of what a constraint causes it is the constraint's.
    """
    odd = find_odd(*parts[0][1:], program)
    if finding is None or (odd is not None and not odd.leaves):
        return finding
    lines = bytes_by_source((row, row.wire_bytes) for _, row, _ in parts)
    return dataclasses.replace(finding, source=next(iter(lines), None))


def _at(finding: Finding) -> str:
    return f" at {finding.source}" if finding.source else ""


def _gathers(
    program: Program, claimed: Collection[int], kind: str, what: str, wanted: _Wanted
) -> Iterator[tuple[str, Finding]]:
    """Findings about activations gathered over axes that no rows are split over, with the axes."""
    if program.declared.kinds or not program.leaves:
        return
    over = {axis for row in program.ledger for axis in row.axes} - program.batch_axes
    for axes, parts in activation_parts(program, claimed, wanted, over):
        names = ", ".join(axes)
        text = f"of activations {what}, over {names}"
        finding = _at_largest(program, build_finding(program, kind, axes, parts, text), parts)
        if finding is not None:
            yield names, finding


def _is_gathered(row: LedgerRow, index: int, program: Program) -> bool:
    """Whether a part of a row gathers an activation or a leaf of the batch."""
    return row.kind == "all-gather" and is_moved(row, index, program)


def _for_product(row: LedgerRow, index: int, program: Program) -> bool:
    """Whether it does for a product alone: no constraint and no batch spec decides its layout."""
    wanted, declared = row.ends[index].wanted_by, row.ends[index].declared_by
    weights = [one for one in program.leaves if one.part == "params" and len(one.leaf.shape) > 1]
    by_weight = any(declared.endswith(f" of {leaf.name}") for leaf in weights)
    product = by_weight or (not declared and (not wanted or wanted.startswith(PRODUCTS)))
    return product and _is_gathered(row, index, program) and splits_matrix(program, row.axes)


def _for_whole_dim(row: LedgerRow, index: int, program: Program) -> bool:
    return _is_gathered(row, index, program) and not _for_product(row, index, program)


def _is_gradient(row: LedgerRow, index: int, program: Program) -> bool:
    """Whether a part of a row moves what the loss computed to the update."""
    moved = is_moved(row, index, program) and not row.ends[index].made_by.startswith("batch")
    return moved and row.ends[index].wanted_by.endswith("of the update")


def _is_widened(row: LedgerRow, index: int, program: Program) -> bool:
    """Whether a part of a row sums the results of a product with smaller activations.

    Or those over a dim that all declarations but one leave whole.
    """
    product = row.ends[index].made_by.startswith(PRODUCTS)
    if row.kind in REDUCING and is_odd(row, index, program):
        return True
    if row.kind not in REDUCING or row.phases[index] != "forward" or not product:
        return False
    (local,) = parse_shapes(row.operands[index])
    source = row.sources[index] if row.sources else None
    widened = []
    for eqn in equations(program.jaxpr.jaxpr) if program.jaxpr and source else ():
        own = source_of_equation(eqn) if eqn.primitive.name in PRODUCTS else None
        if own and source and (own.file, own.line) == (source.file, source.line):
            made: Any = eqn.outvars[0].aval
            if is_shard_summed(local.dims, made.shape, row.axes, program.sizes):
                widened.append(0 < _largest_activation(eqn, program) < math.prod(made.shape))
    return bool(widened) and all(widened)  # which one of the line it is, is not known


def _largest_activation(product: core.JaxprEqn, program: Program) -> int:
    """Elements of the larger operand of a product that is no parameter; 0 if none is."""
    leaves = [leaf.leaf.shape for leaf in program.leaves if leaf.part == "params"]
    params = {tuple(sorted(dims)) for shape in leaves for dims in (shape, shape[1:])}
    avals: list[Any] = [value.aval for value in product.invars[:2]]
    shapes = (aval.shape for aval in avals)
    sizes = (math.prod(shape) for shape in shapes if tuple(sorted(shape)) not in params)
    return max(sizes, default=0)


class _NoForms(ParameterForms):
    """Takes no array for a parameter's: gradients have the shapes of parameters."""

    def has(self, row: LedgerRow, index: int) -> bool:
        """Never."""
        return False
