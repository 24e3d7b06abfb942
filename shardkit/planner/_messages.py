"""What a plan says in words: why no layout is left, what was weighed, what is taken for granted."""

from collections.abc import Sequence
from typing import NoReturn

from .._core.errors import MeshError, Problem, format_problems
from .._core.tree import format_bytes
from ..hardware import CHIPS
from ..mesh import Target
from ..parallel import Strategy, planned_kinds
from ._candidate import Candidate
from ._estimate import Machine
from ._search import Found


def refuse(target: Target, found: Found, tight: Sequence[Candidate]) -> NoReturn:
    """Says why nothing is left, and the smallest change that helps.

    Raises:
      MeshError: always.
    """
    problems = [Problem(one, f"{n} layouts: {why}") for why, (n, one) in found.rejected.items()]
    fix = "another number of devices, or a global batch that they divide"
    if tight:
        least = min(tight, key=lambda c: c.total)
        have, lack = format_bytes(least.capacity), format_bytes(-least.margin)
        why = f"the smallest of {len(tight)} needs {format_bytes(least.total)} of {have}"
        problems.insert(0, Problem(str(least), f"{why}: {lack} are missing"))
        larger = [c for c in CHIPS.values() if c.memory >= least.total and c.kind == target.kind]
        devices = f"a device with {lack} more"
        if larger:
            devices += f", as {min(larger, key=lambda c: c.memory).name}"
        part = "state" if least.state > least.temp else "activations"
        fix = f"{devices}; or twice the devices, as {part} take most"
        fix += "" if part == "state" else "; or a smaller global batch, or more micro-batches"
    headline = f"No layout fits on {target}."
    raise MeshError(format_problems(headline, problems, fix))


def placed(strategy: Strategy, axes: Sequence[str]) -> str:
    """Which kinds of parallelism were weighed, and which of the declaration's own were not."""
    weighed = planned_kinds()
    kinds = [kind.planned for axis in axes for kind in weighed if kind.axis == axis]
    left = [kind.planned for kind in weighed if kind.axis not in axes]
    left += [variant for kind in weighed for variant in kind.not_planned]
    left += [str(kind) for kind in strategy.kinds if kind.unmodelled_reason]
    return f"layouts are {', '.join(kinds)}; not weighed: {', '.join(left)}"


def assumptions(machine: Machine) -> tuple[str, ...]:
    """What estimates take for granted of the devices."""
    chip = machine.network.chip
    return (
        f"products at {machine.peak / 1e12:.4g} TFLOP/s, memory at "
        f"{chip.memory_bandwidth / 1e9:.0f} GB/s: the peaks of {chip.name}",
        "operations reach "
        + (
            f"{machine.efficiency:.0%} and {machine.memory_efficiency:.0%} of these, as the "
            f"compiler's estimates do; products fill tiles of {chip.tile}"
            if machine.efficiency < 1
            else "all of these, as nothing is fitted for this kind of device"
        ),
        f"links {chip.link / 1e9:.0f} GB/s one way, {chip.latency * 1e6:.0f} µs per hop",
        f"{machine.overlap:.0%} of communication is hidden behind computing",
        "elementwise operations are fused into those that read them",
    )
