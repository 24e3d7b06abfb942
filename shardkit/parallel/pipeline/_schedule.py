"""Pipeline schedules as data: which stage does what in which tick.

`p` stages, `m` micro-batches, `v` virtual stages: the layers are cut into `p · v` parts, part
`c · p + s` is virtual stage c of stage s. A tick is what every stage does between two exchanges
with its neighbours. A forward pass, a backward pass, and each half of a split backward pass count
as one tick, as in the papers.

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


class PassType(enum.IntEnum):
    """What a stage does with a micro-batch in one tick."""

    FORWARD = 1
    BACKWARD = 2  # gradients of input and weights
    INPUT = 3  # the half that the previous stage waits for
    WEIGHT = 4  # the half that no stage waits for


@dataclasses.dataclass(frozen=True, order=True)
class Action:
    """What one stage does in one tick."""

    pass_type: PassType  # the pass
    micro: int  # number of the micro-batch
    chunk: int = 0  # virtual stage of this stage, from 0


TickRow = tuple[Action | None, ...]
# (action, stage) → tick.
Times = dict[tuple[Action, int], int]
# How many passes of each type a stage has done.
PassCounts = dict[PassType, int]


@dataclasses.dataclass(frozen=True)
class PipelineSchedule:
    """A tick table.

    >>> table = schedule("1f1b", stages=2, micro_batches=3)
    >>> print(table)
    stage 0  F0 .. F1 B0 F2 B1 .. B2
    stage 1  .. F0 B0 F1 B1 F2 B2 ..
    >>> table.bubble, table.live()
    (Fraction(1, 4), (2, 1))
    """

    name: str  # one of `SCHEDULES`
    stages: int  # p
    micro_batches: int  # m
    virtual_stages: int  # v
    ticks: tuple[TickRow, ...]  # for each tick, what each stage does; None is idle

    @property
    def times(self) -> Times:
        """`{(action, stage): tick}`."""
        return {
            (action, stage): tick
            for tick, row in enumerate(self.ticks)
            for stage, action in enumerate(row)
            if action is not None
        }

    @property
    def bubble(self) -> fractions.Fraction:
        """Share of idle ticks, over all stages."""
        idle = sum(action is None for row in self.ticks for action in row)
        return fractions.Fraction(idle, len(self.ticks) * self.stages)

    @property
    def splits_backward(self) -> bool:
        """Whether the backward pass is split into two halves."""
        return any(action.pass_type is PassType.WEIGHT for action, _ in self.times)

    @property
    def trains(self) -> bool:
        """Whether the table has backward passes at all."""
        return any(action.pass_type is not PassType.FORWARD for action, _ in self.times)

    @property
    def labels(self) -> tuple[tuple[str, ...], ...]:
        """For each stage a text per tick; `F2b` is micro-batch 2 in virtual stage b."""
        return tuple(
            tuple(_label(row[stage], self) for row in self.ticks) for stage in range(self.stages)
        )

    def live(self) -> tuple[int, ...]:
        """Per stage, the most activations that are alive at once, from first to last use."""
        times = self.times
        last = {
            (action.micro, action.chunk, stage): tick
            for (action, stage), tick in sorted(times.items(), key=lambda item: item[1])
        }
        held = [[0] * len(self.ticks) for _ in range(self.stages)]
        for (action, stage), tick in times.items():
            if action.pass_type is PassType.FORWARD:
                for at in range(tick, last[action.micro, action.chunk, stage] + 1):
                    held[stage][at] += 1
        return tuple(max(row) for row in held)

    def part(self, stage: int, chunk: int) -> int:
        """Number of the part of the layers that a virtual stage has, from 0."""
        return chunk * self.stages + stage

    def dependencies(self, action: Action, stage: int) -> Iterator[tuple[Action, int]]:
        """The actions that must come before, with their stages."""
        return _dependencies(action, stage, self.stages, self.virtual_stages)

    def violations(self) -> list[str]:
        """Errors in the table: actions that are missing, repeated, or before a dependency."""
        times = self.times
        done = sum(action is not None for row in self.ticks for action in row)
        passes = [PassType.FORWARD]
        if self.trains:
            passes += (
                [PassType.INPUT, PassType.WEIGHT] if self.splits_backward else [PassType.BACKWARD]
            )
        expected = {
            (Action(pass_type, micro, chunk), stage)
            for pass_type in passes
            for micro in range(self.micro_batches)
            for chunk in range(self.virtual_stages)
            for stage in range(self.stages)
        }
        errors = [f"{_label(w, self)} of stage {s} is missing" for w, s in expected - times.keys()]
        errors += [f"{_label(w, self)} of stage {s} is unknown" for w, s in times.keys() - expected]
        if done != len(times):
            errors.append(f"{done - len(times)} passes are repeated")
        for (action, stage), tick in times.items():
            errors += [
                f"{_label(action, self)} of stage {stage} in tick {tick} is before "
                f"{_label(before, self)} of stage {other}"
                for before, other in self.dependencies(action, stage)
                if times.get((before, other), tick) >= tick
            ]
        return sorted(errors)

    def __str__(self) -> str:
        """Draws the table, a line per stage."""
        rows = self.labels
        width = max(len(cell) for row in rows for cell in row)
        return "\n".join(
            f"stage {s}  " + " ".join((cell or "." * width).ljust(width) for cell in row)
            for s, row in enumerate(rows)
        )


def schedule(
    name: str, *, stages: int, micro_batches: int, virtual_stages: int = 1
) -> PipelineSchedule:
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
) -> PipelineSchedule:
    """Builds the tick table of an evaluation: forward passes alone, each as soon as possible."""
    orders = [
        [(action,) for action in _interleaved_forwards(stages, micro_batches, virtual_stages)]
        for _ in range(stages)
    ]
    return _run_in_order(name, orders, stages, micro_batches, virtual_stages)


def _gpipe(name: str, p: int, m: int, v: int) -> PipelineSchedule:
    """All forward passes, then all backward passes."""
    times: Times = {}
    for s in range(p):
        for i in range(m):
            times[Action(PassType.FORWARD, i), s] = s + i
            times[Action(PassType.BACKWARD, i), s] = (m + p - 1) + (p - 1 - s) + i
    return _from_times(name, times, p, m, v)


def _one_forward_one_backward(name: str, p: int, m: int, v: int) -> PipelineSchedule:
    """Stage s goes forward in tick s+2i and backward in tick 2p−1−s+2i.

    As late as possible without a longer table: no activation arrives before the tick that needs it,
    and neighbours always send in ticks of different parity.
    """
    times: Times = {}
    for s in range(p):
        for i in range(m):
            times[Action(PassType.FORWARD, i), s] = s + 2 * i
            times[Action(PassType.BACKWARD, i), s] = 2 * p - 1 - s + 2 * i
    return _from_times(name, times, p, m, v)


def _interleaved(name: str, p: int, m: int, v: int) -> PipelineSchedule:
    """Megatron's order: p micro-batches through one virtual stage, then through the next."""
    forwards = _interleaved_forwards(p, m, v)
    backwards = [
        Action(PassType.BACKWARD, action.micro, v - 1 - action.chunk) for action in forwards
    ]
    orders = []
    for s in range(p):
        # Forward passes before the first backward pass: p=2, m=4, v=2 has 4 of 8 on stage 0
        # (2 to fill the pipeline to the last stage and back, 2 for the other chunk) and 2 on 1.
        ahead = m * v if m == p else min(m * v, 2 * (p - 1 - s) + (v - 1) * p)
        steady = zip(forwards[ahead:], backwards, strict=False)
        order = [*forwards[:ahead], *(action for pair in steady for action in pair)]
        orders.append([(action,) for action in [*order, *backwards[m * v - ahead :]]])
    return _run_in_order(name, orders, p, m, v)


def _interleaved_forwards(p: int, m: int, v: int) -> list[Action]:
    """Groups of p micro-batches, each through all virtual stages; the last may be smaller."""
    groups = [range(first, min(first + p, m)) for first in range(0, m, p)]
    return [Action(PassType.FORWARD, i, c) for group in groups for c in range(v) for i in group]


def _zero_bubble(name: str, p: int, m: int, v: int) -> PipelineSchedule:
    """ZB-H1: weight halves fill the ticks in which a stage would wait.

    Each stage prefers a forward pass, then an input half, then a weight half. It runs ahead of its
    backward passes as far as 1F1B does, and holds at most as much as 1F1B's first stage.
    """

    def choices(s: int, done: PassCounts) -> Sequence[Action]:
        ahead, held = (
            done[PassType.FORWARD] - done[pass_type]
            for pass_type in (PassType.INPUT, PassType.WEIGHT)
        )
        preferred = [PassType.INPUT, PassType.WEIGHT]
        if ahead < p - s and held < p:
            preferred.insert(0, PassType.FORWARD)
        return [
            Action(pass_type, done[pass_type]) for pass_type in preferred if done[pass_type] < m
        ]

    return _simulate(name, choices, p, m, v)


def _run_in_order(
    name: str, orders: Sequence[Sequence[Sequence[Action]]], p: int, m: int, v: int
) -> PipelineSchedule:
    """Every stage does its actions in the given order, each as soon as possible."""

    def choices(s: int, done: PassCounts) -> Sequence[Action]:
        count = sum(done.values())
        return orders[s][count] if count < len(orders[s]) else ()

    return _simulate(name, choices, p, m, v)


def _simulate(
    name: str, choices: Callable[[int, PassCounts], Sequence[Action]], p: int, m: int, v: int
) -> PipelineSchedule:
    """In every tick, each stage does the first of its choices whose dependencies are done."""
    times: Times = {}
    rows: list[TickRow] = []
    done: list[PassCounts] = [dict.fromkeys(PassType, 0) for _ in range(p)]
    while any(wanted := [choices(s, done[s]) for s in range(p)]):
        row = tuple(
            next((w for w in wanted[s] if all(n in times for n in _dependencies(w, s, p, v))), None)
            for s in range(p)
        )
        assert any(row), f"no stage can continue after {len(rows)} ticks"
        for s, action in enumerate(row):
            if action is not None:
                times[action, s] = len(rows)
                done[s][action.pass_type] += 1
        rows.append(row)
    return PipelineSchedule(name, p, m, v, tuple(rows))


def _from_times(name: str, times: Times, p: int, m: int, v: int) -> PipelineSchedule:
    """Builds the table from `(action, stage) → tick`."""
    at = {(tick, stage): action for (action, stage), tick in times.items()}
    count = 1 + max(times.values())
    return PipelineSchedule(
        name, p, m, v, tuple(tuple(at.get((t, s)) for s in range(p)) for t in range(count))
    )


def _dependencies(action: Action, stage: int, p: int, v: int) -> Iterator[tuple[Action, int]]:
    part, pass_type = action.chunk * p + stage, action.pass_type
    if pass_type is PassType.WEIGHT:
        yield dataclasses.replace(action, pass_type=PassType.INPUT), stage
        return
    if pass_type is not PassType.FORWARD:
        yield dataclasses.replace(action, pass_type=PassType.FORWARD), stage
    source = part - 1 if pass_type is PassType.FORWARD else part + 1
    if 0 <= source < p * v:
        chunk, other = divmod(source, p)
        yield Action(pass_type, action.micro, chunk), other


def _label(action: Action | None, of: PipelineSchedule) -> str:
    if action is None:
        return ""
    letter = {PassType.FORWARD: "F", PassType.WEIGHT: "W"}.get(action.pass_type, "B")
    chunk = "abcdefgh"[action.chunk % 8] if of.virtual_stages > 1 else ""
    return f"{letter}{action.micro}{chunk}"


SCHEDULES: dict[str, Callable[[str, int, int, int], PipelineSchedule]] = {
    "gpipe": _gpipe,
    "1f1b": _one_forward_one_backward,
    "interleaved": _interleaved,
    "zero_bubble": _zero_bubble,
}
