"""Options of public declarations, compared with their annotations where they are declared.

`"False"` is true and `"2"` is no number: an option that is taken as it comes is an error later, or
none and another program. Annotations of plain values are compared: `bool`, numbers, `str`,
literals, unions, tuples and mappings of them; any other annotation is a class that a value must be
of, or means nothing here.
"""

import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from .errors import Problem, ShardkitError, raise_all


def option_problems(prefix: str = "", **options: tuple[Any, Any]) -> list[Problem]:
    """Says of each option that is not of its type what it is, what it should be, and how.

    Args:
      prefix: of the names, in what is said: `"Keep."`.
      **options: `name=(value, annotation)`.

    >>> option_problems(sequence=("no", bool), stage=(1, int))
    [Problem(subject='sequence', why="expected true or false, got 'no'.", fix='sequence=False')]
    """
    return [
        Problem(
            f"{prefix}{name}",
            f"expected {describe_annotation(wanted)}, got {value!r}.",
            f"{name}={_nearest(value, wanted)}",
        )
        for name, (value, wanted) in options.items()
        if not matches_annotation(wanted, tuple(value) if isinstance(value, list) else value)
    ]


def check_options(
    declared: Any, kind: type[ShardkitError], headline: str, prefix: str = ""
) -> None:
    """Compares every field of a dataclass with its annotation.

    Args:
      declared: the dataclass, in its `__post_init__`, before anything else looks at it.
      kind: of the error.
      headline: of the error.
      prefix: of the fields, in what is said.

    Raises:
      ShardkitError: of that kind, with every field that is of another type.
    """
    hints = typing.get_type_hints(type(declared))
    given = {name: (value, hints[name]) for name, value in vars(declared).items() if name in hints}
    raise_all(kind, headline, option_problems(prefix, **given))


def matches_annotation(annotation: Any, value: Any) -> bool:
    """Whether a value is of an annotated type; annotations of other things all match.

    >>> matches(int, True), matches(float, 1), matches(str | None, None), matches(int, "1")
    (False, True, True, False)
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(matches_annotation(one, value) for one in arguments)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and _items_match(arguments, value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            all(map(matches_annotation, arguments, item)) for item in value.items()
        )
    if annotation in (int, float):
        number = numbers.Integral if annotation is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return not isinstance(annotation, type) or isinstance(value, annotation)


def _items_match(arguments: tuple[Any, ...], value: tuple[Any, ...]) -> bool:
    if arguments[-1] is Ellipsis:
        return all(matches_annotation(arguments[0], one) for one in value)
    return len(arguments) == len(value) and all(map(matches_annotation, arguments, value))


def describe_annotation(annotation: Any) -> str:
    """Returns the type as an error names it.

    >>> describe(float | None), describe(tuple[float, ...]), describe(Literal["a", "b"])
    ('float or none', 'float,float,...', "'a' or 'b'")
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_annotation(one) for one in arguments)
    if origin is Literal:
        return " or ".join(repr(one) for one in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"{describe_annotation(arguments[0])},{describe_annotation(arguments[0])},..."
    if origin is tuple:
        return ",".join(describe_annotation(one) for one in arguments)
    if origin is Mapping:
        return (
            f"mapping of {describe_annotation(arguments[0])} to {describe_annotation(arguments[1])}"
        )
    names = {types.NoneType: "none", bool: "true or false"}
    return names.get(annotation) or getattr(annotation, "__name__", str(annotation))


def _nearest(value: Any, wanted: Any) -> str:
    """Code of a value of the type, that which a text spells where it does."""
    origin, of = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return _nearest(value, of[0])
    if origin is Literal:
        return repr(of[0])
    if origin is tuple:
        found = value if isinstance(value, tuple | list) and value else (value,)
        return f"({', '.join(_nearest(one, of[0]) for one in found)},)"
    text = str(value).strip().lower()
    if wanted is bool:
        return str(text not in ("", "0", "0.0", "no", "off", "false", "none"))
    if wanted in (int, float):
        try:
            return str(wanted(float(text)))
        except (ValueError, OverflowError):
            return "1" if wanted is int else "0.1"
    return repr(str(value)) if wanted is str else f"{getattr(wanted, '__name__', wanted)}(...)"
