"""Calls that a trace leaves open, so that what evaluates it can make them with other weights.

Adapters and quantized weights trace a loss and evaluate it again, and replace weights on the way.
A strategy's own way to compute a part (a pipeline with its derivative rule, an exchange between
experts) cannot be evaluated again, and other weights do not fit into it. So within
`leaving_open()` the part is one equation, which keeps the Python functions that it was called
with; they are rewritten for the other weights, and the part is called with them:

    loss       layer_stack(first, layer, last, {w}, …)
    trace      … open_call[call] closed… w … …
    evaluated  layer_stack(first', layer', last', {w, a, b}, …)    layer' adds (x a) b to x w
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from .._core.tracing import TraceContext
from .._core.types import PyTree

_open = TraceContext[bool]("leave_open")


@dataclasses.dataclass(frozen=True, eq=False)
class OpenCall:
    """A call in a traced program."""

    name: str
    function: Callable[..., Any]  # what was called
    like: Callable[..., Any]  # computes the same; see `call_open`
    tree: Any  # structure of its arguments
    # those leaves of them that are no arrays, such as functions; `_ARRAY` in place of arrays
    rest: tuple[Any, ...]
    # arrays of the trace that the functions among them close over. In the program they are
    # operands, before the arrays among the arguments.
    closed: tuple[Any, ...]

    def split(self, operands: Sequence[Any]) -> tuple[dict[int, Any], tuple[Any, ...], PyTree]:
        """Returns what stands for closed arrays (by `id`), and the arguments of the function.

        Operands are arrays or pytrees in their place.
        """
        closed = dict(zip(map(id, self.closed), operands, strict=False))
        values = iter(operands[len(closed) :])
        leaves = [next(values) if x is _ARRAY else x for x in self.rest]
        args, kwargs = jax.tree.unflatten(self.tree, leaves)
        return closed, args, kwargs

    def call(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Calls the function, or leaves it open once more; returns the arrays of its result."""
        return jax.tree.leaves(call_open(self.name, self.function, self.like, *args, **kwargs))

    def run(self, *operands: Any) -> list[Any]:
        """Makes the call as it was traced, of arrays."""
        closed, args, kwargs = self.split(operands)
        program, _ = trace(self.function, args, kwargs, open_calls=False)
        return core.jaxpr_as_fun(substitute(program, closed))(*operands[len(closed) :])


def substitute(program: core.ClosedJaxpr, closed: Mapping[int, Any]) -> core.ClosedJaxpr:
    """A program with other arrays in place of those that it closes over, by their `id`."""
    return core.ClosedJaxpr(program.jaxpr, [closed.get(id(x), x) for x in program.consts])


_ARRAY = object()
"""In place of an array among the leaves of arguments."""


def leaving_open() -> contextlib.AbstractContextManager[None]:
    """Within the block calls by `call_open` are left open."""
    return _open.use(True)


def call_open(
    name: str, function: Callable[..., Any], like: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Calls a function; where calls are left open, by one equation that keeps it.

    `like` computes the same, and is traced for shapes and for what the functions among the
    arguments close over.
    """
    if not _open.value:
        return function(*args, **kwargs)
    leaves, tree = _flatten((args, kwargs))
    rest = tuple(_ARRAY if is_array(x) else x for x in leaves)
    program, shapes = trace(like, args, kwargs, open_calls=False)
    closed = tuple(x for x in program.consts if isinstance(x, jax.core.Tracer))
    results = open_call_p.bind(
        *closed,
        *filter(is_array, leaves),
        call=OpenCall(name, function, like, tree=tree, rest=rest, closed=closed),
        avals=tuple(program.out_avals),
    )
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def trace(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    open_calls: bool = True,
) -> tuple[core.ClosedJaxpr, Any]:
    """Traces a function, some of whose arguments may be functions or abstract arrays.

    Returns the program of the arrays among them, and what the function returns, abstract. With
    `open_calls`, calls in it are left open.
    """
    leaves, tree = _flatten((tuple(args), dict(kwargs)))

    def run(*arrays: jax.Array) -> Any:
        values = iter(arrays)
        args, kwargs = jax.tree.unflatten(
            tree, [next(values) if is_array(x) else x for x in leaves]
        )
        return function(*args, **kwargs)

    with _open.use(open_calls or None):
        return jax.make_jaxpr(run, return_shape=True)(*filter(is_array, leaves))


def _flatten(arguments: PyTree) -> tuple[list[Any], Any]:
    """Leaves and structure; a function that is a pytree itself is a leaf."""
    return jax.tree.flatten(arguments, is_leaf=callable)


def is_array(x: Any) -> bool:
    """Whether a leaf of arguments is an array, abstract or not."""
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


open_call_p = core.Primitive("shardkit_open_call")
open_call_p.multiple_results = True
open_call_p.def_impl(lambda *operands, call, avals: call.run(*operands))
open_call_p.def_abstract_eval(lambda *operands, call, avals: list(avals))


# A derivative or a `vmap` of the user's own around the call: it is made there as it was traced.
def _jvp(primals: Any, tangents: Any, *, call: OpenCall, avals: Any) -> Any:
    moved = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def run(*values: jax.Array) -> list[Any]:
        operands = list(primals)
        for i, value in zip(moved, values, strict=True):
            operands[i] = value
        return call.run(*operands)

    # Without tangents of zeros: what is not differentiated may be what must not be.
    return jax.jvp(run, tuple(primals[i] for i in moved), tuple(tangents[i] for i in moved))


def _batch(operands: Any, dims: Any, *, call: OpenCall, avals: Any) -> Any:
    results = jax.vmap(call.run, tuple(dims))(*operands)
    return results, [0] * len(results)


ad.primitive_jvps[open_call_p] = _jvp
batching.primitive_batchers[open_call_p] = _batch
mlir.register_lowering(
    open_call_p,
    mlir.lower_fun(lambda *operands, call, avals: call.run(*operands), multiple_results=True),
)
