"""Parses the value of a field from text by its annotation.

The types that a config uses are known: int, float, bool, str, None, `Literal`, unions of these,
and tuples. Fields of other types are set in a config file, in Python.
"""

import contextlib
import dataclasses
import math
import types
import typing
from typing import Any, Literal, TypeGuard, Union

from .._core.options import describe_annotation

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_NONES = {"none": None, "null": None}
# No number of a run is infinite, or larger than JSON and devices count.
_LARGEST = {int: 2**63, float: math.inf}


class BadValue(ValueError):
    """A text is not of the annotated type; the message says what was expected."""


def is_dataclass_type(annotation: Any) -> TypeGuard[type[Any]]:
    """Whether an annotation is a dataclass, and so a subtree with fields of its own."""
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def hints(cls: type[Any]) -> dict[str, Any]:
    """Returns `{field: annotation}` of a dataclass, in the order of its fields."""
    annotations = typing.get_type_hints(cls)
    return {f.name: annotations[f.name] for f in dataclasses.fields(cls) if f.init}


def parse(annotation: Any, text: str) -> Any:
    """Parses what follows `=` on the command line as an annotated type, or raises BadValue.

    >>> parse(int, "1_000"), parse(float | None, "none"), parse(tuple[float, float], "0.9,0.95")
    (1000, None, (0.9, 0.95))
    """
    # str takes any text, so it is tried last: `str | None` reads "none" as None.
    for member in sorted(_members(annotation), key=lambda member: member is str):
        with contextlib.suppress(ValueError, KeyError):
            return _parse_member(member, text)
    raise BadValue(f"expected {describe_annotation(annotation)}, got {text!r}.")


def _members(annotation: Any) -> tuple[Any, ...]:
    """Returns the types of a union; for any other type itself."""
    is_union = typing.get_origin(annotation) in (Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _parse_member(annotation: Any, text: str) -> Any:
    """Parses a type that is not a union; raises `ValueError` or `KeyError` for other text."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    word = text.strip().lower()
    if origin is Literal:
        return {str(value): value for value in arguments}[text]
    if origin is tuple:
        parts = [part.strip() for part in text.strip("()[] ").split(",") if part.strip()]
        items = arguments[:1] * len(parts) if arguments[-1] is Ellipsis else arguments
        return tuple(parse(item, part) for item, part in zip(items, parts, strict=True))
    if annotation in (bool, types.NoneType):
        return (_BOOLS if annotation is bool else _NONES)[word]
    if annotation is str:
        return text
    if annotation in (int, float) and text.isascii():
        value = annotation(text)
        if abs(value) < _LARGEST[annotation]:  # false for nan
            return value
    raise ValueError
