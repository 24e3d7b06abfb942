"""Reads what XLA prints to file descriptor 2 while it compiles."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from ..hlo._groups import read_groups, span_of_groups
from ..hlo._hlo import parse_shapes
from ..hlo._scope import scope_of
from ..hlo._source_lines import place_in

_REMAT = re.compile(
    r"Involuntary full rematerialization\.[^\n]*?from sharding (?P<source>\{.*?\}) to "
    r"(?P<target>\{.*?\}) (?:efficiently|without)[^\n]*?HLO operation:? (?P<hlo>[^\n]*)"
)
_TILES = re.compile(r"devices=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?(?P<rest>.*)")
_NAMED = re.compile(r"mesh\[(?P<sizes>[^\]]*)\].*?, \[(?P<dims>.*)\]")


@dataclasses.dataclass(frozen=True)
class InvoluntaryRemat:
    """One involuntary full rematerialization."""

    scope: str  # the model's scope
    shape: str  # `f32[8,16,32]`, whole
    source: str  # the spec it has, `P('data', None)`; XLA's own text if it is not a spec
    target: str  # the spec that it goes to
    axes: tuple[str, ...]  # mesh axes in either
    nbytes: int  # bytes of the whole array, which every device holds temporarily
    # mesh axes per dim of a spec that moves one axis of the source to its dim in the target; () if
    # there is none
    between: tuple[tuple[str, ...], ...] = ()
    # what the message says of the source of the operation that makes the array, as `place_of` reads
    # it from the compiled program
    place: str = ""


def find_involuntary_remats(log: str, mesh: Sequence[tuple[str, int]]) -> list[InvoluntaryRemat]:
    """Finds XLA's warnings about involuntary full rematerialization, each once."""
    remats = {}
    for match in _REMAT.finditer(log):
        remats[match["source"], match["target"], match["hlo"]] = _parse_message(match, mesh)
    return list(remats.values())


def _parse_message(match: re.Match[str], mesh: Sequence[tuple[str, int]]) -> InvoluntaryRemat:
    source, target = (parse_spec(match[end], mesh) for end in ("source", "target"))
    op_name = re.search(r'op_name="([^"]*)"', match["hlo"])
    local = parse_shapes(match["hlo"])[0]
    sizes = dict(mesh)
    # The message has the shape of one device's shard under the source sharding.
    ways = [math.prod(sizes[axis] for axis in dim) for dim in source or ()]
    ways += [1] * (len(local.dims) - len(ways))
    whole = dataclasses.replace(
        local, dims=tuple(size * n for size, n in zip(local.dims, ways, strict=False))
    )
    named = {axis for spec in (source, target) for dim in spec or () for axis in dim}
    return InvoluntaryRemat(
        scope=scope_of(op_name.group(1)) if op_name else "",
        shape=str(whole),
        source=match["source"] if source is None else format_spec(source),
        target=match["target"] if target is None else format_spec(target),
        axes=tuple(axis for axis in sizes if axis in named),
        nbytes=whole.nbytes,
        between=_intermediate_spec(source or (), target or (), whole.dims, sizes),
        place=place_in(match["hlo"]),
    )


def _intermediate_spec(
    source: Sequence[tuple[str, ...]],
    target: Sequence[tuple[str, ...]],
    whole: Sequence[int],
    sizes: Mapping[str, int],
) -> tuple[tuple[str, ...], ...]:
    """The source with one axis moved: the first that is on another dim of the target.

    >>> source, target = [("data",), (), ("tensor",)], [(), ("data", "tensor"), ()]
    >>> _intermediate_spec(source, target, (8, 32, 64), {"data": 2, "tensor": 4})
    ((), ('data',), ('tensor',))
    """
    place = {axis: dim for dim, axes in enumerate(target) for axis in axes}
    for dim, axes in enumerate(source):
        for axis in axes:
            to = place.get(axis, dim)
            if to == dim or len(source) != len(target):
                continue
            moved = [tuple(a for a in dim if a != axis) for dim in source]
            moved[to] = (*moved[to], axis)
            ways = math.prod(sizes[a] for a in moved[to])
            if whole[to] % ways == 0 and tuple(moved) != tuple(target):
                return tuple(moved)
    return ()


def parse_spec(text: str, mesh: Sequence[tuple[str, int]]) -> tuple[tuple[str, ...], ...] | None:
    """Reads a sharding as XLA prints it: mesh axes per dim; None for other forms.

    >>> mesh = [("data", 2), ("tensor", 4)]
    >>> parse_spec("{devices=[1,8,1]<=[2,4]T(1,0)}", mesh)
    ((), ('data', 'tensor'), ())
    >>> parse_spec("{mesh['data'=2,'tensor'=4], [{'data'}, {}]}", mesh)
    (('data',), ())
    """
    if match := _NAMED.search(text):
        dims = re.findall(r"\{([^}]*)\}", match["dims"])
        named = tuple(tuple(re.findall(r"'([^']+)'", dim)) for dim in dims)
        known = {name for name, _ in mesh}
        return named if all(axis in known for dim in named for axis in dim) else None
    if "replicated}" in text and "devices" not in text:
        return ()
    if match := _TILES.search(text):
        return _tiled(match, mesh)
    return None


def _tiled(
    match: re.Match[str], mesh: Sequence[tuple[str, int]]
) -> tuple[tuple[str, ...], ...] | None:
    """Axes of each dim of `devices=[2,1,4]<=[8]`: those that vary along it, if wholly."""
    tiles = [int(n) for n in match[1].split(",")]
    order = f"T({match[3]})" if match[3] else ""
    (ids,) = read_groups(f"[1,{math.prod(tiles)}]<=[{match[2]}]{order}", math.prod(tiles))
    grid = ids.reshape(tiles)
    dims = len(tiles) - ("last_tile_dim" in match["rest"])
    spans = [
        span_of_groups(list(np.moveaxis(grid, d, -1).reshape(-1, tiles[d])), mesh)
        for d in range(dims)
    ]
    return tuple(span.axes for span in spans) if all(span.full_axes for span in spans) else None


def format_spec(dims: Sequence[Sequence[str]]) -> str:
    """Writes axes per dim as a spec.

    >>> format_spec([("data",), (), ("fsdp", "tensor")])
    "P('data', None, ('fsdp', 'tensor'))"
    """
    return f"P({', '.join(map(format_axes, dims))})"


def format_axes(axes: Sequence[str]) -> str:
    """Writes the axes of one dim.

    >>> format_axes(()), format_axes(("data",)), format_axes(("data", "fsdp"))
    ('None', "'data'", "('data', 'fsdp')")
    """
    return repr(tuple(axes)) if len(axes) > 1 else repr(axes[0]) if axes else "None"
