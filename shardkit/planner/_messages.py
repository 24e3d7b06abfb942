"""Texts of a plan: why no layout is left, which kinds were weighed, what is assumed."""

from collections.abc import Sequence
from typing import NoReturn

from .._core.errors import MeshError, Problem, format_problems
from .._core.tree import format_bytes
from ..hardware import CHIPS
from ..mesh import Target
from ..parallel import Strategy, planned_kinds
from ._candidate import Candidate
from ._estimate import Machine
from ._search import SearchResult


def raise_no_layout(target: Target, result: SearchResult, tight: Sequence[Candidate]) -> NoReturn:
    """Raises MeshError: why no layout is left, and the smallest change that helps."""
    problems = [
        Problem(example, f"{n} layouts: {why}") for why, (n, example) in result.rejected.items()
    ]
    fix = "another number of devices, or a global batch that they divide"
    if tight:
        smallest = min(tight, key=lambda c: c.total)
        capacity, missing = format_bytes(smallest.capacity), format_bytes(-smallest.margin)
        why = f"the smallest of {len(tight)} needs {format_bytes(smallest.total)} of {capacity}"
        problems.insert(0, Problem(str(smallest), f"{why}: {missing} are missing"))
        larger = [c for c in CHIPS.values() if c.memory >= smallest.total and c.kind == target.kind]
        fix = f"a device with {missing} more"
        if larger:
            fix += f", as {min(larger, key=lambda c: c.memory).name}"
        part = "state" if smallest.state > smallest.temp else "activations"
        fix += f"; or twice the devices, as {part} take most"
        fix += "" if part == "state" else "; or a smaller global batch, or more micro-batches"
    headline = f"No layout fits on {target}."
    raise MeshError(format_problems(headline, problems, fix))


def describe_kinds(strategy: Strategy, axes: Sequence[str]) -> str:
    """The kinds of parallelism that were weighed, and those of the spec that were not."""
    weighed = planned_kinds()
    kinds = [kind.planned for axis in axes for kind in weighed if kind.axis == axis]
    others = [kind.planned for kind in weighed if kind.axis not in axes]
    others += [variant for kind in weighed for variant in kind.not_planned]
    others += [str(kind) for kind in strategy.kinds if kind.unmodelled_reason]
    return f"layouts are {', '.join(kinds)}; not weighed: {', '.join(others)}"


def describe_machine(machine: Machine) -> tuple[str, ...]:
    """The assumptions of the estimates about the devices."""
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
        f"{machine.overlap:.0%} of communication is hidden behind compute",
        "elementwise operations are fused into those that read them",
    )
