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
"""Factor by which the batch grows or shrinks at most."""
_HALVINGS = 14


def describe_more_memory(best: Candidate, tight: Sequence[Candidate]) -> tuple[str, ...]:
    """The faster layouts that do not fit: the one that lacks least memory, and the fastest."""
    faster = [c for c in tight if c.seconds < best.seconds]
    if not faster:
        return ()
    nearest, fastest = max(faster, key=lambda c: c.margin), min(faster, key=lambda c: c.seconds)
    texts = (f"with {format_bytes(-c.margin)} more memory: {c}" for c in (nearest, fastest))
    return tuple(dict.fromkeys(texts))  # one layout can be both


def describe_batch_crossover(search: Search, best: Candidate) -> tuple[str, ...]:
    """The batch at which the best layout becomes communication-bound, or stops being so."""
    end = _REACH if best.communication_bound else 1 / _REACH
    if (
        not search.rows
        or search.estimate_again(best, end).communication_bound == best.communication_bound
    ):
        return ()
    scale = _find_crossover(search, best, end)
    beyond = search.estimate_again(best, scale)
    rows = search.rows / math.prod(best.mesh.get(axis, 1) for axis in gradient_shard_axes())
    where = f"{'above' if end > 1 else 'below'} {_format_batch(rows * scale, search)}"
    what = "stops being" if end > 1 else "becomes"
    text = f"batch per device {where} {what} communication-bound, now {_format_batch(rows, search)}"
    return (f"{text}: {best.layout}, then bound by {beyond.bound}",)


def _find_crossover(search: Search, best: Candidate, end: float) -> float:
    """The scale of the batch, on the far side, at which a layout is bound by something else.

    Bisection of the logarithm: 14 halvings of a factor of 4096 leave 4096 ** (1 / 2**14), 0.05 %.
    """
    near, far = 1.0, end
    for _ in range(_HALVINGS):
        middle = (near * far) ** 0.5
        if search.estimate_again(best, middle).communication_bound == best.communication_bound:
            near = middle
        else:
            far = middle
    return far


def _format_batch(rows: float, search: Search) -> str:
    """Rows, and their tokens where the model names one length."""
    lengths = search.lengths
    tokens = f" ({rows * max(lengths):,.0f} tokens)" if len(lengths) == 1 else ""
    return f"{rows:.3g} rows{tokens}"


def find_sensitivity(
    search: Search, front: Sequence[Candidate]
) -> tuple[tuple[tuple[str, str, float], ...], tuple[str, ...]]:
    """The layout that wins with another batch, another length or other links.

    Other lengths are searched only in the families of the Pareto front. Returns (what changes, the
    layout that then wins, its seconds); and where no layout is left, why.
    """
    winners, no_winner = [], []
    for what, changed, scale in _variations(search, front):
        result = changed.run(scale)
        fit = [c for c in result.candidates if c.margin >= 0]
        if fit:
            best = min(fit, key=lambda c: c.seconds)
            winners.append((what, str(best), best.seconds))
        else:
            why = next(iter(result.rejected), "") if not result.candidates else "none fits"
            no_winner.append(f"{what}: no layout is left: {why}")
    return tuple(winners), tuple(no_winner)


def _variations(search: Search, front: Sequence[Candidate]) -> Iterator[tuple[str, Search, float]]:
    """What changes, the search for it, and the factor of the rows."""
    chip = search.machine.network.chip
    for factor in _FACTORS:
        if search.rows:
            yield f"{factor:g} x rows", search, factor
        if (longer := search.with_length(factor, front)) is not None:
            yield f"{factor:g} x length", longer, 1.0
        faster = dataclasses.replace(chip, link=chip.link * factor, network=chip.network * factor)
        network = dataclasses.replace(search.machine.network, chip=faster)
        machine = dataclasses.replace(search.machine, network=network)
        yield f"{factor:g} x link bandwidth", dataclasses.replace(search, machine=machine), 1.0
