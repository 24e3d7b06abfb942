"""One row of a sweep: a case, its status and its figures, as plain values."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .._core.options import describe_annotation, matches_annotation
from .._core.tree import format_bytes
from ..report import MEMORY_CLASSES, AxisTraffic, Report
from ._case import SweepCase

OK, ILLEGAL, FAILED = "ok", "illegal", "failed"
MEMORY, WRONG = "out of memory", "wrong numbers"
"""Status of a case; only `ok` is ranked."""


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """The result of one case, with its figures by origin: compiled, measured, modelled.

    Attributes:
      case: the case.
      status: `ok`, or what went wrong.
      on: target, platform and kind of the devices.
      reason: why it is not ok: the first line of the error, and the first leaf or axis at fault.
      error: the whole message.
      compiled: read from the program: `memory` (bytes per device by class), `axes` (of each mesh
        axis `wire`, what one device sends per step, the `optimizer`'s part of it, the textbook
        `minimum` of the other part and the `ratio` to it), `wire` (all axes), `flops`, `findings`
        by kind, `problems`.
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
        """Reads what `to_line` wrote.

        Raises ValueError for no JSON, KeyError for a missing figure, TypeError for an unknown field
        or a value of another type.
        """
        fields = json.loads(line)
        _check_fields("row", fields, _FIELDS)
        del fields["key"]
        case = fields.pop("case")
        mesh = tuple((axis, size) for axis, size in case.pop("mesh"))
        _check_fields("case.mesh", mesh, tuple[tuple[str, int], ...])
        row = cls(SweepCase(mesh, **case), **fields)
        if row.status == OK:
            _check_fields("compiled", row.compiled, {})
            _check_fields("measured", row.measured, {"compile_seconds": {"whole": float}})
        return row


# What reads rows takes for granted: `NAME?` may be missing, `*` is every other name, `(X,)` is X or
# None.
_TIMES = {"median": float, "low": float, "high": float, "samples": int}
_COMPILED = {
    "memory": {"total": int | None, "*": int | None},
    "axes": {"*": {"wire": float, "ratio": float | None}},
    "wire": int,
    "flops": Mapping[str, float] | None,
    "findings": {"*": {"count": int}},
}
_FIELDS: dict[str, Any] = {
    "key": str,
    "case": {"mesh": Sequence[Sequence[Any]], "accumulate": int, "remat": str},
    "status": Literal["ok", "illegal", "failed", "out of memory", "wrong numbers"],
    "on": {"target?": str, "device_kind?": str},
    "reason": str,
    "error": str,
    "compiled?": (_COMPILED,),
    "measured": {
        "compile_seconds?": {"whole": float},
        "step_seconds?": _TIMES,
        "warm_up_seconds?": float,
        "where?": str,
    },
    "modelled": {
        **dict.fromkeys(("step_seconds?", "memory?", "wire?", "plan_seconds?"), float),
        "not_modelled?": str,
    },
    "verified?": ({"ok": bool | None},),
    "provenance": {"commit?": str | None, "date?": str, "versions?": Mapping[str, str]},
}


def _check_fields(where: str, value: Any, expected: Any) -> None:
    """Compares a value with an annotation, or a mapping with those of its names."""
    if isinstance(expected, tuple):
        return None if value is None else _check_fields(where, value, expected[0])
    if not isinstance(expected, Mapping):
        if not matches_annotation(expected, value):
            raise TypeError(f"{where}={value!r}, expected {describe_annotation(expected)}")
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"{where}={value!r}, expected a mapping")
    known = {name.rstrip("?"): inner for name, inner in expected.items()}
    for name in expected:
        if name != "*" and name not in value and not name.endswith("?"):
            raise KeyError(f"{where}.{name}")
    for name, inner in value.items():
        if name in known or "*" in known:
            _check_fields(f"{where}.{name}", inner, known.get(name, known.get("*")))
    return None


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
        "axes": {traffic.axis: _axis_figures(traffic) for traffic in report.traffic},
        "wire": report.sent,
        "flops": flops
        and {"model": flops.model, "recompute": flops.recompute, "update": flops.update},
        "findings": findings,
        "problems": list(report.problems),
    }


def _axis_figures(traffic: AxisTraffic) -> dict[str, Any]:
    figures = {"kind": traffic.kind or None, "wire": traffic.sent, "optimizer": traffic.optimizer}
    return {**figures, "minimum": traffic.minimum, "ratio": traffic.ratio}


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
