"""How functions of users can be called, read before they are."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import count


def call_problem(
    function: Callable[..., Any], names: Sequence[str], options: Mapping[str, Any] | None = None
) -> str:
    """Says why a function cannot be called with some arguments; nothing if it can.

    Arguments are by position; `options` are keywords.

    >>> call_problem(lambda params, batch: 0, ("params", "batch", "key"))
    'is <lambda>(params, batch), called with 3 arguments: too many positional arguments'
    >>> call_problem(lambda x: x, ("x",), {"train": True})
    "is <lambda>(x), called with 1 argument and train: got an unexpected keyword argument 'train'"
    """
    try:
        if isinstance(function, type):  # whose metaclass may say that it takes anything
            signature = inspect.signature(functools.partial(function.__init__, None))
        else:
            # A wrapper can take other arguments than the function that it names as its own.
            signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):  # a function of C has none
        return ""
    try:
        signature.bind(*names, **(options or {}))
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        parameters = ", ".join(map(_describe, signature.parameters.values()))
        given = " and ".join((count(len(names), "argument"), *(options or ())))
        return f"is {name}({parameters}), called with {given}: {error}"
    return ""


def _describe(parameter: inspect.Parameter) -> str:
    """A parameter without its type, which can be long, and the value of its default."""
    empty = inspect.Parameter.empty
    name = str(parameter.replace(annotation=empty, default=empty))
    return name if parameter.default is empty else f"{name}=..."
