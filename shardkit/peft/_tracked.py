"""A weight on its way through a traced loss, with its factors in the same form.

The factors have every dim of the weight, of size 1 where they lack it, and the rank behind. So
what moves the dims of the weight, moves theirs:

    query    [embed, heads, head_dim]    reshape → [embed, heads·head_dim]
    a        [embed, 1, 1, rank]                 → [embed, 1, rank]
    b        [1, heads, head_dim, rank]          → [1, heads·head_dim, rank]
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._factors import AdaptedLeaf

Dims = tuple[frozenset[int], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tracked:
    """A weight in a traced loss."""

    value: Any  # the weight, in the form that the loss has brought it to
    a: Any  # [*dims of value or 1, rank]; None while only the dims of a weight are looked for
    b: Any  # the same
    # for each dim of `value` the dims of the parameter that it came from
    dims: Dims = dataclasses.field(metadata={"static": True})
    of: AdaptedLeaf = dataclasses.field(metadata={"static": True})  # the parameter

    @classmethod
    def start(cls, of: AdaptedLeaf, value: jax.Array, factors: Any) -> "Tracked":
        """A weight as the loss gets it, with its factors `{"a", "b"}` or None."""
        a, b = (factors and of.spread(name, factors[name]) for name in "ab")
        return cls(value, a, b, tuple(frozenset({dim}) for dim in range(value.ndim)), of)

    def moved(self, value: Any, dims: Dims, move: Callable[[Any], Any]) -> "Tracked":
        """The weight as `value`, its factors moved alike."""
        a, b = (None if x is None else move(x) for x in (self.a, self.b))
        return dataclasses.replace(self, value=value, a=a, b=b, dims=dims)


Move = Callable[[Tracked, Mapping[str, Any], list[Any], Any], Tracked | None]


def _keep(w: Tracked, params: Mapping[str, Any], rest: list[Any], value: Any) -> Tracked | None:
    fractions = jnp.issubdtype(value.dtype, jnp.inexact)
    return dataclasses.replace(w, value=value) if fractions else None


def _stop(w: Tracked, params: Mapping[str, Any], rest: list[Any], value: Any) -> Tracked:
    return w.moved(value, w.dims, jax.lax.stop_gradient)


def _transpose(w: Tracked, params: Mapping[str, Any], rest: list[Any], value: Any) -> Tracked:
    order = params["permutation"]
    dims = tuple(w.dims[dim] for dim in order)
    return w.moved(value, dims, lambda x: x.transpose(*order, len(order)))


def _squeeze(w: Tracked, params: Mapping[str, Any], rest: list[Any], value: Any) -> Tracked:
    gone = params["dimensions"]
    dims = tuple(labels for dim, labels in enumerate(w.dims) if dim not in gone)
    return w.moved(value, dims, lambda x: x.squeeze(gone))


def _broadcast(
    w: Tracked, params: Mapping[str, Any], rest: list[Any], value: Any
) -> Tracked | None:
    """Of a weight that only gets dims of size 1."""
    places = params["broadcast_dimensions"]
    if value.size != w.value.size:
        return None
    labels = dict(zip(places, w.dims, strict=True))
    dims = tuple(labels.get(dim, frozenset()) for dim in range(value.ndim))

    def move(x: Any) -> Any:
        sizes = dict(zip(places, x.shape, strict=False))
        return x.reshape(*(sizes.get(dim, 1) for dim in range(value.ndim)), x.shape[-1])

    return w.moved(value, dims, move)


def _reshape(w: Tracked, params: Mapping[str, Any], rest: list[Any], value: Any) -> Tracked | None:
    """Of a weight whose dims are joined and split within inputs, within outputs or within stacks.

    A factor has either all dims of such a group, or none.
    """
    groups = _group(w.value.shape, value.shape)
    if params["dimensions"] is not None:
        return None
    dims: list[frozenset[int]] = []
    for old, new in groups:
        wide = [dim for dim in old if w.value.shape[dim] > 1] or old
        dims += [frozenset().union(*(w.dims[dim] for dim in wide))] * len(new)

    def sizes(x: Any) -> list[int] | None:
        shape: list[int] = []
        for old, new in groups:
            has = math.prod(x.shape[dim] for dim in old)
            whole = math.prod(value.shape[dim] for dim in new)
            if has not in (1, whole):
                return None
            shape += [value.shape[dim] if has == whole else 1 for dim in new]
        return shape

    if w.a is not None and (sizes(w.a) is None or sizes(w.b) is None):
        return None
    return w.moved(value, tuple(dims), lambda x: x.reshape(*(sizes(x) or ()), x.shape[-1]))


def _group(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs the dims of two shapes of one array into the smallest groups of equal sizes.

    >>> _group((4, 6), (4, 2, 3))
    [([0], [0]), ([1], [1, 2])]
    """
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        from_old, from_new = old[i : i + 1], new[j : j + 1]
        while math.prod(from_old) != math.prod(from_new):
            if math.prod(from_old) < math.prod(from_new):
                from_old = old[i : i + len(from_old) + 1]
            else:
                from_new = new[j : j + len(from_new) + 1]
        ends = i + len(from_old), j + len(from_new)
        groups.append((list(range(i, ends[0])), list(range(j, ends[1]))))
        i, j = ends
    return groups


def _slice(w: Tracked, params: Mapping[str, Any], rest: list[Any], value: Any) -> Tracked:
    starts, strides = params["start_indices"], params["strides"] or [1] * w.value.ndim
    ends = params["limit_indices"]

    def move(x: Any) -> Any:
        index = [
            slice(start, end, stride) if x.shape[dim] == w.value.shape[dim] else slice(None)
            for dim, (start, end, stride) in enumerate(zip(starts, ends, strides, strict=True))
        ]
        return x[tuple(index)]

    return w.moved(value, w.dims, move)


def split(w: Tracked, params: Mapping[str, Any], parts: Sequence[Any]) -> list[Tracked]:
    """The parts of a weight that `jnp.split` cuts along a dim."""
    dim, ends = params["axis"], list(itertools.accumulate(params["sizes"]))

    def cut(x: Any, start: int, end: int) -> Any:
        has_dim = x.shape[dim] == w.value.shape[dim]
        return jax.lax.slice_in_dim(x, start, end, axis=dim) if has_dim else x

    places = zip(parts, [0, *ends], ends, strict=False)
    return [
        w.moved(part, w.dims, functools.partial(cut, start=start, end=end))
        for part, start, end in places
    ]


def _dynamic_slice(w: Tracked, params: Mapping[str, Any], rest: list[Any], value: Any) -> Tracked:
    def move(x: Any) -> Any:
        for dim, (start, size) in enumerate(zip(rest, params["slice_sizes"], strict=True)):
            if size < x.shape[dim] == w.value.shape[dim]:
                x = jax.lax.dynamic_slice_in_dim(x, start, size, dim)
        return x

    return w.moved(value, w.dims, move)


_KEEPING = """all_gather convert_element_type copy copy_p name pcast pvary sharding_constraint
    shardkit_constrain shardkit_record shardkit_use_param shardkit_vary""".split()
# What may happen to a weight before it is multiplied. All of it is linear.
MOVES: Mapping[str, Move] = {
    **dict.fromkeys(_KEEPING, _keep),
    "stop_gradient": _stop,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
}
