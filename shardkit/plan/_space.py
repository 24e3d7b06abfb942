"""What a plan chooses among: sizes of the axes, micro-batches, remat, ZeRO."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence

from .._errors import MeshError, Problem, raise_all
from .._types import Accumulate
from ..parallel import Strategy, strategies

AXES = ("data", "fsdp", "tensor")
"""Axes of the ready layouts that a plan searches over, in mesh order."""

Make = Callable[[Mapping[str, int], int], Strategy]


@dataclasses.dataclass(frozen=True)
class Space:
    """Everything that is tried, all of it with all of it.

    Attributes:
      axes: mesh axes, in mesh order.
      accumulate: numbers of micro-batches.
      reduce: when micro-batches are reduced; see `sk.Accumulate`.
      remat: named checkpoint policies.
      zero: ZeRO stages over `data`; 0 for none.
      max_size: largest size of single axes.
    """

    axes: tuple[str, ...] = AXES
    accumulate: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    reduce: tuple[str, ...] = ("once", "each")
    remat: tuple[str, ...] = ("none", "dots", "full")
    zero: tuple[int, ...] = (0, 1, 2)
    max_size: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses axes that no ready layout has, and numbers that count nothing."""
        problems = [
            Problem(f"axes: {axis!r}", f"known: {', '.join(AXES)}", f"axes={AXES!r}")
            for axis in self.axes
            if axis not in AXES
        ]
        problems += [
            Problem(f"accumulate: {k!r}", "is no number of micro-batches", "accumulate=(1, 2, 4)")
            for k in self.accumulate
            if type(k) is not int or k < 1
        ]
        raise_all(MeshError, "There is no such space to plan in.", problems)

    def meshes(self, devices: int) -> list[dict[str, int]]:
        """Every factorization of a number of devices over the axes.

        >>> Space(axes=("fsdp", "tensor")).meshes(4)
        [{'fsdp': 1, 'tensor': 4}, {'fsdp': 2, 'tensor': 2}, {'fsdp': 4, 'tensor': 1}]
        """
        limits = [self.max_size.get(axis, devices) for axis in self.axes]
        return [
            dict(zip(self.axes, sizes, strict=True))
            for sizes in _factorizations(devices, len(self.axes))
            if all(size <= limit for size, limit in zip(sizes, limits, strict=True))
        ]

    def schedules(self) -> list[Accumulate]:
        """Every accumulation; one micro-batch is reduced in one way."""
        many = [Accumulate(k, how) for k in self.accumulate if k > 1 for how in self.reduce]
        return ([Accumulate()] if 1 in self.accumulate else []) + many


def _factorizations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (n,)
        return
    for first in range(1, n + 1):
        if n % first == 0:
            for rest in _factorizations(n // first, parts - 1):
                yield (first, *rest)


def layout_of(sizes: Mapping[str, int], zero: int = 0) -> Strategy:
    """The ready layout for axes of these sizes; those of one device are left out.

    >>> layout_of({"data": 1, "fsdp": 4, "tensor": 2}).kinds
    (('fsdp', 'fsdp'), ('tensor+sequence', 'tensor'))
    """
    used = [axis for axis, size in sizes.items() if size > 1] or [next(iter(sizes))]
    return functools.reduce(operator.or_, (_of_axis(axis, zero) for axis in used))


def written(sizes: Mapping[str, int], zero: int = 0) -> str:
    """The same as code."""
    used = [axis for axis, size in sizes.items() if size > 1] or [next(iter(sizes))]
    code = {
        "data": f"sk.strategies.zero(stage={zero})" if zero else "sk.strategies.data()",
        "fsdp": "sk.strategies.fsdp()",
        "tensor": "sk.strategies.tensor(sequence=True)",
    }
    return " | ".join(code[axis] for axis in used)


def _of_axis(axis: str, zero: int) -> Strategy:
    if axis == "data":
        return strategies.zero(stage=zero) if zero else strategies.data()
    return strategies.fsdp() if axis == "fsdp" else strategies.tensor(sequence=True)


def code_of(sizes: Mapping[str, int], schedule: Accumulate, remat: str, zero: int) -> str:
    """A layout as code: its mesh, strategy, micro-batches and remat."""
    used = {a: n for a, n in sizes.items() if n > 1} or dict([*sizes.items()][:1])
    mesh = ", ".join(f"{axis}={n}" for axis, n in used.items())
    steps = f"sk.Accumulate({schedule.steps}, reduce={schedule.reduce!r})"
    return "\n".join(
        [
            f"mesh = sk.MeshSpec({mesh})",
            f"strategy = {written(sizes, zero)}",
            f"accumulate = {steps if schedule.steps > 1 else 1}",
            f"remat = {remat!r}",
        ]
    )


def symbolic(meshes: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """A mesh in which every axis that any of these splits does split, as little as it can.

    >>> symbolic([{"data": 1, "fsdp": 6}, {"data": 1, "fsdp": 3}])
    {'fsdp': 3}
    """
    sizes = {a: [m[a] for m in meshes if m[a] > 1] for a in meshes[0]}
    return {a: min(found) for a, found in sizes.items() if found} or dict.fromkeys(meshes[0], 1)
