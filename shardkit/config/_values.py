"""Values by annotation: what a field holds, and how it is read from text.

Only the types that a config uses are known: int, float, bool, str, None, `Literal`, unions of
these, and tuples. A field of any other type is set in a config file, in Python.
"""

import dataclasses
import types
import typing
from typing import Any, Literal, TypeGuard, Union

from .._options import describe

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_NONES = ("none", "null")


class BadValue(ValueError):
    """A text or value is not of the annotated type; the message says what was expected."""


def is_dataclass_type(annotation: Any) -> TypeGuard[type[Any]]:
    """Whether an annotation is a dataclass, and so a subtree with fields of its own."""
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def hints(kind: type[Any]) -> dict[str, Any]:
    """Returns `{field: annotation}` of a dataclass, in the order of its fields."""
    known = typing.get_type_hints(kind)
    return {f.name: known[f.name] for f in dataclasses.fields(kind) if f.init}


def parse(annotation: Any, text: str) -> Any:
    """Reads a value of an annotated type.

    Args:
      annotation: type of the field.
      text: what stands behind `=` on the command line.

    Raises:
      BadValue: the text does not read as that type.

    >>> parse(int, "1_000"), parse(float | None, "none"), parse(tuple[float, float], "0.9,0.95")
    (1000, None, (0.9, 0.95))
    """
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _parse_union(annotation, text)
    if origin is Literal:
        return _parse_literal(annotation, text)
    if origin is tuple:
        return _parse_tuple(annotation, text)
    if annotation is types.NoneType and text.strip().lower() in _NONES:
        return None
    if annotation is bool and text.strip().lower() in _BOOLS:
        return _BOOLS[text.strip().lower()]
    if annotation is str:
        return text
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            pass
    raise BadValue(f"expected {describe(annotation)}, got {text!r}.")


def _parse_union(annotation: Any, text: str) -> Any:
    # str takes any text, so it is tried last: `str | None` reads "none" as None.
    for member in sorted(typing.get_args(annotation), key=lambda one: one is str):
        try:
            return parse(member, text)
        except BadValue:
            continue
    raise BadValue(f"expected {describe(annotation)}, got {text!r}.")


def _parse_literal(annotation: Any, text: str) -> Any:
    for one in typing.get_args(annotation):
        if str(one) == text:
            return one
    raise BadValue(f"expected {describe(annotation)}, got {text!r}.")


def _parse_tuple(annotation: Any, text: str) -> tuple[Any, ...]:
    arguments = typing.get_args(annotation)
    parts = [part.strip() for part in text.strip("()[] ").split(",") if part.strip()]
    members = [arguments[0]] * len(parts) if arguments[-1] is Ellipsis else list(arguments)
    if len(parts) != len(members):
        raise BadValue(f"expected {describe(annotation)}, got {text!r}.")
    return tuple(parse(member, part) for member, part in zip(members, parts, strict=True))
