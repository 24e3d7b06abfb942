"""What would change a plan's answer: other memory, batches, lengths and links."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from .._core.tree import format_bytes
from ..parallel import gradient_shard_axes
from ._candidate import Candidate
from ._search import Search

_FACTORS = (0.5, 2.0)
_REACH = 2.0**12
"""How many times smaller and larger batches are looked at."""
_HALVINGS = 14


def with_memory(best: Candidate, tight: Sequence[Candidate]) -> tuple[str, ...]:
    """Faster layouts that lack memory."""
    faster = [c for c in tight if c.seconds < best.seconds]
    if not faster:
        return ()
    found = max(faster, key=lambda c: c.margin), min(faster, key=lambda c: c.seconds)
    texts = (f"with {format_bytes(-c.margin)} more memory: {c}" for c in found)
    return tuple(dict.fromkeys(texts))  # one layout may be both


def with_batch(search: Search, best: Candidate) -> tuple[str, ...]:
    """From which batch on the best layout waits for its links most, or does so no more."""
    end = _REACH if best.communication_bound else 1 / _REACH
    if search.again(best, end).communication_bound == best.communication_bound:
        return ()
    scale = _turn(search, best, end)
    beyond = search.again(best, scale)
    rows = search.rows / math.prod(best.mesh.get(axis, 1) for axis in gradient_shard_axes())
    where = f"{'above' if end > 1 else 'below'} {_amount(rows * scale, search)}"
    what = "stops being" if end > 1 else "becomes"
    text = f"batch per device {where} {what} communication-bound, now {_amount(rows, search)}"
    return (f"{text}: {best.layout}, then bound by {beyond.bound}",)


def _turn(search: Search, best: Candidate, end: float) -> float:
    """The scale of the batch, on the far side, where a layout begins to be bound by other things.

    Bisection, of the logarithm: links wait for weights, which no batch makes smaller.
    """
    here, there = 1.0, end
    for _ in range(_HALVINGS):
        middle = (here * there) ** 0.5
        if search.again(best, middle).communication_bound == best.communication_bound:
            here = middle
        else:
            there = middle
    return there


def _amount(rows: float, search: Search) -> str:
    """Rows, and their tokens where one length is known."""
    lengths = search.lengths
    tokens = f" ({rows * max(lengths):,.0f} tokens)" if len(lengths) == 1 else ""
    return f"{rows:.3g} rows{tokens}"


def sensitivity(
    search: Search, front: Sequence[Candidate]
) -> tuple[tuple[tuple[str, str, float], ...], tuple[str, ...]]:
    """Which layout wins with another batch, length or other links.

    Args:
      search: what was searched.
      front: layouts than which none is both faster and smaller; at other lengths only what is
        like one of these is looked at.

    Returns:
      (what is other, the layout that then wins, its seconds); and where none is left, why.
    """
    found, none_left = [], []
    for what, other, scale in _others(search, front):
        made = other.run(scale)
        fit = [c for c in made.candidates if c.margin >= 0]
        if fit:
            best = min(fit, key=lambda c: c.seconds)
            found.append((what, str(best), best.seconds))
        else:
            why = next(iter(made.rejected), "") if not made.candidates else "memory is missing"
            none_left.append(f"{what}: no layout is left: {why}")
    return tuple(found), tuple(none_left)


def _others(search: Search, front: Sequence[Candidate]) -> Iterator[tuple[str, Search, float]]:
    """What is other, the search for it, and how many times the rows."""
    chip = search.machine.network.chip
    for factor in _FACTORS:
        yield f"{factor:g} x rows", search, factor
        if (longer := search.of_length(factor, front)) is not None:
            yield f"{factor:g} x length", longer, 1.0
        faster = dataclasses.replace(chip, link=chip.link * factor, network=chip.network * factor)
        network = dataclasses.replace(search.machine.network, chip=faster)
        machine = dataclasses.replace(search.machine, network=network)
        yield f"{factor:g} x link bandwidth", dataclasses.replace(search, machine=machine), 1.0
