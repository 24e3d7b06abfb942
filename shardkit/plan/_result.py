"""What a plan says: ranked layouts, why each is where it is, and what was left out and why."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from .._tree import format_bytes
from .._types import Accumulate


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One layout with its estimate. Bytes and seconds are of one device and step, modelled.

    Attributes:
      mesh: size of each axis.
      accumulate: micro-batches.
      remat: checkpoint policy.
      zero: ZeRO stage over `data`; 0 for none.
      state: bytes of parameters, optimizer state, extra, counter and key; exact.
      batch: bytes of its share of the batch; exact.
      temp: bytes of activations, gradients and scratch.
      capacity: bytes of the device.
      seconds: of a step.
      compute: seconds of products.
      memory: seconds of other traffic with the device's memory.
      communication: mesh axes, joined by commas → seconds on the links.
      wire: the same → bytes sent.
      declaration: code that declares it.
      compiled: what the target's compiler made of it, if it was asked.
      failed: why it could not be compiled.
    """

    mesh: Mapping[str, int]
    accumulate: Accumulate
    remat: str
    zero: int
    state: int
    batch: int
    temp: float
    capacity: int
    seconds: float
    compute: float
    memory: float
    communication: Mapping[str, float]
    wire: Mapping[str, float]
    declaration: str
    compiled: Mapping[str, Any] | None = None
    failed: str = ""

    @property
    def total(self) -> float:
        """Bytes alive at once."""
        return self.state + self.batch + self.temp

    @property
    def margin(self) -> float:
        """Bytes left on the device; negative where it does not fit."""
        return self.capacity - self.total

    @property
    def bound(self) -> str:
        """What most of the step is spent on."""
        parts = {"compute": self.compute, "HBM": self.memory}
        parts |= {f"links of {axes}": s for axes, s in self.communication.items()}
        return max(parts, key=lambda name: parts[name])

    def __str__(self) -> str:
        """Returns `fsdp=16, tensor=4, remat=full: 12.0 ms, 1.50 GiB`."""
        sizes = ", ".join(f"{axis}={n}" for axis, n in self.mesh.items() if n > 1) or "one device"
        how = f", accumulate={self.accumulate.steps}" if self.accumulate.steps > 1 else ""
        how += f" ({self.accumulate.reduce})" if self.accumulate.steps > 1 else ""
        how += f", zero={self.zero}" if self.zero else ""
        return (
            f"{sizes}{how}, remat={self.remat}: {self.seconds * 1e3:.4g} ms, "
            f"{format_bytes(self.total)}, bound by {self.bound}"
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """The answer to: which mesh?

    Attributes:
      target: the devices.
      rows: the layouts that fit, fastest first.
      tight: the layouts that are legal and do not fit, fastest first.
      rejected: reason → number of layouts, and an example.
      considered: number of layouts looked at.
      took: seconds that looking took.
      changes: what would change the answer.
      sensitivity: (what, the layout that then wins, its seconds).
      assumptions: what the estimates take for granted.
      problems: what could not be read; with any, estimates are lower bounds.
    """

    target: str
    rows: tuple[Candidate, ...]
    tight: tuple[Candidate, ...]
    rejected: Mapping[str, tuple[int, str]]
    considered: int
    took: float
    changes: tuple[str, ...] = ()
    sensitivity: tuple[tuple[str, str, float], ...] = ()
    assumptions: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def best(self) -> Candidate:
        """The fastest layout that fits."""
        return self.rows[0]

    def pareto(self) -> list[Candidate]:
        """Layouts than which none is both faster and smaller, the fastest first.

        Those that do not fit are among them.
        """
        front: list[Candidate] = []
        for one in sorted((*self.rows, *self.tight), key=lambda c: (c.seconds, c.total)):
            if not front or one.total < front[-1].total:
                front.append(one)
        return front

    def to_json(self) -> str:
        """The plan as JSON."""
        return json.dumps(dataclasses.asdict(self), default=float, indent=1)

    def __str__(self) -> str:
        """A page of text: the shortlist, the declaration to paste, what would change it."""
        rate = self.considered / self.took if self.took else 0.0
        lines = [
            f"{self.considered} layouts on {self.target} in {self.took:.1f} s ({rate:.0f}/s): "
            f"{len(self.rows)} fit, {len(self.tight)} do not. All figures modelled unless marked."
        ]
        for place, one in enumerate(self.rows[:8], 1):
            lines.append(f"{place:3}. {one}")
            if one.compiled:
                lines.append(
                    f"     compiled: {one.compiled['seconds'] * 1e3:.4g} ms by its schedule, "
                    f"{format_bytes(one.compiled['total'])}"
                )
            if one.failed:
                lines.append(f"     not compiled: {one.failed}")
        lines += ["Declaration of the first:", *self.best.declaration.splitlines()]
        if self.changes:
            lines += ["What would change the answer:", *(f"  {text}" for text in self.changes)]
        lines += [f"  {what}: {row}" for what, row, _ in self.sensitivity]
        lines += ["Left out:"] if self.rejected else []
        lines += [f"  {n} for {why}; as {one}" for why, (n, one) in self.rejected.items()]
        lines += [f"  lower bound: {text}" for text in self.problems]
        lines.append(f"Assumed: {'; '.join(self.assumptions)}")
        return "\n".join(lines)
