"""Values by annotation: what a field holds, and how it is read from text.

Only the types that a config uses are known: int, float, bool, str, None, `Literal`, unions of
these, and tuples. A field of any other type is set in a config file, in Python.
"""

import contextlib
import dataclasses
import types
import typing
from typing import Any, Literal, TypeGuard, Union

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_NONES = {"none": None, "null": None}


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
    # str takes any text, so it is tried last: `str | None` reads "none" as None.
    for one in sorted(_members(annotation), key=lambda one: one is str):
        with contextlib.suppress(ValueError, KeyError):
            return _parse_one(one, text)
    raise BadValue(f"expected {describe(annotation)}, got {text!r}.")


def matches(annotation: Any, value: Any) -> bool:
    """Whether a value is of an annotated type; types that `parse` does not know all match.

    >>> matches(int, True), matches(float, 1), matches(str | None, None), matches(int, "1")
    (False, True, True, False)
    """
    return any(_matches_one(one, value) for one in _members(annotation))


def describe(annotation: Any) -> str:
    """Returns the type as an error names it.

    >>> describe(float | None), describe(tuple[float, ...]), describe(Literal["a", "b"])
    ('float or none', 'float,float,...', "'a' or 'b'")
    """
    return " or ".join(map(_describe_one, _members(annotation)))


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union; any other type alone."""
    is_union = typing.get_origin(annotation) in (Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _items(arguments: tuple[Any, ...], n: int) -> tuple[Any, ...]:
    """The types of a tuple's `n` items: `tuple[int, ...]` has as many as there are values."""
    return (arguments[0],) * n if arguments[-1] is Ellipsis else arguments


def _parse_one(annotation: Any, text: str) -> Any:
    """Reads a type that is no union; raises `ValueError` or `KeyError` for a text of another."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    word = text.strip().lower()
    if origin is Literal:
        return {str(one): one for one in arguments}[text]
    if origin is tuple:
        parts = [part.strip() for part in text.strip("()[] ").split(",") if part.strip()]
        pairs = zip(_items(arguments, len(parts)), parts, strict=True)
        return tuple(parse(one, part) for one, part in pairs)
    if annotation in (bool, types.NoneType):
        return (_BOOLS if annotation is bool else _NONES)[word]
    if annotation in (int, float, str):
        return annotation(text)
    raise ValueError


def _matches_one(annotation: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        items = _items(arguments, len(value)) if isinstance(value, tuple) else ()
        return (
            isinstance(value, tuple)
            and len(items) == len(value)
            and all(map(matches, items, value))
        )
    if annotation in (int, float) and isinstance(value, bool):
        return False
    if annotation is float:
        return isinstance(value, int | float)
    if annotation in (int, str, bool, types.NoneType) or is_dataclass_type(annotation):
        return isinstance(value, annotation)
    return True


def _describe_one(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        more = ",..." if arguments[-1] is Ellipsis else ""
        return ",".join(map(describe, _items(arguments, 2))) + more
    names = {types.NoneType: "none", bool: "true or false"}
    return names.get(annotation) or getattr(annotation, "__name__", str(annotation))
