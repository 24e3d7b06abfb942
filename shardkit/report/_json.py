"""Writes a report as JSON of a versioned schema, and reads it back.

Within a version fields may be added, never removed or given another meaning: what a reader does
not know it passes over. So a report opens in every shardkit that reads its version.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .._core.errors import ReportError
from .communication._ledger import Ledger, Row
from .communication._minimum import Minimum
from .findings._findings import Finding
from .memory._layouts import Layout
from .memory._memory import Memory
from .memory._peak import Held, Peak
from .time._flops import Flops
from .time._timeline import Segment, Timeline

if TYPE_CHECKING:
    from ._report import Report

_SCHEMA, _VERSION = "shardkit.report", 1
_FIX = "Save one with report.to_json()."


def write(report: "Report", indent: int | None = 1) -> str:
    """Returns the report as JSON."""
    flops = None
    if report.flops:
        scopes = [[*key, n] for key, n in report.flops.by_scope.items()]
        flops = {**_plain(report.flops), "by_scope": scopes}
    ledger = {"rows": [_plain(row) for row in report.ledger], "problems": report.ledger.problems}
    fields = _plain(report) | {
        "ledger": ledger,
        "memory": _plain(report.memory),
        "flops": flops,
        "findings": [_plain(finding) for finding in report.findings],
        "minima": [_plain(one) for one in report.minima],
        "reductions": dict(report.reductions),
        "seconds": dict(report.seconds),
        "leaves": [_plain(leaf) for leaf in report.leaves],
        "timeline": dataclasses.asdict(report.timeline) if report.timeline else None,
        "peak": dataclasses.asdict(report.peak) if report.peak else None,
    }
    return json.dumps({"schema": _SCHEMA, "version": _VERSION, **fields}, indent=indent)


def read(text: str) -> dict[str, Any]:
    """Returns the fields of the `Report` that `write` wrote.

    Raises:
      ReportError: the text is no report, or of a version that this shardkit cannot read.
    """
    fields = _opened(text)
    try:
        return _read(fields)
    except ReportError:
        raise
    except KeyError as error:
        raise ReportError(f"This report lacks the field {error.args[0]!r}. {_FIX}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"This report is not as it was written: {error}. {_FIX}") from None


def _read(fields: dict[str, Any]) -> dict[str, Any]:
    mesh = tuple((name, size) for name, size in fields["mesh"])
    ledger, flops = fields["ledger"], fields["flops"]
    rows = tuple(made(Row, row) for row in ledger["rows"])
    if flops is not None:
        by_scope = {(scope, phase): n for scope, phase, n in flops["by_scope"]}
        flops = made(Flops, {**flops, "by_scope": by_scope})
    timeline, peak = fields.get("timeline"), fields.get("peak")
    return fields | {
        "mesh": mesh,
        "ledger": Ledger(rows, mesh, tuple(ledger["problems"])),
        "memory": made(Memory, fields["memory"]),
        "flops": flops,
        "findings": tuple(made(Finding, one) for one in fields["findings"]),
        "minima": tuple(made(Minimum, one) for one in fields["minima"]),
        "advice": tuple(fields["advice"]),
        # Reports of the same version were written before these were part of them.
        "leaves": tuple(made(Layout, one) for one in fields.get("leaves", ())),
        "timeline": _timeline(timeline) if timeline else None,
        "peak": _peak(peak) if peak else None,
    }


def _timeline(fields: Mapping[str, Any]) -> Timeline:
    segments = [_known(Segment, one) for one in fields["segments"]]
    return Timeline.from_plain({**_known(Timeline, fields), "segments": segments})


def _peak(fields: Mapping[str, Any]) -> Peak:
    held = tuple(made(Held, one) for one in fields["held"])
    return made(Peak, {**fields, "held": held})


def _plain(one: Any) -> dict[str, Any]:
    return {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}


def made(kind: type[Any], fields: Mapping[str, Any]) -> Any:
    """Builds a dataclass from JSON, whose lists were tuples.

    Raises:
      ReportError: a field is missing, or a number or a text is none.
    """
    return kind(**{name: _frozen(value) for name, value in _known(kind, fields).items()})


_NUMBER = (int, float)
# Fields that hold one number or text, by how they are annotated.
_PLAIN: dict[Any, tuple[type, ...]] = {
    int: _NUMBER,
    float: _NUMBER,
    str: (str,),
    bool: (bool,),
    int | None: (*_NUMBER, type(None)),
    float | None: (*_NUMBER, type(None)),
}


def _known(kind: type[Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a dataclass has; others are of a newer shardkit."""
    for field in dataclasses.fields(kind):
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if field.name not in fields and not optional:
            where = "" if kind.__name__ == "Report" else f" of a {kind.__name__}"
            raise ReportError(f"This report lacks the field {field.name!r}{where}. {_FIX}")
        plain, value = _PLAIN.get(field.type), fields.get(field.name, field.default)
        if plain and not isinstance(value, plain):
            what = f"{field.name!r} of a {kind.__name__} is {value!r}"
            raise ReportError(f"This report is not as it was written: {what}. {_FIX}")
    return {f.name: fields[f.name] for f in dataclasses.fields(kind) if f.name in fields}


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _opened(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ReportError(f"This is no report: {error}. Save one with report.to_json().") from None
    if not isinstance(fields, dict) or fields.pop("schema", None) != _SCHEMA:
        raise ReportError("This is no report of shardkit. Save one with report.to_json().")
    version = fields.pop("version", None)
    if version is None:
        raise ReportError(f"This report lacks the field 'version'. {_FIX}")
    if version != _VERSION:
        raise ReportError(f"This report has version {version}; this shardkit reads {_VERSION}.")
    return fields
