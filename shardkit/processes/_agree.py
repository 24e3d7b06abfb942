"""What several processes say of one run, side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from .._core.errors import Problem, count, format_problems
from .._core.io._table import flatten

_SHOWN = 60


def differences(said: Sequence[Mapping[str, Any]]) -> str:
    """Lists what processes do not agree on, or returns "".

    Args:
      said: `{name: value}` of each process, nested mappings among the values.

    >>> print(differences([{"seed": 0, "jax": "a"}, {"seed": 1, "jax": "a"}, {"seed": 0}]))
    3 processes do not agree on 2 things.
      seed  processes 0, 2: 0; process 1: 1
      jax   processes 0, 1: 'a'; process 2: nothing
    Fix: the same command, files, environment and packages for every process
    """
    flat = [flatten(one) for one in said]
    names = dict.fromkeys(name for one in flat for name in one)
    problems = [
        Problem(name, _told([repr(one[name]) if name in one else "nothing" for one in flat]))
        for name in names
        if any(name not in one or one[name] != flat[0].get(name) for one in flat)
    ]
    if not problems:
        return ""
    headline = f"{len(said)} processes do not agree on {count(len(problems), 'thing')}."
    fix = "the same command, files, environment and packages for every process"
    return format_problems(headline, problems, fix)


def _told(values: Sequence[str]) -> str:
    who: dict[str, list[str]] = {}
    for process, value in enumerate(values):
        who.setdefault(value, []).append(str(process))
    start = _first_difference(list(who))
    return "; ".join(
        f"process{'es' if len(them) > 1 else ''} {', '.join(them)}: {_cut(value, start)}"
        for value, them in who.items()
    )


def _first_difference(values: Sequence[str]) -> int:
    shortest = min(map(len, values))
    return next((i for i in range(shortest) if len({one[i] for one in values}) > 1), shortest)


def _cut(value: str, at: int) -> str:
    """The part of a long value in which it differs from the others."""
    if len(value) <= _SHOWN:
        return value
    start = max(0, at - _SHOWN // 3)
    part = value[start : start + _SHOWN]
    return ("…" if start else "") + part + ("…" if start + _SHOWN < len(value) else "")
