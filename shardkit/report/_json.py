"""Writes a report as JSON of a versioned schema, and reads it back.

Within a version fields may be added, never removed or given another meaning; a reader ignores
fields that it does not know. So every shardkit that reads a version opens each of its reports.
A report of another version is refused: the step is compiled again to get a new one.

Version 2 renamed `memory.extra`, `leaves.meant_whole`, `advice`, fields of `peak`, and findings.
"""

import collections.abc
import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from .._core.errors import ReportError
from .._core.io._palette import axis_colors
from ._by_source import group_by_source
from ._data import ReportData

_SCHEMA, _VERSION = "shardkit.report", 2
_FIX = "Save one with report.to_json()."
_PLAIN = {int: int | float, float: int | float, str: str, bool: bool}


def to_json(report: ReportData, indent: int | None = 1) -> str:
    """Returns the report as JSON."""
    fields = dataclasses.asdict(report)
    del fields["ledger"]["mesh"]
    for row, written in zip(report.ledger, fields["ledger"]["rows"], strict=True):
        written["source"] = row.source and dataclasses.asdict(row.source)
    if report.flops:
        by_scope = [[*key, flops] for key, flops in report.flops.by_scope.items()]
        fields["flops"]["by_scope"] = by_scope
    if report.timeline:
        blocks = [dataclasses.asdict(block) for block in report.timeline.blocks()]
        fields["timeline"]["blocks"] = blocks
    # Derived figures, for readers of the file; `from_json` computes them again.
    traffic = report.traffic
    fields |= {"sent": report.sent, "traffic": [vars(axis) for axis in traffic]}
    fields["by_source"] = [
        {
            "name": cost.name,
            "code": cost.code,
            "bytes": cost.bytes,
            "in_findings": cost.in_findings,
            "parts": list(cost.part_cells()),
        }
        for cost in group_by_source(report.ledger, report.findings)
    ]
    fields["colors"] = axis_colors(axis.axis for axis in traffic)
    return json.dumps({"schema": _SCHEMA, "version": _VERSION, **fields}, indent=indent)


def from_json(text: str) -> ReportData:
    """Reads the report that `to_json` wrote.

    Raises:
      ReportError: the text is not a report, or has a version that this shardkit cannot read.
    """
    fields = _parse_document(text)
    try:
        fields["ledger"] = {**fields["ledger"], "mesh": fields["mesh"]}
        report = _reader(ReportData)(fields)
        if any(size < 1 for _, size in report.mesh):
            raise ReportError(f"The mesh of this report has an axis without devices. {_FIX}")
        unknown = {axis for row in report.ledger for axis in row.axes} - {*dict(report.mesh)}
        if unknown:
            raise ReportError(f"The mesh of this report has no {', '.join(unknown)}. {_FIX}")
        return report
    except ReportError:
        raise
    except KeyError as error:
        raise ReportError(f"This report lacks the field {error.args[0]!r}. {_FIX}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"This report is not as it was written: {error}. {_FIX}") from None


class _OtherTypeError(ValueError):
    """A value is not the number or the text that it should be."""


def _reader(annotation: Any) -> Callable[[Any], Any]:
    """Returns a function that makes a value of an annotated type from JSON, which knows no tuples.

    Keys of a mapping that are tuples are written as lists with the value behind: `[*key, value]`.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        hints, fields = typing.get_type_hints(annotation), dataclasses.fields(annotation)
        readers = {field.name: _reader(hints[field.name]) for field in fields}
        return functools.partial(_build, annotation, readers)
    if origin is types.UnionType:
        (member,) = (_reader(one) for one in arguments if one is not types.NoneType)
        return lambda value: None if value is None else member(value)
    if origin is tuple and arguments[-1] is Ellipsis:
        item = _reader(arguments[0])
        return lambda value: tuple(map(item, value))
    if origin is tuple:
        items = [_reader(one) for one in arguments]
        return lambda value: tuple(read(x) for read, x in zip(items, value, strict=True))
    if origin is collections.abc.Mapping:
        key, item = map(_reader, arguments)
        if typing.get_origin(arguments[0]) is tuple:
            return lambda value: {key(name): item(x) for *name, x in value}
        return lambda value: {key(name): item(x) for name, x in value.items()}
    return functools.partial(_check_plain, _PLAIN[annotation])


def _check_plain(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind) or (isinstance(value, float) and not math.isfinite(value)):
        raise _OtherTypeError
    return value


def _build(
    kind: type[Any], readers: Mapping[str, Callable[[Any], Any]], fields: Mapping[str, Any]
) -> Any:
    """Makes a dataclass of fields, or raises ReportError; ignores those of a newer shardkit."""
    values = {}
    for field in dataclasses.fields(kind):
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if field.name in fields:
            try:
                values[field.name] = readers[field.name](fields[field.name])
            except _OtherTypeError:
                what = f"{field.name!r} of a {kind.__name__} is {fields[field.name]!r}"
                message = f"This report is not as it was written: {what}. {_FIX}"
                raise ReportError(message) from None
        elif not optional:
            where = "" if kind is ReportData else f" of a {kind.__name__}"
            raise ReportError(f"This report lacks the field {field.name!r}{where}. {_FIX}")
    return kind(**values)


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
