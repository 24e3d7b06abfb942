"""The options that a plan chooses among: sizes of the axes, micro-batches, remat, ZeRO."""

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
    """Mesh axes that a plan searches by default, in mesh order; with `experts` also theirs.

    >>> searched_axes()
    ('pipe', 'data', 'fsdp', 'context', 'tensor')
    """
    excluded = () if experts else axes_splitting("experts")
    return tuple(kind.axis for kind in planned_kinds() if kind.axis not in excluded)


def region_axes() -> tuple[str, ...]:
    """Axes that divide a region which the model has to mark."""
    return tuple(kind.axis for kind in planned_kinds() if kind.override)


@dataclasses.dataclass(frozen=True)
class PipelineOptions:
    """Schedule of a pipeline; its micro-batches are the step's accumulation."""

    schedule: str  # as `strategies.pipeline` takes it
    micro_batches: int  # number of micro-batches
    virtual_stages: int = 1  # chunks of layers that each stage holds

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `strategies.pipeline`, defaults left out."""
        options = {"schedule": self.schedule, "micro_batches": self.micro_batches}
        return options | (
            {"virtual_stages": self.virtual_stages} if self.virtual_stages > 1 else {}
        )

    def __str__(self) -> str:
        """Returns `1f1b of 8 micro-batches`."""
        virtual = f", {self.virtual_stages} virtual stages" if self.virtual_stages > 1 else ""
        return f"{self.schedule} of {self.micro_batches} micro-batches{virtual}"


Batching = Accumulate | PipelineOptions
"""How a step splits its batch into micro-batches."""
_INVALID = "The search space is invalid."
_CONVENTIONAL = Strategy()


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """The options of a plan, which tries their Cartesian product.

    Attributes:
      axes: mesh axes, in mesh order.
      accumulate: numbers of micro-batches.
      reduce: when gradients of micro-batches are reduced; see `sk.Accumulate`.
      remat: named checkpoint policies.
      zero: ZeRO stages over `data`; 0 for none.
      max_size: axis → largest size that it may have.
      pipelines: pipeline schedules.
      per_stage: micro-batches of a pipeline for each of its stages.
      virtual_stages: numbers of virtual stages of interleaved schedules.
      attention: methods of attention over a split length.
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
        """Refuses axes without a built-in strategy, and numbers that are not counts."""
        check_options(self, MeshError, _INVALID)
        known = searched_axes(experts=True)
        problems = [
            Problem(f"axes: {axis!r}", f"known: {', '.join(known)}", f"axes={searched_axes()!r}")
            for axis in self.axes
            if axis not in known
        ]
        problems += [
            Problem(f"accumulate: {k!r}", "is not a positive int", "accumulate=(1, 2, 4)")
            for k in self.accumulate
            if type(k) is not int or k < 1
        ]
        raise_all(MeshError, _INVALID, problems)

    def meshes(self, devices: int) -> list[dict[str, int]]:
        """Every factorization of a number of devices over the axes.

        >>> SearchSpace(axes=("fsdp", "tensor")).meshes(4)
        [{'fsdp': 1, 'tensor': 4}, {'fsdp': 2, 'tensor': 2}, {'fsdp': 4, 'tensor': 1}]
        """
        limits = [self.max_size.get(axis, devices) for axis in self.axes]
        return [
            dict(zip(self.axes, sizes, strict=True))
            for sizes in _factorizations(devices, len(self.axes))
            if all(size <= limit for size, limit in zip(sizes, limits, strict=True))
        ]

    def batchings(self, sizes: Mapping[str, int]) -> Sequence[Batching]:
        """Every accumulation; on a mesh with stages every pipeline schedule instead."""
        stages = sizes.get(PIPE, 1)
        if stages == 1:
            once = [Accumulate()] if 1 in self.accumulate else []
            several = [
                Accumulate(k, when) for k in self.accumulate if k > 1 for when in self.reduce
            ]
            return once + several
        return [
            PipelineOptions(name, stages * each, virtual)
            for name in self.pipelines
            for each in self.per_stage
            for virtual in (self.virtual_stages if name == "interleaved" else (1,))
        ]

    def attention_methods(self, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """Methods of attention on a mesh; `""` where no length is split."""
        return self.attention if sizes.get(LENGTH, 1) > 1 else ("",)


def _factorizations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (n,)
        return
    for first in range(1, n + 1):
        if n % first == 0:
            for others in _factorizations(n // first, parts - 1):
                yield (first, *others)


def make_strategy(
    sizes: Mapping[str, int],
    zero: int = 0,
    attention: str = "",
    pipeline: PipelineOptions | None = None,
    like: Strategy = _CONVENTIONAL,
) -> Strategy:
    """The built-in strategies for axes of these sizes, with the logical names of a spec's own.

    Axes of one device are left out.

    >>> make_strategy({"data": 1, "fsdp": 4, "tensor": 2}).kinds
    (Fsdp(axis='fsdp', reshard_after_forward=True), Tensor(axis='tensor', sequence=True))
    """
    calls = _strategy_calls(sizes, zero, attention, pipeline)
    return functools.reduce(operator.or_, (call() for call in calls)).renamed_like(like)


def _strategy_calls(
    sizes: Mapping[str, int], zero: int, attention: str, pipeline: PipelineOptions | None
) -> list[functools.partial[Strategy]]:
    kinds = {kind.axis: kind for kind in planned_kinds()}
    choice = PlanChoice(zero, attention, pipeline.options if pipeline else {})
    return [kinds[axis].planned_strategy(choice) for axis in split_axes(sizes)]


def split_axes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Axes of more than one device; on one device, an axis that asks nothing of the model."""
    asking = region_axes()
    plain = next((axis for axis in sizes if axis not in asking), next(iter(sizes)))
    return {axis: size for axis, size in sizes.items() if size > 1} or {plain: 1}


def format_layout(
    sizes: Mapping[str, int],
    batching: Batching,
    remat: str,
    zero: int,
    attention: str = "",
    *,
    like: Strategy = _CONVENTIONAL,
) -> str:
    """A layout as code: its mesh, strategy, micro-batches and remat.

    `attention` is the method along a split length. A strategy of this layout has the logical names
    that the spec renames.
    """
    mesh = ", ".join(f"{axis}={sizes[axis]}" for axis in split_axes(sizes))
    pipeline = batching if isinstance(batching, PipelineOptions) else None
    calls = _strategy_calls(sizes, zero, attention, pipeline)
    strategy = " | ".join(map(format_call, calls))
    listed = like.logical_axes if like.names else ()
    if renamed := {old: new for old, new in like.names if new in listed}:
        strategy = f"({strategy}).rename({renamed!r})"
    accumulate = "1"
    if isinstance(batching, Accumulate) and batching.micro_batches > 1:
        accumulate = f"sk.Accumulate({batching.micro_batches}, reduce={batching.reduce!r})"
    return "\n".join(
        [
            f"mesh = sk.MeshSpec({mesh})",
            f"strategy = {strategy}",
            f"accumulate = {accumulate}",
            f"remat = {remat!r}",
        ]
    )


def smallest_split_mesh(meshes: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """A mesh that splits every axis that any of these splits, by its smallest size above 1.

    >>> smallest_split_mesh([{"data": 1, "fsdp": 6}, {"data": 1, "fsdp": 3}])
    {'fsdp': 3}
    """
    split = {a: [m[a] for m in meshes if m[a] > 1] for a in meshes[0]}
    smallest = {a: min(sizes) for a, sizes in split.items() if sizes}
    return smallest or dict.fromkeys(meshes[0], 1)
