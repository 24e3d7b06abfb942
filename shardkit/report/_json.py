"""Writes a report as JSON of a versioned schema, and reads it back.

Within a version fields may be added, never removed or given another meaning; a reader ignores
fields that it does not know. So every shardkit that reads a version opens each of its reports.
A report of another version is refused: the step is compiled again to get a new one.

Version 2 renamed `memory.extra`, `leaves.meant_whole`, `advice`, fields of `peak`, and findings.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from .._core.errors import ReportError
from .._core.options import matches_annotation
from ._data import ReportData
from ._program import LeafLayout
from .communication._ledger import Ledger, LedgerRow
from .communication._minimum import Minimum
from .findings._finding import Finding
from .memory._memory import Memory
from .memory._peak import LiveBuffer, Peak
from .time._flops import Flops
from .time._timeline import Segment, Timeline

_SCHEMA, _VERSION = "shardkit.report", 2
_FIX = "Save one with report.to_json()."
_T = TypeVar("_T")


def to_json(report: ReportData, indent: int | None = 1) -> str:
    """Returns the report as JSON."""
    fields = dataclasses.asdict(report)
    del fields["ledger"]["mesh"]
    if report.flops:
        by_scope = [[*key, flops] for key, flops in report.flops.by_scope.items()]
        fields["flops"]["by_scope"] = by_scope
    return json.dumps({"schema": _SCHEMA, "version": _VERSION, **fields}, indent=indent)


def from_json(text: str) -> ReportData:
    """Reads the report that `to_json` wrote.

    Raises:
      ReportError: the text is not a report, or has a version that this shardkit cannot read.
    """
    fields = _parse_document(text)
    try:
        return _build(ReportData, _read_fields(fields))
    except ReportError:
        raise
    except KeyError as error:
        raise ReportError(f"This report lacks the field {error.args[0]!r}. {_FIX}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"This report is not as it was written: {error}. {_FIX}") from None


def _read_fields(fields: dict[str, Any]) -> dict[str, Any]:
    mesh = tuple((name, size) for name, size in fields["mesh"])
    ledger, flops = fields["ledger"], fields["flops"]
    timeline, peak = fields.get("timeline"), fields.get("peak")
    if flops is not None:
        by_scope = {(scope, phase): n for scope, phase, n in flops["by_scope"]}
        flops = _build(Flops, {**flops, "by_scope": by_scope})
    if timeline is not None:
        segments = _build_all(Segment, timeline["segments"])
        timeline = _build(Timeline, {**timeline, "segments": segments})
    if peak is not None:
        peak = _build(Peak, {**peak, "largest": _build_all(LiveBuffer, peak["largest"])})
    return fields | {
        "mesh": mesh,
        "ledger": Ledger(_build_all(LedgerRow, ledger["rows"]), mesh, tuple(ledger["problems"])),
        "memory": _build(Memory, fields["memory"]),
        "flops": flops,
        "findings": _build_all(Finding, fields["findings"]),
        "minima": _build_all(Minimum, fields["minima"]),
        "leaves": _build_all(LeafLayout, fields.get("leaves", ())),
        "timeline": timeline,
        "peak": peak,
    }


def _build_all(kind: type[_T], rows: Iterable[Mapping[str, Any]]) -> tuple[_T, ...]:
    return tuple(_build(kind, row) for row in rows)


def _build(kind: type[_T], fields: Mapping[str, Any]) -> _T:
    """Builds a dataclass from JSON, which made lists of its tuples.

    Raises:
      ReportError: a field is missing, or is not the number or the text that it should be.
    """
    return kind(**_known_fields(kind, {k: _to_tuples(value) for k, value in fields.items()}))


_NUMBER = (int, float)
# Annotations of fields that hold one number or text → types of their values.
_PLAIN: dict[Any, tuple[type, ...]] = {
    int: _NUMBER,
    float: _NUMBER,
    str: (str,),
    bool: (bool,),
    int | None: (*_NUMBER, type(None)),
    float | None: (*_NUMBER, type(None)),
}


def _known_fields(kind: type[Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a dataclass's fields; others come from a newer shardkit and are ignored."""
    for field in dataclasses.fields(kind):
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if field.name not in fields and not optional:
            where = "" if kind is ReportData else f" of a {kind.__name__}"
            raise ReportError(f"This report lacks the field {field.name!r}{where}. {_FIX}")
        plain, value = _PLAIN.get(field.type), fields.get(field.name, field.default)
        if not (isinstance(value, plain) if plain else matches_annotation(field.type, value)):
            what = f"{field.name!r} of a {kind.__name__} is {value!r}"
            raise ReportError(f"This report is not as it was written: {what}. {_FIX}")
    return {f.name: fields[f.name] for f in dataclasses.fields(kind) if f.name in fields}


def _to_tuples(value: Any) -> Any:
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value


def _parse_document(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"This is not a report: {error}. {_FIX}") from None
    if not isinstance(fields, dict) or fields.pop("schema", None) != _SCHEMA:
        raise ReportError(f"This is not a report of shardkit. {_FIX}")
    version = fields.pop("version", None)
    if version is None:
        raise ReportError(f"This report lacks the field 'version'. {_FIX}")
    if version != _VERSION:
        why = f"This report has version {version}; this shardkit reads {_VERSION}."
        raise ReportError(f"{why} Compile the step again for a new one.")
    return fields
