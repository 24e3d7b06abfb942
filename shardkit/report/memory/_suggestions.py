"""Suggests how to make a step fit its device."""

from collections.abc import Iterator, Mapping, Sequence

from ..._core.tree import format_bytes
from .._placed_leaf import PlacedLeaf
from ._memory import Memory
from ._peak import Peak


def suggest_memory_savings(
    memory: Memory,
    leaves: Sequence[PlacedLeaf],
    sizes: Mapping[str, int],
    peak: Peak | None = None,
    room: int | None = None,
) -> list[str]:
    """Suggests changes that make a step fit, the largest saving first.

    Args:
      memory: of the step.
      leaves: the arguments of the step.
      sizes: mesh axis → size.
      peak: buffers alive at the peak. If it agrees with the compiler, suggestions are per class.
      room: bytes that a device can allocate, if that is less than its capacity.

    Returns:
      An empty list if the step fits, or if the capacity is unknown.
    """
    room = memory.capacity if room is None else room
    if memory.total is None or room is None or memory.total <= room:
        return []
    classes_known = peak is not None and peak.agrees
    of_temp = _suggest_by_class(peak) if peak and classes_known else _suggest_for_temp(memory)
    savings = [*_suggest_splits(leaves, sizes), *of_temp]
    return [text for saved, text in sorted(savings, reverse=True) if saved]


def _suggest_splits(
    leaves: Sequence[PlacedLeaf], sizes: Mapping[str, int]
) -> Iterator[tuple[int, str]]:
    for part in ("params", "opt_state"):
        for axis, n in sizes.items():
            whole = [x for x in leaves if x.part == part and axis not in x.axes() and x.leaf.shape]
            saved = sum(leaf.device_bytes(sizes) for leaf in whole) * (n - 1) // n
            yield saved, f"split {part} over {axis!r} too: {format_bytes(saved)} less"


def _suggest_for_temp(memory: Memory) -> Iterator[tuple[int, str]]:
    if memory.temp:
        half = memory.temp // 2
        yield half, f"accumulate=2 or a remat policy: up to {format_bytes(half)} less"


def _suggest_by_class(peak: Peak) -> Iterator[tuple[int, str]]:
    classes = peak.classes
    saved = classes.get("activations", 0)
    yield saved, f"a remat policy that saves less: up to {format_bytes(saved)} of activations less"
    by_rows = saved + classes.get("collectives", 0) + classes.get("temporaries", 0)
    half = by_rows // 2
    yield half, f"accumulate=2: up to {format_bytes(half)} less of what grows with the batch"
    gradients = classes.get("gradients", 0)
    yield (
        gradients // 2,
        f"gradients over more devices (fsdp, or zero stage 2): {format_bytes(gradients)} are alive"
        " at the peak",
    )
