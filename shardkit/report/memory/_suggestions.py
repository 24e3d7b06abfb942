"""What would make a step that does not fit its device fit."""

from collections.abc import Iterator, Mapping, Sequence

from ..._core.tree import format_bytes
from .._program import Placed
from ._memory import Memory
from ._peak import Peak


def advice(
    memory: Memory,
    leaves: Sequence[Placed],
    sizes: Mapping[str, int],
    peak: Peak | None = None,
    room: int | None = None,
) -> list[str]:
    """What would make a step fit, the largest saving first.

    Args:
      memory: of the step.
      leaves: the arguments of the step.
      sizes: mesh axis → size.
      peak: what is alive at the peak. Where it agrees with the compiler, advice about what the
        compiler adds says which class it is about.
      room: bytes that a device gives out, where that is less than its capacity.

    Returns:
      Nothing where the step fits, or where what the device has is unknown.
    """
    room = memory.capacity if room is None else room
    if memory.total is None or room is None or memory.total <= room:
        return []
    known = peak is not None and peak.close
    of_temp = _by_class(peak) if peak is not None and known else _of_all(memory)
    savings = [*_splits(leaves, sizes), *of_temp]
    return [text for saved, text in sorted(savings, reverse=True) if saved]


def _splits(leaves: Sequence[Placed], sizes: Mapping[str, int]) -> Iterator[tuple[int, str]]:
    for part in ("params", "opt_state"):
        for axis, n in sizes.items():
            whole = [x for x in leaves if x.part == part and axis not in x.axes() and x.leaf.shape]
            saved = sum(leaf.device_bytes(sizes) for leaf in whole) * (n - 1) // n
            yield saved, f"split {part} over {axis!r} too: {format_bytes(saved)} less"


def _of_all(memory: Memory) -> Iterator[tuple[int, str]]:
    if memory.temp:
        half = memory.temp // 2
        yield half, f"accumulate=2 or a remat policy: up to {format_bytes(half)} less"


def _by_class(peak: Peak) -> Iterator[tuple[int, str]]:
    found = peak.classes
    saved = found.get("activations", 0)
    yield saved, f"a remat policy that keeps less: up to {format_bytes(saved)} of activations less"
    by_rows = saved + found.get("collectives", 0) + found.get("temporaries", 0)
    half = by_rows // 2
    yield half, f"accumulate=2: up to {format_bytes(half)} of what grows with the rows less"
    gradients = found.get("gradients", 0)
    yield (
        gradients // 2,
        f"gradients over more devices (fsdp, or zero stage 2): {format_bytes(gradients)} are alive"
        " at the peak",
    )
