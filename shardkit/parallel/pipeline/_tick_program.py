"""From a tick table to what a device reads in each tick: slots, roles and exchanges.

A stage keeps what neighbours send it in numbered slots: the input of a part of the layers until
its backward pass is over, and the gradient of the part's output from its arrival to its use. Slots
are given out as registers are, by the lifetimes that the table shows, so their number is the
schedule's own bound on live activations, whatever the number of micro-batches.

Between ticks each stage sends at most one message. Ticks whose senders and receivers form one
permutation share an exchange; 1F1B needs two, for even and for odd ticks, and in each of
them every message is one that the schedule asks for.
"""

import dataclasses
import enum
from collections.abc import Iterable, Iterator

import numpy as np

from ._schedule import Pass, Schedule, Work

Pairs = tuple[tuple[int, int], ...]
# An exchange is one permutation, or two where a stage hears from both neighbours at once.
Exchange = tuple[Pairs, ...]


class Branch(enum.IntEnum):
    """What a device computes in a tick. The last part's forward pass waits for its backward."""

    IDLE = 0
    FORWARD = 1
    BACKWARD = 2
    INPUT = 3
    WEIGHT = 4


@dataclasses.dataclass(frozen=True)
class Ticks:
    """What each device reads in each tick.

    Attributes:
      columns: `{name: i32[ticks, stages]}`: `branch`, `micro`, `chunk`, `first` and `last` (whether
        the part is the first or last of the layers), `input` and `grad` (slots that are read, or
        written by the stage itself), `arrival0` and `arrival1` (slots of what an exchange brings).
      exchange: i32[ticks], which of `exchanges` follows a tick.
      exchanges: the distinct ones.
      slots: number of slots; the one after the last takes what nobody asked for.
    """

    columns: dict[str, np.ndarray]
    exchange: np.ndarray
    exchanges: tuple[Exchange, ...]
    slots: int

    def often(self, flag: str, branch: Branch) -> np.ndarray:
        """How many of the ticks with a branch, on all stages, do not have a flag, and do."""
        within = self.columns["branch"] == branch
        return np.bincount(self.columns[flag][within], minlength=2)

    def messages(self) -> int:
        """Times that one stage sends to another, those that nobody asked for included."""
        sizes = [sum(map(len, exchange)) for exchange in self.exchanges]
        return sum(sizes[number] for number in self.exchange)


@dataclasses.dataclass(frozen=True)
class _Held:
    """A value that a stage keeps: from half-tick `start` to half-tick `stop`."""

    start: int
    stop: int
    stage: int
    key: tuple[str, int, int]  # "input" or "grad", micro-batch, chunk


@dataclasses.dataclass(frozen=True)
class _Sent:
    """A message of a tick: which value of `dst` it becomes."""

    src: int
    dst: int
    back: bool
    key: tuple[str, int, int]


def ticks(table: Schedule) -> Ticks:
    """Works out slots and exchanges of a tick table."""
    held = list(_values(table))
    slot = _assigned(held)
    count = 1 + max(slot.values())
    shape = (len(table.ticks), table.stages)
    names = ("branch", "micro", "chunk", "first", "last", "input", "grad", "arrival0", "arrival1")
    columns = {name: np.zeros(shape, np.int32) for name in names}
    for name in ("input", "grad", "arrival0", "arrival1"):
        columns[name][:] = count
    for (work, s), t in table.times.items():
        for name, value in _role(table, work, s).items():
            columns[name][t, s] = value
        for name in ("input", "grad"):
            columns[name][t, s] = slot.get((s, (name, work.micro, work.chunk)), count)
    sent = [list(_messages(table, t)) for t in range(shape[0])]
    exchange, exchanges = _exchanges(sent)
    for t, messages in enumerate(sent):
        for one in messages:
            channel = int(one.back and len(exchanges[exchange[t]]) == 2)
            columns[f"arrival{channel}"][t, one.dst] = slot[one.dst, one.key]
    return Ticks(columns, exchange, exchanges, count)


def _role(table: Schedule, work: Work, stage: int) -> dict[str, int]:
    part = table.part(stage, work.chunk)
    last = part == table.stages * table.virtual_stages - 1
    waits = last and work.what is Pass.FORWARD and table.trains
    branch = Branch.IDLE if waits else Branch(work.what.value)
    return {
        "branch": branch,
        "micro": work.micro,
        "chunk": work.chunk,
        "first": part == 0,
        "last": last,
    }


def _values(table: Schedule) -> Iterator[_Held]:
    """Every input and every gradient that some stage keeps, with its lifetime in half-ticks.

    A tick t works at 2t; what an exchange brings after it is there from 2t + 1.
    """
    times, end = table.times, table.stages * table.virtual_stages - 1
    halves = Pass.INPUT if table.splits_backward else Pass.BACKWARD
    final = Pass.WEIGHT if table.splits_backward else halves
    final = final if table.trains else Pass.FORWARD
    for (work, s), t in times.items():
        part, own = table.part(s, work.chunk), (work.micro, work.chunk)
        stop = 2 * times[dataclasses.replace(work, what=final), s]
        if work.what is Pass.FORWARD:
            came = [times[n] for n in table.needs(work, s)] if part else []
            yield _Held(2 * came[0] + 1 if came else 2 * t, stop, s, ("input", *own))
        if work.what is halves and part < end:
            came = [times[n] for n in table.needs(work, s) if n[0].what is halves]
            yield _Held(2 * came[0] + 1, stop, s, ("grad", *own))
        if work.what is Pass.INPUT and part == end:
            yield _Held(2 * t, stop, s, ("grad", *own))


def _assigned(held: Iterable[_Held]) -> dict[tuple[int, tuple[str, int, int]], int]:
    """A slot for each value, the lowest that is free on its stage."""
    slot: dict[tuple[int, tuple[str, int, int]], int] = {}
    free_from: dict[int, list[int]] = {}
    for value in sorted(held, key=lambda v: (v.stage, v.start, v.key)):
        stops = free_from.setdefault(value.stage, [])
        number = next((n for n, stop in enumerate(stops) if stop < value.start), len(stops))
        stops[number:] = [value.stop, *stops[number + 1 :]]
        slot[value.stage, value.key] = number
    return slot


def _messages(table: Schedule, tick: int) -> Iterator[_Sent]:
    """What is sent after a tick."""
    p, end = table.stages, table.stages * table.virtual_stages - 1
    for s, work in enumerate(table.ticks[tick]):
        if work is None or work.what is Pass.WEIGHT:
            continue
        back = work.what is not Pass.FORWARD
        target = table.part(s, work.chunk) + (-1 if back else 1)
        if 0 <= target <= end:
            chunk, dst = divmod(target, p)
            yield _Sent(s, dst, back, ("grad" if back else "input", work.micro, chunk))


def _exchanges(sent: list[list[_Sent]]) -> tuple[np.ndarray, tuple[Exchange, ...]]:
    """As few exchanges as a greedy search finds, the fullest ticks first."""
    made: list[list[dict[int, int]]] = []
    number = np.zeros(len(sent), np.int32)
    for t in sorted(range(len(sent)), key=lambda t: -len(sent[t])):
        wanted = _channels(sent[t])
        fits = (n for n, has in enumerate(made) if _joined(has, wanted) is not None)
        number[t] = n = next(fits, len(made))
        if n == len(made):
            made.append(wanted)
        else:
            made[n] = _joined(made[n], wanted) or []
    return number, tuple(tuple(tuple(sorted(c.items())) for c in one) for one in made)


def _channels(messages: list[_Sent]) -> list[dict[int, int]]:
    """One permutation; two, forward and back, where a stage hears from both neighbours."""
    heard = [one.dst for one in messages]
    if not messages or len(set(heard)) == len(heard):
        return [{one.src: one.dst for one in messages}] if messages else []
    return [{m.src: m.dst for m in messages if m.back is back} for back in (False, True)]


def _joined(one: list[dict[int, int]], other: list[dict[int, int]]) -> list[dict[int, int]] | None:
    """Both exchanges as one, or None where that is no permutation."""
    if len(one) != len(other):
        return None
    both = [{**a, **b} for a, b in zip(one, other, strict=True)]
    whole = all(len(set(c.values())) == len(c) for c in both)
    agree = all(c[src] == dst for c, a in zip(both, one, strict=True) for src, dst in a.items())
    return both if whole and agree else None
