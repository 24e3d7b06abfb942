"""One row of a sweep: a case, its status and its figures, as plain values."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from .._core.tree import format_bytes
from ..report import MEMORY_CLASSES, Report
from ._case import SweepCase

OK, ILLEGAL, FAILED = "ok", "illegal", "failed"
MEMORY, WRONG = "out of memory", "wrong numbers"
STATUSES = (OK, WRONG, MEMORY, ILLEGAL, FAILED)
"""Status of a case; only `ok` is ranked."""


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """The result of one case, with its figures by origin: compiled, measured, modelled.

    Attributes:
      case: the case.
      status: one of `STATUSES`.
      on: target, platform and kind of the devices.
      reason: why it is not ok: the first line of the error, and the first leaf or axis at fault.
      error: the whole message.
      compiled: read from the program: `memory` (bytes per device by class), `axes` (wire bytes per
        device and step of each mesh axis, its textbook minimum and their ratio), `wire` (all
        axes), `flops`, `findings` by kind, `problems`.
      measured: `compile_seconds`; if the step was timed `step_seconds` (median, low and high
        quartile, samples), `warm_up_seconds` and `where`.
      modelled: `step_seconds` of the timeline, if links and peaks of the devices are known; and
        the estimate of a plan before compiling: `memory` (bytes per device), `wire` (bytes sent),
        `axes` (the same by mesh axes), `plan_seconds`, or why there is none, `not_modelled`.
      verified: whether the numbers match one device, and the check nearest to its limit.
      provenance: commit, date and versions.
    """

    case: SweepCase
    status: str
    on: Mapping[str, Any]
    reason: str = ""
    error: str = ""
    compiled: Mapping[str, Any] | None = None
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    modelled: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    verified: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        """Measured median of the step."""
        timed = self.measured.get("step_seconds")
        return timed["median"] if timed else None

    @property
    def total(self) -> int | None:
        """Compiled bytes per device."""
        return self.compiled["memory"]["total"] if self.compiled else None

    @property
    def wire(self) -> int | None:
        """Compiled wire bytes per device and step."""
        return self.compiled["wire"] if self.compiled else None

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps({"key": self.case.key, **dataclasses.asdict(self)})

    @classmethod
    def from_line(cls, line: str) -> "SweepRow":
        """Reads what `to_line` wrote."""
        fields = json.loads(line)
        del fields["key"]
        case = fields.pop("case")
        mesh = tuple((axis, size) for axis, size in case.pop("mesh"))
        return cls(case=SweepCase(mesh, **case), **fields)


def compiled_figures(report: Report) -> dict[str, Any]:
    """Figures of a report, as the plain values of `SweepRow.compiled`."""
    memory, flops = report.memory, report.flops
    findings: dict[str, dict[str, int]] = {}
    for finding in report.findings:
        counted = findings.setdefault(finding.kind, {"count": 0, "bytes": 0})
        counted["count"] += 1
        counted["bytes"] += finding.bytes
    return {
        "memory": {name: getattr(memory, name) for name in (*MEMORY_CLASSES, "total", "capacity")},
        "axes": {axis: _axis_figures(report, axis) for axis, _ in report.mesh},
        "wire": report.ledger.total(),
        "flops": flops
        and {"model": flops.model, "recompute": flops.recompute, "update": flops.update},
        "findings": findings,
        "problems": list(report.problems),
    }


def _axis_figures(report: Report, axis: str) -> dict[str, Any]:
    """Bytes sent over an axis: its share of collectives over several axes, if a minimum is known.

    Without a minimum all bytes of every collective that spans the axis.
    """
    for least in report.minima:
        if least.axis == axis:
            figures = {"kind": least.kind, "wire": least.wire, "minimum": least.bytes}
            return {**figures, "ratio": least.ratio}
    return {"kind": None, "wire": report.ledger.total(axis), "minimum": None, "ratio": None}


def modelled_figures(report: Report) -> dict[str, Any]:
    """The timeline's step, as the plain values of `SweepRow.modelled`."""
    line = report.timeline
    if line is None:
        return {}
    return {"step_seconds": line.high, "low_seconds": line.low, "source": line.source}


def describe_shortage(report: Report) -> str:
    """Why a step does not fit its device; "" if it fits or the capacity is unknown."""
    memory = report.memory
    if memory.fits is not False or memory.total is None or memory.capacity is None:
        return ""
    needs, has = format_bytes(memory.total), format_bytes(memory.capacity)
    return f"needs {needs} on a device, which has {has}"
