"""Compares the facts that several processes give about one run."""

from collections.abc import Mapping, Sequence
from typing import Any

from .._core.errors import Problem, count, format_problems
from .._core.io._table import flatten

_SHOWN = 60


def differences(facts: Sequence[Mapping[str, Any]]) -> str:
    """Returns a message that lists the facts, of each process, that differ, or "".

    Values may be nested.

    >>> print(differences([{"seed": 0, "jax": "a"}, {"seed": 1, "jax": "a"}, {"seed": 0}]))
    3 processes do not agree on 2 values.
      seed  processes 0, 2: 0; process 1: 1
      jax   processes 0, 1: 'a'; process 2: nothing
    Fix: the same command, files, environment and packages for every process
    """
    flat = [flatten(values) for values in facts]
    names = dict.fromkeys(name for values in flat for name in values)
    problems = [
        Problem(
            name,
            _group_by_value(
                [repr(values[name]) if name in values else "nothing" for values in flat]
            ),
        )
        for name in names
        if any(name not in values or values[name] != flat[0].get(name) for values in flat)
    ]
    if not problems:
        return ""
    headline = f"{len(facts)} processes do not agree on {count(len(problems), 'value')}."
    fix = "the same command, files, environment and packages for every process"
    return format_problems(headline, problems, fix)


def _group_by_value(values: Sequence[str]) -> str:
    """Returns `processes 0, 2: 0; process 1: 1` for the values "0", "1" and "0"."""
    processes: dict[str, list[str]] = {}
    for process, value in enumerate(values):
        processes.setdefault(value, []).append(str(process))
    start = _first_difference(list(processes))
    return "; ".join(
        f"process{'es' if len(numbers) > 1 else ''} {', '.join(numbers)}: {_shorten(value, start)}"
        for value, numbers in processes.items()
    )


def _first_difference(values: Sequence[str]) -> int:
    shortest = min(map(len, values))
    return next((i for i in range(shortest) if len({value[i] for value in values}) > 1), shortest)


def _shorten(value: str, at: int) -> str:
    """Returns the part of a long value around index `at`, where it differs from the others."""
    if len(value) <= _SHOWN:
        return value
    start = max(0, at - _SHOWN // 3)
    part = value[start : start + _SHOWN]
    return ("…" if start else "") + part + ("…" if start + _SHOWN < len(value) else "")
