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

from ._errors import Problem, ShardkitError, raise_all


def option_problems(prefix: str = "", **options: tuple[Any, Any]) -> list[Problem]:
    """Says of each option that is not of its type what it is, what it should be, and how.

    Args:
      prefix: of the names, in what is said: `"Keep."`.
      **options: `name=(value, annotation)`.

    >>> option_problems(sequence=("no", bool), stage=(1, int))
    [Problem(subject="sequence='no'", why='is of type str, not bool', fix='sequence=False')]
    """
    return [
        Problem(
            f"{prefix}{name}={value!r}",
            f"is {_kind(value)}, not {_said(wanted)}",
            f"{name}={_nearest(value, wanted)}",
        )
        for name, (value, wanted) in options.items()
        if not _fits(value, wanted)
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


def _fits(value: Any, wanted: Any) -> bool:
    origin, of = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in of)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in of)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        each = [of[0]] * len(value) if of[-1] is Ellipsis else of
        return len(each) == len(value) and all(map(_fits, value, each))
    if origin is Mapping or origin is dict:
        return isinstance(value, Mapping) and all(
            _fits(key, of[0]) and _fits(one, of[1]) for key, one in value.items()
        )
    if wanted in (int, float):
        number = numbers.Integral if wanted is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return not isinstance(wanted, type) or isinstance(value, wanted)


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list) and value:
        return f"of {', '.join(dict.fromkeys(type(one).__name__ for one in value))}"
    return f"of type {type(value).__name__}"


def _said(wanted: Any) -> str:
    """`bool`, `int or None`, `'once' or 'each'`, `tuple of int`."""
    origin, of = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_said, of))
    if origin is Literal:
        return " or ".join(map(repr, of))
    if origin is tuple:
        inner = of[:1] if of[-1] is Ellipsis else of
        return f"a tuple of {', '.join(map(_said, inner))}"
    if origin is Mapping or origin is dict:
        return f"a mapping of {_said(of[0])} to {_said(of[1])}"
    return "None" if wanted is type(None) else getattr(wanted, "__name__", str(wanted))


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
