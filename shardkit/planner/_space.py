"""What a plan chooses among: sizes of the axes, micro-batches, remat, ZeRO."""

import dataclasses
import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .._core.errors import MeshError, Problem, raise_all
from .._core.options import check_options
from .._core.types import Accumulate
from ..parallel import PlanChoice, Strategy, axes_splitting, format_call, planned_kinds
from ._costs import LENGTH, PIPE


def searched_axes(experts: bool = False) -> tuple[str, ...]:
    """Mesh axes that a plan searches over by default, in mesh order.

    Args:
      experts: whether the model has experts to divide.

    >>> searched_axes()
    ('pipe', 'data', 'fsdp', 'context', 'tensor')
    """
    left = () if experts else axes_splitting("experts")
    return tuple(kind.axis for kind in planned_kinds() if kind.axis not in left)


def marked_axes() -> tuple[str, ...]:
    """Axes that divide a part which the model has to mark."""
    return tuple(kind.axis for kind in planned_kinds() if kind.override)


@dataclasses.dataclass(frozen=True)
class Stages:
    """How a pipeline is worked off; its micro-batches are the step's accumulation.

    Attributes:
      schedule: as `strategies.pipeline` has it.
      micro_batches: parts that each device's rows are split into.
      virtual_stages: parts of the layers that each stage holds.
    """

    schedule: str
    micro_batches: int
    virtual_stages: int = 1

    @property
    def steps(self) -> int:
        """Micro-batches, as an accumulation counts them."""
        return self.micro_batches

    @property
    def options(self) -> dict[str, Any]:
        """The same as options of `strategies.pipeline`, but for what is its default."""
        found = {"schedule": self.schedule, "micro_batches": self.micro_batches}
        return found | ({"virtual_stages": self.virtual_stages} if self.virtual_stages > 1 else {})

    def __str__(self) -> str:
        """Returns `1f1b of 8 micro-batches`."""
        more = f", {self.virtual_stages} virtual stages" if self.virtual_stages > 1 else ""
        return f"{self.schedule} of {self.micro_batches} micro-batches{more}"


How = Accumulate | Stages


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """Everything that is tried, all of it with all of it.

    Attributes:
      axes: mesh axes, in mesh order.
      accumulate: numbers of micro-batches.
      reduce: when micro-batches are reduced; see `sk.Accumulate`.
      remat: named checkpoint policies.
      zero: ZeRO stages over `data`; 0 for none.
      max_size: largest size of single axes.
      pipelines: schedules of pipelines.
      per_stage: micro-batches of a pipeline for each of its stages.
      virtual_stages: those of interleaved schedules.
      attention: ways of attention over a split length.
    """

    axes: tuple[str, ...] = dataclasses.field(default_factory=searched_axes)
    accumulate: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    reduce: tuple[str, ...] = ("end", "every")
    remat: tuple[str, ...] = ("none", "dots", "full")
    zero: tuple[int, ...] = (0, 1, 2)
    max_size: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pipelines: tuple[str, ...] = ("gpipe", "1f1b", "interleaved", "zero_bubble")
    per_stage: tuple[int, ...] = (1, 2, 4)
    virtual_stages: tuple[int, ...] = (2,)
    attention: tuple[str, ...] = ("ring", "all_to_all")

    def __post_init__(self) -> None:
        """Refuses axes that no ready layout has, and numbers that count nothing."""
        check_options(self, MeshError, "There is no such space to plan in.")
        known = searched_axes(experts=True)
        problems = [
            Problem(f"axes: {axis!r}", f"known: {', '.join(known)}", f"axes={searched_axes()!r}")
            for axis in self.axes
            if axis not in known
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

    def schedules(self, sizes: Mapping[str, int]) -> Sequence[How]:
        """Every accumulation; of a mesh with stages every schedule of a pipeline instead."""
        stages = sizes.get(PIPE, 1)
        return self._stages(stages) if stages > 1 else self._accumulations()

    def ways(self, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """Ways of attention on a mesh; `""` where no length is split."""
        return self.attention if sizes.get(LENGTH, 1) > 1 else ("",)

    def _stages(self, stages: int) -> list[How]:
        return [
            Stages(name, stages * each, virtual)
            for name in self.pipelines
            for each in self.per_stage
            for virtual in (self.virtual_stages if name == "interleaved" else (1,))
        ]

    def _accumulations(self) -> list[How]:
        """One micro-batch is reduced in one way."""
        many: list[How] = [
            Accumulate(k, how) for k in self.accumulate if k > 1 for how in self.reduce
        ]
        return ([Accumulate()] if 1 in self.accumulate else []) + many


def _factorizations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (n,)
        return
    for first in range(1, n + 1):
        if n % first == 0:
            for rest in _factorizations(n // first, parts - 1):
                yield (first, *rest)


def layout_of(
    sizes: Mapping[str, int], zero: int = 0, attention: str = "", stages: Stages | None = None
) -> Strategy:
    """The ready layout for axes of these sizes; those of one device are left out.

    >>> layout_of({"data": 1, "fsdp": 4, "tensor": 2}).kinds
    (Fsdp(axis='fsdp', reshard_after_forward=True), Tensor(axis='tensor', sequence=True))
    """
    return functools.reduce(
        operator.or_, (call() for call in _calls(sizes, zero, attention, stages))
    )


def _calls(
    sizes: Mapping[str, int], zero: int, attention: str, stages: Stages | None
) -> list[functools.partial[Strategy]]:
    kinds = {kind.axis: kind for kind in planned_kinds()}
    choice = PlanChoice(zero, attention, stages.options if stages else {})
    return [kinds[axis].planned_strategy(choice) for axis in used_axes(sizes)]


def used_axes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Axes of more than one device; of one device, one that asks nothing of the model."""
    asking = marked_axes()
    plain = next((axis for axis in sizes if axis not in asking), next(iter(sizes)))
    return {axis: size for axis, size in sizes.items() if size > 1} or {plain: 1}


def code_of(sizes: Mapping[str, int], how: How, remat: str, zero: int, attention: str = "") -> str:
    """A layout as code: its mesh, strategy, micro-batches and remat."""
    used = {axis: sizes[axis] for axis in used_axes(sizes)}
    mesh = ", ".join(f"{axis}={n}" for axis, n in used.items())
    stages = how if isinstance(how, Stages) else None
    calls = _calls(sizes, zero, attention, stages)
    steps = "1"
    if isinstance(how, Accumulate) and how.micro_batches > 1:
        steps = f"sk.Accumulate({how.micro_batches}, reduce={how.reduce!r})"
    return "\n".join(
        [
            f"mesh = sk.MeshSpec({mesh})",
            f"strategy = {' | '.join(map(format_call, calls))}",
            f"accumulate = {steps}",
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
