"""`Timeline`: a modelled step time, and what of it is compute, communication and waiting.

Nothing here is measured. For a TPU the compiler's own schedule is played: its estimated cycles,
with each collective on the links that the hardware table gives. For other devices the compilers
give no cycles; there a roofline has two ends, everything overlapped and nothing overlapped.
"""

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from ..._core.errors import count
from ...hardware import Chip, find_chip, identify_chip
from .._program import Program
from ..communication._ledger import Ledger
from ..communication._links import ASSUMPTION, Links
from ..hlo._hlo import Module
from ..hlo._trips import Loops
from ._flops import Flops
from ._simulate import Played, Schedule
from ._traffic import moved


@dataclasses.dataclass(frozen=True)
class Segment:
    """One block of a timeline, for drawing; a loop's trips are added up.

    Attributes:
      phase: `forward`, `backward`, `recompute`, `update` or `other`.
      scope: the model's scope.
      kind: `"compute"` or `"communication"`.
      axes: mesh axes of communication.
      seconds: how long it takes.
      exposed: seconds of it that nothing hides.
    """

    phase: str
    scope: str
    kind: str
    axes: tuple[str, ...]
    seconds: float
    exposed: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Seconds of one step on one device, all of them modelled.

    Attributes:
      label: `"modelled"`.
      chip: the chip of the hardware table.
      source: `"schedule"`, the compiler's own with its estimated cycles, or `"roofline"`.
      compute: seconds of compute: by estimated cycles, or of the products at peak.
      products: seconds of the products alone at the chip's peak; None without FLOPs.
      memory: seconds of the traffic with the device's memory; None for a schedule, whose
        estimates hold it.
      communication: mesh axes, joined by commas → seconds on the links, hidden or not.
      exposed: seconds of communication that nothing hides; all of it for a roofline.
      low: the shortest modelled step; the step itself for a schedule.
      high: the longest.
      mfu: model FLOPs ÷ (`high` × peak × devices); None without FLOPs.
      best_mfu: the same for `low`.
      segments: blocks in the order in which they begin.
      assumptions: what the model takes for granted.
      problems: what it lacks; with any, the times are lower bounds.
    """

    chip: str
    source: str
    compute: float
    products: float | None
    memory: float | None
    communication: Mapping[str, float]
    exposed: float
    low: float
    high: float
    mfu: float | None
    best_mfu: float | None
    segments: tuple[Segment, ...]
    assumptions: tuple[str, ...]
    problems: tuple[str, ...] = ()
    label: str = "modelled"

    @classmethod
    def from_plain(cls, fields: Mapping[str, Any]) -> "Timeline":
        """Reads what `dataclasses.asdict` and JSON made of a timeline."""
        segments = tuple(
            Segment(**one | {"axes": tuple(one["axes"])}) for one in fields["segments"]
        )
        texts = {name: tuple(fields[name]) for name in ("assumptions", "problems")}
        return cls(**{**fields, **texts, "segments": segments})

    def exposed_by_axes(self) -> dict[str, float]:
        """Mesh axes, joined by commas → exposed seconds, the most first."""
        found: dict[str, float] = {}
        for one in self.segments:
            if one.kind == "communication":
                name = ", ".join(one.axes)
                found[name] = found.get(name, 0.0) + one.exposed
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        """A few lines of at most 100 columns, the step time first."""
        wrapped = [textwrap.wrap(line, 100, subsequent_indent="    ") for line in self._lines()]
        return "\n".join(line for lines in wrapped for line in lines)

    def _lines(self) -> Iterable[str]:
        yield from self._of_schedule() if self.source == "schedule" else self._of_roofline()
        yield from (f"  lower bound: {text}" for text in self.problems)
        yield f"  assumed: {'; '.join(self.assumptions)}"

    def _of_schedule(self) -> Iterable[str]:
        show = format_seconds
        mfu = "" if self.mfu is None else f", MFU {self.mfu:.1%}"
        yield f"Time per step on {self.chip}, modelled from the schedule: {show(self.high)}{mfu}"
        yield (
            f"  compute {show(self.compute)} ({self._products()}), communication "
            f"{show(sum(self.communication.values()))}, of which exposed {show(self.exposed)}"
        )
        exposed = [f"{axes} {show(s)}" for axes, s in self.exposed_by_axes().items() if s]
        if exposed:
            yield f"  exposed over {'; '.join(exposed)}"

    def _of_roofline(self) -> Iterable[str]:
        show = format_seconds
        mfu = "" if self.mfu is None else f"; MFU {self.mfu:.1%} to {self.best_mfu:.1%}"
        yield (
            f"Time per step on {self.chip}, modelled as a roofline: {show(self.low)} if all "
            f"overlaps, {show(self.high)} if nothing does"
        )
        yield (
            f"  {self._products()}, memory {show(self.memory or 0.0)}, communication "
            f"{show(sum(self.communication.values()))}{mfu}"
        )

    def _products(self) -> str:
        if self.products is None:
            return "no FLOPs known"
        return f"products alone {format_seconds(self.products)}"


def model_time(
    program: Program, ledger: Ledger, flops: Flops | None, chip: str | Chip | None = None
) -> Timeline | None:
    """Models the time of a compiled step.

    Args:
      program: the compiled step.
      ledger: its collectives.
      flops: its FLOPs, if they are known.
      chip: of the hardware table, by name, or another; by default that of the program's device.

    Returns:
      The timeline; None for devices of which nothing is known, as simulated ones.

    Raises:
      ReportError: the hardware table has no such chip, or the program cannot be read.
    """
    if isinstance(chip, str):
        chip = find_chip(chip)
    device = chip or identify_chip(program.device_kind)
    module = program.module
    if device is None or not module.entry:
        return None
    links = Links(device, program.mesh, tuple(dict(program.dcn)))
    n = max(1, module.num_partitions)
    rate, at = _peak(device, program.declared.compute_dtype)
    products = flops.total / n / rate if flops else None
    assumptions = (at, f"{ASSUMPTION[device.kind]}; one hop {device.latency * 1e6:.0f} µs")
    if program.platform == "tpu" and device.clock and module.scheduled:
        made = _scheduled(module, ledger, links)
    else:
        made = _roofline(module, ledger, links, flops, products)
    made["problems"] = tuple(dict.fromkeys([*ledger.problems, *made["problems"]]))
    made["assumptions"] = (*assumptions, *made["assumptions"])
    done = flops.model / n / rate if flops else None
    return Timeline(
        chip=device.name,
        products=products,
        mfu=done / made["high"] if done and made["high"] else None,
        best_mfu=done / made["low"] if done and made["low"] else None,
        **made,
    )


def _peak(chip: Chip, dtype: str | None) -> tuple[float, str]:
    """FLOP/s of products of a dtype, and how to say it."""
    name = dtype if dtype and dtype in chip.flops else "bf16"
    rate = chip.flops[name]
    return rate, f"products at {rate / 1e12:.4g} TFLOP/s, the peak for {name}"


def _scheduled(module: Module, ledger: Ledger, links: Links) -> dict[str, Any]:
    schedule = Schedule(module, ledger, links)
    played = schedule.play()
    segments = [Segment(*key, *times) for key, times in played.parts.items()]
    return {
        "source": "schedule",
        "compute": sum(s.seconds for s in segments if s.kind == "compute"),
        "memory": None,
        "communication": _by_axes(segments),
        "exposed": sum(s.exposed for s in segments if s.kind == "communication"),
        "low": played.seconds,
        "high": played.seconds,
        "segments": tuple(segments),
        "assumptions": _guesses(played),
        "problems": (*schedule.problems, *_unknown(played)),
    }


def _guesses(played: Played) -> tuple[str, ...]:
    if not played.guessed:
        return ()
    number, names = sum(played.guessed.values()), _named(played.guessed)
    return (
        f"{number} of {number + played.estimated} operations are without an estimate ({names}) and "
        "count as their memory traffic",
    )


def _unknown(played: Played) -> tuple[str, ...]:
    if not played.estimated:
        return ("the compiler gives no estimates: only traffic with the memory counts",)
    if not played.kernels:
        return ()
    kernels, names = count(sum(played.kernels.values()), "kernel"), _named(played.kernels)
    return (f"{kernels} without an estimate ({names}): only their memory traffic counts",)


def _named(numbers: Mapping[str, int]) -> str:
    """Returns `sort, gather_fusion ×2`, the first few."""
    texts = [name if n == 1 else f"{name} ×{n}" for name, n in numbers.items()]
    return ", ".join([*texts[:4], *(["…"] if len(texts) > 4 else [])])


def _roofline(
    module: Module, ledger: Ledger, links: Links, flops: Flops | None, products: float | None
) -> dict[str, Any]:
    traffic, loops = moved(module, Loops(module))
    memory = traffic / links.chip.memory_bandwidth
    found: dict[tuple[str, str, str, tuple[str, ...]], float] = {}
    if flops and products is not None:
        for (scope, phase), number in flops.by_scope.items():
            found[phase, scope, "compute", ()] = products * number / flops.total
    for row in ledger:
        key = (row.phase, row.scope, "communication", row.axes)
        times = (1 if row.trips is None else row.trips) * row.taken
        found[key] = found.get(key, 0.0) + links.seconds(row) * times
    segments = tuple(Segment(*key, seconds, seconds) for key, seconds in found.items())
    wire, compute = _by_axes(segments), products or 0.0
    exposed = sum(wire.values())
    problems = [f"loop {name} runs an unknown number of times; counted once" for name in loops]
    problems += [] if flops else ["FLOPs are not known"]
    return {
        "source": "roofline",
        "compute": compute,
        "memory": memory,
        "communication": wire,
        "exposed": exposed,
        "low": max(compute, memory, exposed),
        "high": compute + memory + exposed,
        "segments": segments,
        "assumptions": ("each operation reads its operands and writes its results once",),
        "problems": (*problems, *(flops.problems if flops else ())),
    }


def _by_axes(segments: Iterable[Segment]) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in segments:
        if one.kind == "communication":
            name = ", ".join(one.axes)
            found[name] = found.get(name, 0.0) + one.seconds
    return found


def format_seconds(seconds: float) -> str:
    """Returns `1.23 s`, `70.1 ms`, `12.3 µs`, `17 ns`.

    >>> format_seconds(0.0701), format_seconds(1.7e-8)
    ('70.1 ms', '17 ns')
    """
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"
