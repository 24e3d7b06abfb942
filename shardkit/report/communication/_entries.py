"""Finds the line at which a mesh axis comes to split what a loss computes.

A parameter that is whole over an axis has a gradient that is gathered over it where something else
is split over the axis and spreads, perhaps far from there. On mesh (data=2, tensor=4):

    h = x @ w                    w: P(), h: P('data', None)
    gap = h - labels             labels: P(None, 'tensor'), so that gap, and the gradient of h, is
                                 split over tensor: the columns of w's gradient are gathered

Nothing is wrong with the product; tensor comes in with `labels`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jax.extend import core

from ..._core.equations import source_of_equation
from ..._core.source import Source
from .._placed_leaf import PlacedLeaf

if TYPE_CHECKING:
    from .._program import Program


PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot")
CONSTRAINTS = frozenset({"sharding_constraint", "shardkit_constrain"})
# Collectives that the loss itself asks for.
EXPLICIT = frozenset(
    """all_gather all_gather_invariant all_gather_reduced all_to_all ppermute pbroadcast psum
    psum_invariant psum_scatter ragged_all_to_all reduce_scatter""".split()
)
_AVERAGING = ("mul", "add", "sub")
_FORMS = ("convert_element_type", "transpose")
Line = tuple[str, int]


def find_entry(program: "Program", axes: Sequence[str]) -> Source | None:
    """The only line at which axes come to split a dim that is not the rows; None if there are more.

    It is a constraint's, or that which first reads an argument. Beside products, whose results may
    be split or summed as they should be, it is the only one at which something else reads a matrix
    split along its rows.
    """
    found, spread = dict[tuple[str, int], Source](), dict[tuple[str, int], Source]()
    for one in program.declared.governing:
        dims = one.dims[1:] if program.batch_axes & set(axes) else one.dims
        if any(set(axes) & set(dim) for dim in dims):
            found[one.source.file, one.source.line] = one.source
    if program.jaxpr is not None:
        split = {n for n, leaf in enumerate(program.leaves) if _is_split(leaf, axes)}
        arguments = program.jaxpr.jaxpr.invars
        tracked = {value: n for n, value in enumerate(arguments) if n in split}
        for eqn, source, n in _first_readers(program.jaxpr.jaxpr, tracked):
            found[source.file, source.line] = source
            by_rows = any(set(axes) & set(dim) for dim in program.leaves[n].dims()[1:])
            if by_rows and eqn.primitive.name not in PRODUCTS:
                spread[source.file, source.line] = source
    return next((next(iter(of.values())) for of in (found, spread) if len(of) == 1), None)


def find_readers(jaxpr: core.Jaxpr, argument: Any) -> list[tuple[Source, str]]:
    """The lines that read an argument of a traced step, with the names of their operations.

    The first one comes first. Constraints are passed over: convolutions have some of the step's
    own. So is what computes an average of a matrix, where something else reads it too.
    """
    readers = [
        (one[1], one[0].primitive.name)
        for one in _readers(jaxpr, {argument: 0})
        if one[0].primitive.name not in CONSTRAINTS
    ]
    others = [one for one in readers if argument.aval.ndim < 2 or one[1] not in _AVERAGING]
    return others or readers


def splits_matrix(program: "Program", axes: Sequence[str]) -> bool:
    """Whether a parameter that can be multiplied, not a vector, is split over one of some axes."""
    return any(
        leaf.part == "params" and len(leaf.leaf.shape) > 1 and set(axes) & set(leaf.axes())
        for leaf in program.leaves
    )


def _is_split(leaf: PlacedLeaf, axes: Sequence[str]) -> bool:
    """Whether a leaf brings an axis into the loss, other than by the rows of the batch."""
    dims = leaf.dims()[1:] if leaf.part == "batch" else leaf.dims()
    return leaf.part != "opt_state" and any(set(axes) & set(dim) for dim in dims)


def weights_of_products(program: "Program") -> dict[Line, list[PlacedLeaf]]:
    """The parameters that the products of each line multiply with, forward or backward."""
    weights: dict[Line, list[PlacedLeaf]] = {}
    if program.jaxpr is None:
        return weights
    arguments = zip(program.jaxpr.jaxpr.invars, program.leaves, strict=False)
    tracked = {v: n for n, (v, leaf) in enumerate(arguments) if leaf.part == "params"}
    for eqn, source, n in _readers(program.jaxpr.jaxpr, tracked):
        if eqn.primitive.name in PRODUCTS:
            found = weights.setdefault((source.file, source.line), [])
            found += [program.leaves[n]] if program.leaves[n] not in found else []
    return weights


def _first_readers(
    jaxpr: core.Jaxpr, tracked: Mapping[Any, int]
) -> Iterator[tuple[core.JaxprEqn, Source, int]]:
    """The first operation of the loss that reads each of some arguments, its line, their number."""
    known = set[int]()
    for eqn, source, n in _readers(jaxpr, tracked):
        if n not in known:
            yield eqn, source, n
        known.add(n)


def _readers(
    jaxpr: core.Jaxpr, tracked: Mapping[Any, int], within: Source | None = None
) -> Iterator[tuple[core.JaxprEqn, Source, int]]:
    """The operations of the loss that read some arguments, their lines, the arguments' numbers.

    Operations that JAX traced before, as those of `jnp.take`, have the line of the call.
    """
    arguments = dict(tracked)
    for eqn in jaxpr.eqns:
        read = {
            v: arguments[v]
            for v in eqn.invars
            if not isinstance(v, core.Literal) and v in arguments
        }
        if not read:
            continue
        source = source_of_equation(eqn) or within
        inner = list(core.jaxprs_in_params(eqn.params))
        for body in inner:
            # The last operands of a call, a loop or a branch are those of its body.
            passed = zip(reversed(eqn.invars), reversed(body.invars), strict=False)
            own = {
                inside: read[v]
                for v, inside in passed
                if not isinstance(v, core.Literal) and v in read
            }
            yield from _readers(body, own, source)
        if inner:
            continue
        # A constraint of the step's own, or another form of the same array.
        if source is None or eqn.primitive.name in _FORMS:
            arguments.update(dict.fromkeys(eqn.outvars[:1], next(iter(read.values()))))
            continue
        yield from ((eqn, source, n) for n in read.values())
        if eqn.primitive.name in CONSTRAINTS:  # the same array again
            arguments.update(dict.fromkeys(eqn.outvars, next(iter(read.values()))))
