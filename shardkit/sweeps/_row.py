"""One row of a sweep: a case and what became of it, as plain values."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from .._core.tree import format_bytes
from ..report import Report
from ._case import SweepCase

OK, ILLEGAL, FAILED = "ok", "illegal", "failed"
MEMORY, WRONG = "out of memory", "wrong numbers"
STATUSES = (OK, WRONG, MEMORY, ILLEGAL, FAILED)
"""What may become of a case; only `ok` is ranked."""

MEMORY_CLASSES = (
    "params",
    "opt_state",
    "model_state",
    "batch",
    "rest",
    "padding",
    "output",
    "temp",
)
"""Classes of bytes per device, in the order in which they are shown."""


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """What became of one case. Figures stand under the word that says where they are from.

    Attributes:
      case: what was tried.
      status: one of `STATUSES`.
      on: target, platform and kind of the devices, and whether they are simulated.
      reason: why it is not ok: the first line of the error, and the first leaf or axis at fault.
      error: the whole message.
      compiled: read from the program: `memory` (bytes per device by class), `axes` (wire bytes per
        device and step of each mesh axis, its textbook minimum and their ratio), `wire` (all
        axes), `flops`, `findings` by kind, `problems`.
      measured: `compile_seconds`; where the step was timed `step_seconds` (median, low and high
        quartile, samples), `warm_up_seconds` and `where`.
      modelled: `step_seconds` of the timeline, where the devices' links and peaks are known; and
        what a plan would say before compiling: `memory` (bytes per device), `wire` (bytes sent),
        `axes` (the same by mesh axes), `plan_seconds`, or why it says nothing, `not_modelled`.
      verified: whether the numbers are those of one device, and the check nearest to its limit.
      circumstances: commit, date and versions.
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
    circumstances: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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
    def from_line(cls, line: str) -> "Row":
        """Reads what `to_line` wrote."""
        fields = json.loads(line)
        del fields["key"]
        case = fields.pop("case")
        mesh = tuple((axis, size) for axis, size in case.pop("mesh"))
        return cls(case=SweepCase(mesh, **case), **fields)


def compiled_figures(report: Report) -> dict[str, Any]:
    """What a report says, as the plain values of `Row.compiled`."""
    memory, flops = report.memory, report.flops
    kinds = dict.fromkeys(one.kind for one in report.findings)
    return {
        "memory": {name: getattr(memory, name) for name in (*MEMORY_CLASSES, "total", "capacity")},
        "axes": {axis: _axis_figures(report, axis) for axis, _ in report.mesh},
        "wire": report.ledger.total(),
        "flops": flops
        and {"model": flops.model, "recompute": flops.recompute, "update": flops.update},
        "findings": {
            kind: {
                "count": sum(one.kind == kind for one in report.findings),
                "bytes": sum(one.bytes for one in report.findings if one.kind == kind),
            }
            for kind in kinds
        },
        "problems": list(report.problems),
    }


def _axis_figures(report: Report, axis: str) -> dict[str, Any]:
    """What is sent over an axis: its share of collectives over several, where a minimum is known.

    Without one the whole bytes of every collective that spans the axis.
    """
    for one in report.minima:
        if one.axis == axis:
            found = {"kind": one.kind, "wire": one.wire, "minimum": one.bytes}
            return {**found, "ratio": one.ratio}
    return {"kind": None, "wire": report.ledger.total(axis), "minimum": None, "ratio": None}


def modelled_figures(report: Report) -> dict[str, Any]:
    """The timeline's step, as the plain values of `Row.modelled`."""
    line = report.timeline
    if line is None:
        return {}
    return {"step_seconds": line.high, "low_seconds": line.low, "source": line.source}


def describe_shortage(report: Report) -> str:
    """What is missing where a step does not fit its device; "" where it fits or nobody knows."""
    memory = report.memory
    if memory.fits is not False or memory.total is None or memory.capacity is None:
        return ""
    needs, has = format_bytes(memory.total), format_bytes(memory.capacity)
    return f"needs {needs} on a device, which has {has}"
