"""Schedules of a pipeline as data: which stage does what in which tick.

`p` stages, `m` micro-batches, `v` virtual stages: the layers are cut into `p · v` parts, part
`c · p + s` is virtual stage c of stage s. A tick is what every stage does between two exchanges
with its neighbours; the papers count a forward pass, a backward pass, and each half of a
split backward pass as one, and so do the formulae here.

| schedule | ticks | idle per stage | activations of stage s | source |
| --- | --- | --- | --- | --- |
| `gpipe` | 2(m+p−1) | 2(p−1) | m | Huang et al. 2019 |
| `1f1b` | 2(m+p−1) | 2(p−1) | min(m, p−s) | Narayanan et al. 2019, 2021 (PipeDream-Flush) |
| `interleaved` | 2(mv+p−1) | 2(p−1) | at most pv+p−1 parts | Narayanan et al. 2021 |
| `zero_bubble` | 3m+p−1 | p−1 | at most p | Qi et al. 2023 (ZB-H1) |
"""

import dataclasses
import enum
import fractions
from collections.abc import Callable, Iterator, Sequence


class Pass(enum.IntEnum):
    """What a stage does with a micro-batch in one tick."""

    FORWARD = 1
    BACKWARD = 2  # whole
    INPUT = 3  # the half that another stage waits for
    WEIGHT = 4  # the half that nobody waits for


@dataclasses.dataclass(frozen=True, order=True)
class Work:
    """One tick of one stage.

    Attributes:
      what: the pass.
      micro: number of the micro-batch.
      chunk: virtual stage of this stage, from 0.
    """

    what: Pass
    micro: int
    chunk: int = 0


Row = tuple[Work | None, ...]
# What was done, by which stage → in which tick.
Times = dict[tuple[Work, int], int]
# How often a stage did each pass.
Done = dict[Pass, int]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A tick table.

    Attributes:
      name: of the kind of schedule.
      stages: p.
      micro_batches: m.
      virtual_stages: v.
      ticks: for each tick, what each stage does; None is idle.

    >>> table = schedule("1f1b", stages=2, micro_batches=3)
    >>> print(table)
    stage 0  F0 .. F1 B0 F2 B1 .. B2
    stage 1  .. F0 B0 F1 B1 F2 B2 ..
    >>> table.bubble, table.live()
    (Fraction(1, 4), (2, 1))
    """

    name: str
    stages: int
    micro_batches: int
    virtual_stages: int
    ticks: tuple[Row, ...]

    @property
    def times(self) -> Times:
        """`{(work, stage): tick}`."""
        return {
            (work, stage): tick
            for tick, row in enumerate(self.ticks)
            for stage, work in enumerate(row)
            if work is not None
        }

    @property
    def bubble(self) -> fractions.Fraction:
        """Share of all ticks of all stages in which nothing is done."""
        idle = sum(work is None for row in self.ticks for work in row)
        return fractions.Fraction(idle, len(self.ticks) * self.stages)

    @property
    def splits_backward(self) -> bool:
        """Whether the backward pass comes in two halves."""
        return any(work.what is Pass.WEIGHT for work, _ in self.times)

    @property
    def trains(self) -> bool:
        """Whether the table has backward passes at all."""
        return any(work.what is not Pass.FORWARD for work, _ in self.times)

    def live(self) -> tuple[int, ...]:
        """Per stage, the most activations held at once: made, and their last use still to come."""
        times = self.times
        last = {
            (work.micro, work.chunk, stage): tick
            for (work, stage), tick in sorted(times.items(), key=lambda item: item[1])
        }
        held = [[0] * len(self.ticks) for _ in range(self.stages)]
        for (work, stage), tick in times.items():
            if work.what is Pass.FORWARD:
                for at in range(tick, last[work.micro, work.chunk, stage] + 1):
                    held[stage][at] += 1
        return tuple(max(row) for row in held)

    def part(self, stage: int, chunk: int) -> int:
        """Which part of the layers a virtual stage is, from 0."""
        return chunk * self.stages + stage

    def needs(self, work: Work, stage: int) -> Iterator[tuple[Work, int]]:
        """What must have been done before, and by which stage."""
        return _needs(work, stage, self.stages, self.virtual_stages)

    def violations(self) -> list[str]:
        """What is wrong with the table: work left out, done twice, or before what it needs."""
        times = self.times
        done = sum(work is not None for row in self.ticks for work in row)
        passes = [Pass.FORWARD]
        if self.trains:
            passes += [Pass.INPUT, Pass.WEIGHT] if self.splits_backward else [Pass.BACKWARD]
        wanted = {
            (Work(what, micro, chunk), stage)
            for what in passes
            for micro in range(self.micro_batches)
            for chunk in range(self.virtual_stages)
            for stage in range(self.stages)
        }
        found = [f"{_label(w, self)} of stage {s} is missing" for w, s in wanted - times.keys()]
        found += [f"{_label(w, self)} of stage {s} is unknown" for w, s in times.keys() - wanted]
        if done != len(times):
            found.append(f"{done - len(times)} passes are made twice")
        for (work, stage), tick in times.items():
            found += [
                f"{_label(work, self)} of stage {stage} in tick {tick} is before "
                f"{_label(before, self)} of stage {other}"
                for before, other in self.needs(work, stage)
                if times.get((before, other), tick) >= tick
            ]
        return sorted(found)

    def __str__(self) -> str:
        """Draws the table, a line per stage; `F2b` is micro-batch 2 in virtual stage b."""
        rows = [[_label(row[s], self) for row in self.ticks] for s in range(self.stages)]
        width = max(len(cell) for row in rows for cell in row)
        return "\n".join(
            f"stage {s}  " + " ".join((cell or "." * width).ljust(width) for cell in row)
            for s, row in enumerate(rows)
        )


def schedule(name: str, *, stages: int, micro_batches: int, virtual_stages: int = 1) -> Schedule:
    """Builds the tick table of a training step.

    Args:
      name: one of `SCHEDULES`.
      stages: devices along the pipeline's axis, at least 2.
      micro_batches: parts that the rows of the batch are split into; for `"interleaved"` a
        multiple of `stages`.
      virtual_stages: parts of the layers that each stage holds; above 1 for `"interleaved"` alone.

    >>> print(schedule("zero_bubble", stages=2, micro_batches=2))
    stage 0  F0 F1 .. B0 W0 B1 W1
    stage 1  .. F0 B0 F1 B1 W0 W1
    """
    return SCHEDULES[name](name, stages, micro_batches, virtual_stages)


def forward_only(
    name: str, *, stages: int, micro_batches: int, virtual_stages: int = 1
) -> Schedule:
    """Builds the tick table of an evaluation: forward passes alone, each as soon as it can be."""
    orders = [
        [(work,) for work in _interleaved_forwards(stages, micro_batches, virtual_stages)]
        for _ in range(stages)
    ]
    return _in_order(name, orders, stages, micro_batches, virtual_stages)


def _gpipe(name: str, p: int, m: int, v: int) -> Schedule:
    """All forward passes, then all backward passes."""
    times: Times = {}
    for s in range(p):
        for i in range(m):
            times[Work(Pass.FORWARD, i), s] = s + i
            times[Work(Pass.BACKWARD, i), s] = (m + p - 1) + (p - 1 - s) + i
    return _at(name, times, p, m, v)


def _one_forward_one_backward(name: str, p: int, m: int, v: int) -> Schedule:
    """Stage s in tick s+2i forward, in tick 2p−1−s+2i backward.

    As late as it can be without a longer table: no activation arrives before the tick that
    needs it, and neighbours always send in ticks of different parity.
    """
    times: Times = {}
    for s in range(p):
        for i in range(m):
            times[Work(Pass.FORWARD, i), s] = s + 2 * i
            times[Work(Pass.BACKWARD, i), s] = 2 * p - 1 - s + 2 * i
    return _at(name, times, p, m, v)


def _interleaved(name: str, p: int, m: int, v: int) -> Schedule:
    """Megatron's order: p micro-batches through one virtual stage, then the next one."""
    forwards = _interleaved_forwards(p, m, v)
    backwards = [Work(Pass.BACKWARD, work.micro, v - 1 - work.chunk) for work in forwards]
    orders = []
    for s in range(p):
        ahead = m * v if m == p else min(m * v, 2 * (p - 1 - s) + (v - 1) * p)
        steady = zip(forwards[ahead:], backwards, strict=False)
        order = [*forwards[:ahead], *(work for pair in steady for work in pair)]
        orders.append([(work,) for work in [*order, *backwards[m * v - ahead :]]])
    return _in_order(name, orders, p, m, v)


def _interleaved_forwards(p: int, m: int, v: int) -> list[Work]:
    """Groups of p micro-batches, each through all virtual stages; the last may be smaller."""
    groups = [range(first, min(first + p, m)) for first in range(0, m, p)]
    return [Work(Pass.FORWARD, i, c) for group in groups for c in range(v) for i in group]


def _zero_bubble(name: str, p: int, m: int, v: int) -> Schedule:
    """ZB-H1: weight halves fill the ticks in which a stage would wait.

    Each stage prefers to go forward, then backward, then to catch up on weights; it runs ahead
    of its backward passes as far as 1F1B does, and holds as much as 1F1B's first stage.
    """

    def choices(s: int, done: Done) -> Sequence[Work]:
        ahead, held = (done[Pass.FORWARD] - done[what] for what in (Pass.INPUT, Pass.WEIGHT))
        wished = [Pass.INPUT, Pass.WEIGHT]
        if ahead < p - s and held < p:
            wished.insert(0, Pass.FORWARD)
        return [Work(what, done[what]) for what in wished if done[what] < m]

    return _played(name, choices, p, m, v)


def _in_order(
    name: str, orders: Sequence[Sequence[Sequence[Work]]], p: int, m: int, v: int
) -> Schedule:
    """Every stage does its work in the given order, each as soon as it can be done."""

    def choices(s: int, done: Done) -> Sequence[Work]:
        count = sum(done.values())
        return orders[s][count] if count < len(orders[s]) else ()

    return _played(name, choices, p, m, v)


def _played(
    name: str, choices: Callable[[int, Done], Sequence[Work]], p: int, m: int, v: int
) -> Schedule:
    """Ticks in which every stage does the first of its choices that is ready."""
    times: Times = {}
    rows: list[Row] = []
    done: list[Done] = [dict.fromkeys(Pass, 0) for _ in range(p)]
    while any(wished := [choices(s, done[s]) for s in range(p)]):
        row = tuple(
            next((w for w in wished[s] if all(n in times for n in _needs(w, s, p, v))), None)
            for s in range(p)
        )
        assert any(row), f"no stage can go on after {len(rows)} ticks"
        for s, work in enumerate(row):
            if work is not None:
                times[work, s] = len(rows)
                done[s][work.what] += 1
        rows.append(row)
    return Schedule(name, p, m, v, tuple(rows))


def _at(name: str, times: Times, p: int, m: int, v: int) -> Schedule:
    """The table of given times."""
    at = {(tick, stage): work for (work, stage), tick in times.items()}
    count = 1 + max(times.values())
    return Schedule(
        name, p, m, v, tuple(tuple(at.get((t, s)) for s in range(p)) for t in range(count))
    )


def _needs(work: Work, stage: int, p: int, v: int) -> Iterator[tuple[Work, int]]:
    part, what = work.chunk * p + stage, work.what
    if what is Pass.WEIGHT:
        yield dataclasses.replace(work, what=Pass.INPUT), stage
        return
    if what is not Pass.FORWARD:
        yield dataclasses.replace(work, what=Pass.FORWARD), stage
    source = part - 1 if what is Pass.FORWARD else part + 1
    if 0 <= source < p * v:
        chunk, other = divmod(source, p)
        yield Work(what, work.micro, chunk), other


def _label(work: Work | None, of: Schedule) -> str:
    if work is None:
        return ""
    letter = {Pass.FORWARD: "F", Pass.WEIGHT: "W"}.get(work.what, "B")
    chunk = "abcdefgh"[work.chunk % 8] if of.virtual_stages > 1 else ""
    return f"{letter}{work.micro}{chunk}"


SCHEDULES: dict[str, Callable[[str, int, int, int], Schedule]] = {
    "gpipe": _gpipe,
    "1f1b": _one_forward_one_backward,
    "interleaved": _interleaved,
    "zero_bubble": _zero_bubble,
}
