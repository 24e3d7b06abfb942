"""What is alive at each moment of a step, by class: the picture behind the peak.

A schedule has thousands of moments. They are drawn as a few columns, each the fullest moment of an
equal part of the schedule, so that the peak is always one of them:

    moments    1 2 3 4 5 6 7 8 9
    bytes      1 4 2 5 9 6 3 2 1
    3 columns      4   9     3
"""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..hlo._source_lines import Sources
from ._liveness import Buffer

_COLUMNS, _LARGEST = 160, 3


@dataclasses.dataclass(frozen=True)
class HeldBuffer:
    """A buffer that is one of the largest at some moment."""

    start: int  # moment that makes it
    end: int  # last moment that reads it
    bytes: int  # bytes in the device's memory
    kind: str  # class, as in `Peak`
    shape: str  # type of the array on one device
    name: str  # name of the HLO instruction
    where: str  # line of the user's code that makes it; "" if unknown


@dataclasses.dataclass(frozen=True)
class MemoryHistory:
    """What is alive over a step, besides its arguments, which are alive throughout."""

    moments: int  # number of moments of the schedule, one per executed instruction
    at: tuple[int, ...]  # the moments that are columns, in order; the peak is one of them
    phases: tuple[str, ...]  # phase of the step at each
    # class → bytes alive at each; the classes add up to all bytes
    classes: Mapping[str, tuple[int, ...]]
    # the largest buffers of each, in the order in which they are made
    buffers: tuple[HeldBuffer, ...]


def alive_bytes(buffers: Iterable[Buffer], moments: int) -> list[int]:
    """Bytes alive at each moment, from 0 to `moments`."""
    change = [0] * (moments + 2)
    for buffer in buffers:
        change[buffer.start] += buffer.bytes
        change[buffer.end + 1] -= buffer.bytes
    return list(itertools.accumulate(change))[:-1]


def build_history(
    buffers: Sequence[Buffer],
    moments: int,
    *,
    classify: Callable[[Buffer], str],
    phase_at: Callable[[int], str],
    sources: Sources,
) -> MemoryHistory:
    """Draws a schedule of so many moments as columns; no buffer is an argument."""
    at = _fullest_of_parts(alive_bytes(buffers, moments))
    kinds: dict[str, list[Buffer]] = {}
    for buffer in buffers:
        kinds.setdefault(classify(buffer), []).append(buffer)
    columns = {kind: alive_bytes(held, moments) for kind, held in kinds.items()}
    largest = _largest_at(buffers, at)
    return MemoryHistory(
        moments=moments,
        at=tuple(at),
        phases=tuple(phase_at(moment) for moment in at),
        classes={kind: tuple(sizes[n] for n in at) for kind, sizes in columns.items()},
        buffers=tuple(
            HeldBuffer(
                start=buffer.start,
                end=buffer.end,
                bytes=buffer.bytes,
                kind=classify(buffer),
                shape=str(buffer.shape),
                name=buffer.name,
                where=str(sources.at(buffer.place) or ""),
            )
            for buffer in sorted(largest, key=lambda buffer: buffer.start)
        ),
    )


def _fullest_of_parts(alive: Sequence[int]) -> list[int]:
    """The fullest moment of each of at most `_COLUMNS` equal parts."""
    size = -(-len(alive) // _COLUMNS)
    parts = (range(n, min(n + size, len(alive))) for n in range(0, len(alive), size))
    return [max(part, key=alive.__getitem__) for part in parts]


def _largest_at(buffers: Sequence[Buffer], at: Sequence[int]) -> list[Buffer]:
    """The few largest buffers that are alive at some of these moments, each once.

    The largest buffers fill the columns that they reach; only those with room are looked at again.
    """
    columns: list[list[Buffer]] = [[] for _ in at]
    wanting = list(at)  # moments whose column still has room, in order
    column = {moment: held for moment, held in zip(at, columns, strict=True)}
    for buffer in sorted(buffers, key=lambda buffer: -buffer.bytes):
        first = bisect.bisect_left(wanting, buffer.start)
        last = bisect.bisect_right(wanting, buffer.end)
        for moment in wanting[first:last]:
            column[moment].append(buffer)
        wanting[first:last] = [m for m in wanting[first:last] if len(column[m]) < _LARGEST]
        if not wanting:
            break
    return list({id(buffer): buffer for held in columns for buffer in held}.values())
