"""Checks options of public declarations against their annotations when they are declared.

Unchecked, `sequence="False"` would be true and `stage="2"` an error far from its cause. Annotations
of plain values are compared: `bool`, numbers, `str`, literals, unions, tuples, sequences and
mappings of them, functions and paths. A class matches its instances; any other annotation matches
everything. Numbers and bools of NumPy are taken; a bool is no number.
"""

import json
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from .errors import Problem, ShardkitError, raise_all


def option_problems(prefix: str = "", **options: tuple[Any, Any]) -> list[Problem]:
    """Returns one problem per option `name=(value, annotation)` whose value does not match.

    The prefix comes before each name in the message: `"RetentionPolicy."`.

    >>> option_problems(sequence=("no", bool), stage=(1, int))
    [Problem(subject='sequence', why="expected true or false, got 'no'.", fix='sequence=False')]
    """
    return [
        Problem(
            f"{prefix}{name}",
            f"expected {describe_annotation(annotation)}, got {_shorten(repr(value))}.",
            f"{name}={_suggest_value(value, annotation)}",
        )
        for name, (value, annotation) in options.items()
        if not matches_annotation(annotation, tuple(value) if isinstance(value, list) else value)
    ]


def _shorten(text: str, width: int = 200) -> str:
    """The first line of a text, cut at a width: arrays have thousands."""
    line = text.partition("\n")[0][:width]
    return line if line == text else f"{line} ..."


def check_arguments(
    kind: type[ShardkitError], headline: str, prefix: str = "", **options: tuple[Any, Any]
) -> None:
    """Raises an error of type `kind` with every option whose value does not match its annotation.

    Options are `name=(value, annotation)`. The prefix comes before each name in the message.
    """
    raise_all(kind, headline, option_problems(prefix, **options))


def copy_plain(kind: type[ShardkitError], headline: str, **values: Any) -> dict[str, Any]:
    """Returns values as JSON reads them back: names are texts, tuples are lists.

    Raises an error of type `kind` with every value that a file would not give back: an array, a
    NaN, or two names that are the same as texts.

    >>> copy_plain(ShardkitError, "", data={1: (2, 3)})
    {'data': {'1': [2, 3]}}
    """
    copies, problems = {}, []
    for name, value in values.items():
        try:
            text = json.dumps(value, indent=1, allow_nan=False)
            copies[name] = json.loads(text)
            why = "has two names that are the same as texts"
            unchanged = json.dumps(copies[name], indent=1) == text
        except (TypeError, ValueError, RecursionError) as error:
            why, unchanged = f"cannot be written as JSON: {error}", False
        if not unchanged:
            problems.append(
                Problem(name, why, f"{name}= of texts, finite numbers, lists and dicts")
            )
    raise_all(kind, headline, problems)
    return copies


def check_options(
    declared: Any, kind: type[ShardkitError], headline: str, prefix: str = ""
) -> None:
    """Raises an error of type `kind` with every field of a dataclass that its annotation excludes.

    It is called at the start of `__post_init__`. The prefix comes before each field's name.
    """
    hints = typing.get_type_hints(type(declared))
    options = {
        name: (value, hints[name]) for name, value in vars(declared).items() if name in hints
    }
    raise_all(kind, headline, option_problems(prefix, **options))


def matches_annotation(annotation: Any, value: Any) -> bool:
    """Whether a value matches an annotation; see the module for what is compared.

    >>> matches_annotation(int, True), matches_annotation(float, 1), matches_annotation(int, "1")
    (False, True, False)
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
    if origin is Sequence:
        is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
        return is_sequence and all(matches_annotation(arguments[0], one) for one in value)
    if origin is Iterable:
        return isinstance(value, Iterable)
    if origin is Callable:
        return callable(value)
    if origin is os.PathLike:
        return isinstance(value, os.PathLike)
    if annotation is bool:
        return isinstance(value, bool | np.bool_)
    if annotation in (int, float):
        number = numbers.Integral if annotation is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if annotation is Any or not isinstance(annotation, type):
        return True
    return isinstance(value, annotation)


def _items_match(arguments: tuple[Any, ...], value: tuple[Any, ...]) -> bool:
    if arguments[-1] is Ellipsis:
        return all(matches_annotation(arguments[0], one) for one in value)
    return len(arguments) == len(value) and all(map(matches_annotation, arguments, value))


def describe_annotation(annotation: Any) -> str:
    """Returns the type as an error names it.

    >>> describe_annotation(float | None), describe_annotation(Literal["a", "b"])
    ('float or none', "'a' or 'b'")
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
    if origin is Sequence:
        return f"a sequence of {describe_annotation(arguments[0])}"
    if origin in (Callable, os.PathLike):
        return "a function" if origin is Callable else "a path"
    if origin is Iterable:
        return "an iterable"
    names = {types.NoneType: "none", bool: "true or false"}
    return names.get(annotation) or getattr(annotation, "__name__", str(annotation))


def _suggest_value(value: Any, annotation: Any) -> str:
    """Code of a value that matches: what a text spells, as `2` for `"2"`, or an example."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _suggest_value(value, arguments[0])
    if origin is Literal:
        return repr(arguments[0])
    if origin in (tuple, Sequence):
        items = value if isinstance(value, tuple | list) and value else (value,)
        return f"({', '.join(_suggest_value(item, arguments[0]) for item in items)},)"
    if origin is Mapping and isinstance(value, list | tuple):
        return "dict(...) of these pairs"
    if origin is Mapping:
        key, item = (_suggest_value("NAME" if one is str else 1, one) for one in arguments)
        return f"{{{key}: {item}}}"
    if origin in (Callable, os.PathLike):
        return "lambda *args: ..." if origin is Callable else '"folder"'
    text = str(value).strip().lower()
    if annotation is bool:
        return str(text not in ("", "0", "0.0", "no", "off", "false", "none"))
    if annotation in (int, float):
        try:
            return str(annotation(float(text)))
        except (ValueError, OverflowError):
            return "1" if annotation is int else "0.1"
    if annotation is str:
        return repr(str(value))
    return f"{getattr(annotation, '__name__', annotation)}(...)"
