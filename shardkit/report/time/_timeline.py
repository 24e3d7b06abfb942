"""`Timeline`: a modelled step time, split into compute, communication and waiting.

Nothing here is measured. For a TPU the compiler's schedule is simulated: its estimated cycles,
and each collective on the links of the hardware table. Other compilers estimate no cycles; there a
roofline gives two bounds: all communication overlapped, and none.
"""

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping

from ..._core.errors import ReportError, count
from ..._core.options import check_arguments
from ...hardware import Chip, find_chip, identify_chip
from .._program import Program
from ..communication._ledger import Ledger
from ..communication._links import ASSUMPTIONS, Links
from ..hlo._hlo import Module
from ..hlo._source_lines import Sources
from ..hlo._trips import TripCounts
from ._flops import Flops
from ._simulate import ScheduleSimulator, Simulated
from ._traffic import step_traffic


@dataclasses.dataclass(frozen=True)
class Segment:
    """One block of a timeline, for drawing; the trips of a loop are summed.

    Attributes:
      phase: `forward`, `backward`, `recompute`, `update` or `other`.
      scope: the model's scope.
      kind: `"compute"` or `"communication"`.
      axes: mesh axes of communication.
      seconds: its duration.
      exposed: seconds of it that no compute hides.
      where: line of the user's code of its longest operation; "" if unknown.
    """

    phase: str
    scope: str
    kind: str
    axes: tuple[str, ...]
    seconds: float
    exposed: float
    where: str = ""


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a segment at its place on the clock of the step."""

    segment: Segment  # what it is a part of
    start: float  # seconds from the start of the step
    seconds: float  # its duration
    hidden: bool = False  # communication behind compute


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Seconds of one step on one device, all of them modelled.

    Attributes:
      label: `"modelled"`.
      collectives: seconds on the links per step of each row of the ledger, in its order.
      chip: the chip of the hardware table.
      source: `"schedule"` (the compiler's, with its estimated cycles) or `"roofline"`.
      compute: seconds of compute: by estimated cycles, or of the products at peak FLOP/s.
      products: seconds of the products alone at the chip's peak; None without FLOPs.
      memory: seconds of traffic with the device's memory; None for a schedule, whose estimates
        include it.
      communication: mesh axes, joined by commas → seconds on the links, hidden or not.
      exposed: seconds of communication that no compute hides; all of it for a roofline.
      low: the shortest modelled step; the step itself for a schedule.
      high: the longest.
      mfu: model FLOPs ÷ (`high` × peak × devices); None without FLOPs.
      best_mfu: the same for `low`.
      segments: blocks in the order of their start.
      assumptions: assumptions of the model.
      problems: missing inputs; with any, the times are lower bounds.
    """

    chip: str
    source: str
    compute: float
    memory: float | None
    communication: Mapping[str, float]
    exposed: float
    low: float
    high: float
    segments: tuple[Segment, ...]
    assumptions: tuple[str, ...]
    problems: tuple[str, ...] = ()
    products: float | None = None
    mfu: float | None = None
    best_mfu: float | None = None
    label: str = "modelled"
    collectives: tuple[float, ...] = ()

    def blocks(self) -> tuple[Block, ...]:
        """Its segments one after another, as pictures and traces draw them.

        Hidden communication lies under the compute in front of it. The blocks of compute and of
        exposed communication add up to the step; of a roofline, to its upper end without memory.
        """
        blocks, now = [], 0.0
        for segment in self.segments:
            spent = segment.seconds if segment.kind == "compute" else segment.exposed
            hidden = min(now, segment.seconds - segment.exposed)
            if segment.kind != "compute" and hidden > 0:
                blocks.append(Block(segment, now - hidden, hidden, hidden=True))
            if spent:
                blocks.append(Block(segment, now, spent))
            now += spent
        return tuple(blocks)

    def exposed_by_axes(self) -> dict[str, float]:
        """Mesh axes, joined by commas → exposed seconds, the most first."""
        return dict(Counter(_by_axes(self.segments, "exposed")).most_common())

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
            f"{show(sum(self.communication.values()))}, {show(self.exposed)} of it exposed"
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
      chip: a name in the hardware table, or a chip; by default that of the program's device.

    Returns:
      The timeline; None for devices outside of the hardware table, such as simulated ones.

    Raises:
      ReportError: the hardware table has no such chip, or the program cannot be read.
    """
    check_arguments(ReportError, "No time can be modelled.", chip=(chip, str | Chip | None))
    if isinstance(chip, str):
        chip = find_chip(chip)
    device = chip or identify_chip(program.device_kind)
    module = program.module
    if device is None or not module.entry:
        return None
    links = Links(device, program.mesh, tuple(dict(program.dcn)))
    n = max(1, module.num_partitions)
    rate, rate_text = _peak_rate(device, program.declared.compute_dtype)
    products = flops.total / n / rate if flops else None
    if program.platform == "tpu" and device.clock and module.scheduled:
        timeline = _model_schedule(module, ledger, links, Sources(program.hlo, module))
    else:
        timeline = _model_roofline(module, ledger, links, flops, products)
    useful = flops.model / n / rate if flops else None
    hop = f"{ASSUMPTIONS[device.kind]}; one hop {device.latency * 1e6:.0f} µs"
    return dataclasses.replace(
        timeline,
        products=products,
        collectives=tuple(links.seconds(row) * row.runs for row in ledger),
        mfu=useful / timeline.high if useful and timeline.high else None,
        best_mfu=useful / timeline.low if useful and timeline.low else None,
        problems=tuple(dict.fromkeys([*ledger.problems, *timeline.problems])),
        assumptions=(rate_text, hop, *timeline.assumptions),
    )


def _peak_rate(chip: Chip, dtype: str | None) -> tuple[float, str]:
    """Peak FLOP/s for a dtype, and its description."""
    name = dtype if dtype and dtype in chip.flops else "bf16"
    rate = chip.flops[name]
    return rate, f"products at {rate / 1e12:.4g} TFLOP/s, the peak for {name}"


def _model_schedule(module: Module, ledger: Ledger, links: Links, sources: Sources) -> Timeline:
    schedule = ScheduleSimulator(module, ledger, links)
    simulated = schedule.simulate()
    segments = [
        Segment(*key, *times, where=str(sources.at(simulated.places[key][1]) or ""))
        for key, times in simulated.parts.items()
    ]
    return Timeline(
        chip=links.chip.name,
        source="schedule",
        compute=sum(s.seconds for s in segments if s.kind == "compute"),
        memory=None,
        communication=_by_axes(segments, "seconds"),
        exposed=sum(s.exposed for s in segments if s.kind == "communication"),
        low=simulated.seconds,
        high=simulated.seconds,
        segments=tuple(segments),
        assumptions=_describe_guesses(simulated),
        problems=(*schedule.problems, *_describe_gaps(simulated)),
    )


def _describe_guesses(simulated: Simulated) -> tuple[str, ...]:
    if not simulated.guessed:
        return ()
    guessed, names = sum(simulated.guessed.values()), _format_counts(simulated.guessed)
    return (
        f"{guessed} of {guessed + simulated.estimated} operations have no estimate ({names}) and "
        "count as their memory traffic",
    )


def _describe_gaps(simulated: Simulated) -> tuple[str, ...]:
    if not simulated.estimated:
        return ("the compiler has no estimates: only traffic with the memory counts",)
    if not simulated.kernels:
        return ()
    kernels = count(sum(simulated.kernels.values()), "kernel")
    names = _format_counts(simulated.kernels)
    return (f"{kernels} without an estimate ({names}): only their memory traffic counts",)


def _format_counts(numbers: Mapping[str, int]) -> str:
    """Returns `sort, gather_fusion ×2`, the first few."""
    texts = [name if n == 1 else f"{name} ×{n}" for name, n in numbers.items()]
    return ", ".join([*texts[:4], *(["…"] if len(texts) > 4 else [])])


def _model_roofline(
    module: Module, ledger: Ledger, links: Links, flops: Flops | None, products: float | None
) -> Timeline:
    traffic, loops = step_traffic(module, TripCounts(module))
    memory = traffic / links.chip.memory_bandwidth
    simulated = Simulated()
    if flops and products is not None:
        lines = flops.lines or (None,) * len(flops.by_scope)
        for ((scope, phase), number), line in zip(flops.by_scope.items(), lines, strict=True):
            seconds = products * number / flops.total
            simulated.add((phase, scope, "compute", ()), seconds, seconds, str(line or ""))
    for row in ledger:
        key, seconds = (row.phase, row.scope, "communication", row.axes), links.seconds(row)
        simulated.add(key, seconds * row.runs, seconds * row.runs, str(row.source or ""))
    segments = tuple(
        Segment(*key, *times, where=simulated.places[key][1])
        for key, times in simulated.parts.items()
    )
    wire, compute = _by_axes(segments, "seconds"), products or 0.0
    exposed = sum(wire.values())
    problems = [f"loop {name} runs an unknown number of times; counted once" for name in loops]
    problems += [] if flops else ["FLOPs are not known"]
    return Timeline(
        chip=links.chip.name,
        source="roofline",
        compute=compute,
        memory=memory,
        communication=wire,
        exposed=exposed,
        low=max(compute, memory, exposed),
        high=compute + memory + exposed,
        segments=segments,
        assumptions=("each operation reads its operands and writes its results once",),
        problems=(*problems, *(flops.problems if flops else ())),
    )


def _by_axes(segments: Iterable[Segment], field: str) -> dict[str, float]:
    """Mesh axes, joined by commas → sum of a field of their communication."""
    sums: dict[str, float] = {}
    for segment in segments:
        if segment.kind == "communication":
            name = ", ".join(segment.axes)
            sums[name] = sums.get(name, 0.0) + getattr(segment, field)
    return sums


def format_seconds(seconds: float) -> str:
    """Returns `1.23 s`, `70.1 ms`, `12.3 µs`, `17 ns`.

    >>> format_seconds(0.0701), format_seconds(1.7e-8)
    ('70.1 ms', '17 ns')
    """
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"
