"""From a tick table to what a device reads in each tick: slots, roles and exchanges.

A stage keeps what neighbours send it in numbered slots: the input of a part of the layers until
its backward pass is over, and the gradient of the part's output from its arrival to its use. Slots
are assigned like registers, by the lifetimes that the table shows, so their number is the
schedule's own bound on live activations, whatever the number of micro-batches.

Between ticks each stage sends at most one message. Ticks whose senders and receivers form one
permutation share an exchange; 1F1B needs two, for even and for odd ticks, and every message in
them is one that the schedule needs.
"""

import dataclasses
import enum
from collections.abc import Iterable, Iterator

import numpy as np

from ._schedule import Action, PassType, PipelineSchedule

Pairs = tuple[tuple[int, int], ...]
# An exchange is one permutation, or two where a stage hears from both neighbours at once.
Exchange = tuple[Pairs, ...]
# "input" or "grad", micro-batch, chunk.
_Key = tuple[str, int, int]


class Branch(enum.IntEnum):
    """What a device computes in a tick. The last part's forward pass waits for its backward."""

    IDLE = 0
    FORWARD = 1
    BACKWARD = 2
    INPUT = 3
    WEIGHT = 4


@dataclasses.dataclass(frozen=True)
class TickProgram:
    """What each device reads in each tick."""

    # `{name: i32[ticks, stages]}`: `branch`, `micro`, `chunk`, `first` and `last` (whether the part
    # is the first or last of the layers), `input` and `grad` (slots that are read, or written by
    # the stage itself), `arrival0` and `arrival1` (slots of what an exchange brings)
    columns: dict[str, np.ndarray]
    exchange: np.ndarray  # i32[ticks], which of `exchanges` follows a tick
    exchanges: tuple[Exchange, ...]  # the distinct ones
    slots: int  # number of slots; one more, after the last, takes messages that no stage needs

    def flag_counts(self, flag: str, branch: Branch) -> np.ndarray:
        """Ticks of a branch, on all stages, without a flag and with it: i64[2]."""
        within = self.columns["branch"] == branch
        return np.bincount(self.columns[flag][within], minlength=2)

    def messages(self) -> int:
        """Times that one stage sends to another, messages that no stage needs included."""
        sizes = [sum(map(len, exchange)) for exchange in self.exchanges]
        return sum(sizes[number] for number in self.exchange)


@dataclasses.dataclass(frozen=True)
class _StoredValue:
    """A value that a stage keeps, from half-tick `start` to half-tick `stop`."""

    start: int
    stop: int
    stage: int
    key: _Key


@dataclasses.dataclass(frozen=True)
class _Message:
    """What `src` sends after a tick, and which value of `dst` it becomes."""

    src: int
    dst: int
    backward: bool
    key: _Key


def tick_program(table: PipelineSchedule) -> TickProgram:
    """Assigns the slots and exchanges of a tick table."""
    slot = _assign_slots(_list_values(table))
    count = 1 + max(slot.values())
    shape = (len(table.ticks), table.stages)
    columns = {
        name: np.zeros(shape, np.int32) for name in ("branch", "micro", "chunk", "first", "last")
    }
    for name in ("input", "grad", "arrival0", "arrival1"):
        columns[name] = np.full(shape, count, np.int32)
    for (action, s), t in table.times.items():
        for name, value in _role(table, action, s).items():
            columns[name][t, s] = value
        for name in ("input", "grad"):
            columns[name][t, s] = slot.get((s, (name, action.micro, action.chunk)), count)
    sent = [list(_list_messages(table, t)) for t in range(shape[0])]
    exchange, exchanges = _find_exchanges(sent)
    for t, messages in enumerate(sent):
        for message in messages:
            channel = int(message.backward and len(exchanges[exchange[t]]) == 2)
            columns[f"arrival{channel}"][t, message.dst] = slot[message.dst, message.key]
    return TickProgram(columns=columns, exchange=exchange, exchanges=exchanges, slots=count)


def _role(table: PipelineSchedule, action: Action, stage: int) -> dict[str, int]:
    part = table.part(stage, action.chunk)
    is_last = part == table.stages * table.virtual_stages - 1
    waits = is_last and action.pass_type is PassType.FORWARD and table.trains
    return {
        "branch": Branch.IDLE if waits else Branch(action.pass_type.value),
        "micro": action.micro,
        "chunk": action.chunk,
        "first": part == 0,
        "last": is_last,
    }


def _list_values(table: PipelineSchedule) -> Iterator[_StoredValue]:
    """Every input and every gradient that some stage keeps, with its lifetime in half-ticks.

    Tick t computes at half-tick 2t; what the exchange after it brings arrives at 2t + 1. 1F1B with
    2 stages and 2 micro-batches:

        stage 0  F0 .. F1 B0 .. B1    micro-batch 1's input: from 4 (F1) to 10 (B1)
        stage 1  .. F0 B0 F1 B1 ..    micro-batch 1's input: from 5 (after tick 2) to 8 (B1)
    """
    times, end = table.times, table.stages * table.virtual_stages - 1
    backward = PassType.INPUT if table.splits_backward else PassType.BACKWARD
    final = PassType.WEIGHT if table.splits_backward else backward
    final = final if table.trains else PassType.FORWARD
    for (action, s), t in times.items():
        part, key = table.part(s, action.chunk), (action.micro, action.chunk)
        stop = 2 * times[dataclasses.replace(action, pass_type=final), s]
        if action.pass_type is PassType.FORWARD:
            sent = [times[n] for n in table.dependencies(action, s)] if part else []
            yield _StoredValue(2 * sent[0] + 1 if sent else 2 * t, stop, s, ("input", *key))
        if action.pass_type is backward and part < end:
            before = table.dependencies(action, s)
            sent = [times[n] for n in before if n[0].pass_type is backward]
            yield _StoredValue(2 * sent[0] + 1, stop, s, ("grad", *key))
        if action.pass_type is PassType.INPUT and part == end:
            yield _StoredValue(2 * t, stop, s, ("grad", *key))


def _assign_slots(values: Iterable[_StoredValue]) -> dict[tuple[int, _Key], int]:
    """`(stage, key) → slot`: the lowest slot that is free on the stage (a linear scan)."""
    slot: dict[tuple[int, _Key], int] = {}
    last_use: dict[int, list[int]] = {}  # stage → for each slot, when its value outer_params
    for value in sorted(values, key=lambda v: (v.stage, v.start, v.key)):
        stops = last_use.setdefault(value.stage, [])
        number = next((n for n, stop in enumerate(stops) if stop < value.start), len(stops))
        stops[number:] = [value.stop, *stops[number + 1 :]]
        slot[value.stage, value.key] = number
    return slot


def _list_messages(table: PipelineSchedule, tick: int) -> Iterator[_Message]:
    """What is sent after a tick."""
    p, end = table.stages, table.stages * table.virtual_stages - 1
    for s, action in enumerate(table.ticks[tick]):
        if action is None or action.pass_type is PassType.WEIGHT:
            continue
        backward = action.pass_type is not PassType.FORWARD
        target = table.part(s, action.chunk) + (-1 if backward else 1)
        if 0 <= target <= end:
            chunk, dst = divmod(target, p)
            yield _Message(s, dst, backward, ("grad" if backward else "input", action.micro, chunk))


def _find_exchanges(sent: list[list[_Message]]) -> tuple[np.ndarray, tuple[Exchange, ...]]:
    """As few exchanges as a greedy search finds, the fullest ticks first."""
    exchanges: list[list[dict[int, int]]] = []
    number = np.zeros(len(sent), np.int32)
    for t in sorted(range(len(sent)), key=lambda t: -len(sent[t])):
        channels = _split_channels(sent[t])
        merged = [_merge_exchanges(exchange, channels) for exchange in exchanges]
        number[t] = n = next((n for n, m in enumerate(merged) if m is not None), len(exchanges))
        exchanges[n : n + 1] = [channels if n == len(exchanges) else merged[n] or []]
    return number, tuple(tuple(tuple(sorted(c.items())) for c in e) for e in exchanges)


def _split_channels(messages: list[_Message]) -> list[dict[int, int]]:
    """One permutation; two, forward and backward, where a stage hears from both neighbours."""
    receivers = [m.dst for m in messages]
    if not messages or len(set(receivers)) == len(receivers):
        return [{m.src: m.dst for m in messages}] if messages else []
    return [{m.src: m.dst for m in messages if m.backward is b} for b in (False, True)]


def _merge_exchanges(
    a: list[dict[int, int]], b: list[dict[int, int]]
) -> list[dict[int, int]] | None:
    """Both exchanges as one, or None where that is not a permutation."""
    if len(a) != len(b):
        return None
    merged = [{**x, **y} for x, y in zip(a, b, strict=True)]
    injective = all(len(set(c.values())) == len(c) for c in merged)
    consistent = all(
        c[src] == dst for c, x in zip(merged, a, strict=True) for src, dst in x.items()
    )
    return merged if injective and consistent else None
