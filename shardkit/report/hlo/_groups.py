"""Maps the device groups of a collective back to the axes of the user's mesh.

A compiled program numbers devices by their position in the mesh, in row-major order; hardware ids
do not appear. It prints groups of such positions in three forms:

* `{{0,1},{2,3}}`: the groups themselves;
* `[4,2]<=[2,2,2]T(0,2,1)`: positions reshaped to `[2,2,2]`, transposed, cut into 4 groups of 2;
* `mesh['data'=2,'tensor'=4] {'tensor'}`: XLA's own mesh (not always the user's; older versions
  name its axes differently), and its axes that vary within a group. `'b':(2)4` is a part of axis
  `b`: the factor 4 after a factor 2. `device_ids=([4,2]T(1,0))` or `(0,2,1,3)` gives the order in
  which positions fill that mesh.

The printed names are not used: every form is converted to arrays of positions, and the mesh axes
are those of the user's mesh whose coordinate varies within a group.
"""

import dataclasses
import fractions
import math
import re
from collections.abc import Sequence

import numpy as np

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?$")
_MESH = re.compile(
    r"mesh\[(?P<sizes>[^\]]*)\](?:,\s*device_ids=\((?P<ids>.*)\))?\s*\{(?P<axes>.*)\}$"
)
_IDS = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$")
_AXIS = re.compile(r"['\"]?([^'\",:=]+)['\"]?(?::\((\d+)\)(\d+))?")
_SIZE = re.compile(r"['\"]?([^'\",=]+)['\"]?=(\d+)")

Mesh = Sequence[tuple[str, int]]


@dataclasses.dataclass(frozen=True)
class Span:
    """The mesh axes that a collective spans."""

    axes: tuple[str, ...]  # mesh axes along which members of one group differ, in mesh order
    size: int  # devices in a group; for a permutation, positions along `axes`
    # each group has all devices along `axes`; False for a part, such as half of one
    full_axes: bool = True
    # share of the devices that send; below 1 for a permutation that leaves some out
    senders: fractions.Fraction = fractions.Fraction(1)


def read_groups(text: str, devices: int) -> list[np.ndarray]:
    """Reads `replica_groups` in any printed form: i64[size] positions per group.

    `{}` is one group of all. Raises ValueError if the form is unknown, or the groups are not a
    partition of the devices.

    >>> [list(map(int, g)) for g in read_groups("[4,2]<=[2,2,2]T(0,2,1)", 8)]
    [[0, 2], [1, 3], [4, 6], [5, 7]]
    >>> [list(map(int, g)) for g in read_groups("mesh['a'=2,'b'=4] {'b':(1)2}", 8)]
    [[0, 2], [1, 3], [4, 6], [5, 7]]
    >>> [list(map(int, g)) for g in read_groups("mesh['a'=2,'b'=2] {'b','a'}", 4)]
    [[0, 2, 1, 3]]
    """
    groups = _parse_groups(text.strip(), devices)
    if not np.array_equal(np.sort(np.concatenate(groups)), np.arange(devices)):
        why = f"replica_groups do not hold each of {devices} devices once"
        raise ValueError(f"{why}: {text.strip()[:80]!r}")
    return groups


def _parse_groups(text: str, devices: int) -> list[np.ndarray]:
    """Groups in any printed form, not checked."""
    if text in ("{}", "{{}}"):
        return [np.arange(devices)]
    if text.startswith("{{"):
        if re.search(r"\{\s*\}", text):
            raise ValueError(f"replica_groups with an empty group: {text[:80]!r}")
        return [np.array(_parse_ints(group)) for group in re.findall(r"\{([\d,\s]+)\}", text)]
    if match := _IOTA.match(text):
        shape, dims, order = match.groups()
        return list(_transpose_iota(_parse_ints(dims), order).reshape(_parse_ints(shape)))
    if match := _MESH.match(text):
        return _mesh_groups(match["sizes"], match["ids"], match["axes"])
    raise ValueError(f"replica_groups in an unknown form: {text[:80]!r}")


def read_pairs(text: str) -> np.ndarray:
    """Reads `source_target_pairs`: i64[pairs, 2] positions.

    >>> read_pairs("{{0,1},{1,0}}").tolist()
    [[0, 1], [1, 0]]
    """
    pairs = re.findall(r"\{\s*(\d+)\s*,\s*(\d+)\s*\}", text)
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def span_of_groups(groups: Sequence[np.ndarray], mesh: Mesh) -> Span:
    """Finds the mesh axes that groups span; raises ValueError for a position outside of the mesh.

    >>> span = span_of_groups([np.array([0, 1]), np.array([2, 3])], [("data", 2), ("tensor", 2)])
    >>> span.axes, span.size, span.full_axes
    (('tensor',), 2, True)
    """
    sizes = dict(mesh)
    varying = {axis for group in groups for axis in _varying_axes(group, mesh)}
    axes = tuple(axis for axis in sizes if axis in varying)
    full = math.prod(sizes[axis] for axis in axes)
    largest = max(len(group) for group in groups)
    return Span(axes, largest, all(len(group) == full for group in groups))


def span_of_pairs(pairs: np.ndarray, mesh: Mesh) -> Span:
    """Finds the mesh axes along which a permutation moves data, and how many devices send.

    >>> span = span_of_pairs(np.array([[0, 1], [1, 1]]), [("data", 2), ("tensor", 2)])
    >>> span.axes, span.size, str(span.senders)
    (('tensor',), 2, '1/4')
    """
    sizes = dict(mesh)
    moves = [_varying_axes(pair, mesh) for pair in pairs]
    axes = tuple(axis for axis in sizes if any(axis in move for move in moves))
    senders = fractions.Fraction(sum(map(bool, moves)), math.prod(sizes.values()))
    return Span(axes, math.prod(sizes[axis] for axis in axes), senders=senders)


def _varying_axes(group: np.ndarray, mesh: Mesh) -> list[str]:
    """Names of the axes whose coordinate differs between the positions."""
    shape = [size for _, size in mesh]
    if group.max() >= math.prod(shape):
        raise ValueError(f"device {int(group.max())} is outside of mesh {dict(mesh)}")
    coordinates = np.unravel_index(group, shape)
    return [name for (name, _), c in zip(mesh, coordinates, strict=True) if c.min() != c.max()]


def _parse_ints(text: str) -> list[int]:
    return [int(piece) for piece in text.split(",") if piece.strip()]


def _transpose_iota(dims: list[int], order: str | None) -> np.ndarray:
    """Positions reshaped to `dims` and transposed."""
    grid = np.arange(math.prod(dims)).reshape(dims)
    return grid.transpose(_parse_ints(order)) if order else grid


def _mesh_groups(sizes_text: str, ids_text: str | None, axes_text: str) -> list[np.ndarray]:
    """Groups along axes, or parts of axes, of XLA's own mesh, in the order in which they are named.

    `'b':(2)4` of an axis `b` of 16 reshapes it to [2, 4, 2]; the 4 varies within a group. The first
    one named varies slowest: `{'f','d'}` of mesh['d'=2,'f'=2] is one group of devices 0, 2, 1, 3.
    """
    sizes = {name: int(size) for name, size in _SIZE.findall(sizes_text)}
    positions = _parse_device_order(ids_text, math.prod(sizes.values()))
    named: list[tuple[str, int, int]] = []
    for name, before, size in _AXIS.findall(axes_text):
        if name not in sizes:
            raise ValueError(f"replica_groups name axis {name!r}, which is not in {sizes}")
        named.append((name, int(before), int(size)) if size else (name, 1, sizes[name]))
    dims: list[int] = []
    places: dict[tuple[str, int, int], int] = {}
    for axis, full in sizes.items():
        done = 1
        for name, before, size in sorted({*named}):
            if name == axis:
                places[name, before, size] = len(dims) + 1
                dims += [before // done, size]
                done = before * size
        dims.append(full // done)
    inside = [places[part] for part in dict.fromkeys(named)]
    outside = [d for d in range(len(dims)) if d not in inside]
    grid = positions.reshape(dims).transpose([*outside, *inside])
    return list(grid.reshape(-1, math.prod(dims[d] for d in inside)))


def _parse_device_order(ids_text: str | None, devices: int) -> np.ndarray:
    """Positions in the order in which they fill XLA's own mesh."""
    if ids_text is None:
        return np.arange(devices)
    if match := _IDS.match(ids_text):
        return _transpose_iota(_parse_ints(match[1]), match[2]).reshape(-1)
    return np.array(_parse_ints(ids_text))
