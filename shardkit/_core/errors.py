"""Errors that list every failure of a declaration at once, each with its fix.

A message has five parts: what failed; which leaf; which rule or field and which mesh; the
nearest legal alternatives; a fix as code. A `Problem` is one row of it; `raise_all` prints
every row under one headline, so that ten mistakes do not take ten runs.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from typing import Self


class ShardkitError(ValueError):
    """Base of every error that a user's declaration, config or data can cause.

    Control characters in its message are escaped: names come from files of others.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))

    @classmethod
    def of(cls, headline: str, subject: str, why: str, fix: str = "") -> Self:
        """Returns the error of a single problem; see `Problem`."""
        return cls(format_problems(headline, [Problem(subject, why, fix)]))


class Stopped(Exception):
    """A run stopped on request (SIGTERM), with a checkpoint, and can be resumed."""


class MeshError(ShardkitError):
    """A mesh cannot be declared or built: sizes, axis names or devices do not fit."""


class ShardingError(ShardkitError):
    """Leaves cannot be laid out on a mesh by the rules."""


class TreeError(ShardkitError):
    """Two leaves of a pytree have the same path."""


class BatchError(ShardkitError):
    """A batch does not have the shape, dtype or rows that the step was compiled for."""


class StateError(ShardkitError):
    """A train state was donated to an earlier step, or belongs to another one."""


class StepError(ShardkitError):
    """A loss, optimizer or option does not form a training step."""


class VerificationError(ShardkitError):
    """A step differs from a single device, or cannot be compared with one."""


class ConfigError(ShardkitError):
    """A config file or a command line override cannot be used."""


class DataError(ShardkitError):
    """A data source is missing, empty or too small."""


class CheckpointError(ShardkitError):
    """A checkpoint cannot be written, found, or restored into the requested state."""


class CheckpointCorruptedError(CheckpointError):
    """The files of a checkpoint differ from what was written."""


class ReportError(ShardkitError):
    """A report lacks the requested axis, kind or chip, or a file is not a report."""


class RetraceWarning(UserWarning):
    """A batch has another shape or dtype than the declared one, and the step compiles again."""


class SavedStepWarning(UserWarning):
    """A saved step is of another program, version or machine, or is damaged, and compiles again."""


class SweepError(ShardkitError):
    """A sweep has no cases, or its folder holds something else."""


class BudgetError(ShardkitError):
    """A compiled step exceeds what a budget allows."""


class ProcessError(ShardkitError):
    """Several processes cannot run as one: they differ, or cannot be started."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row of an error: what is wrong, why, and how to fix it."""

    subject: str  # the leaf (path and `f32[8,4]`), axis, field or file at fault
    why: str  # the rule or field, the mesh, and the numbers that do not fit
    fix: str = ""  # code that fixes it, or "" if `raise_all` gets a common fix


def format_problems(headline: str, problems: Sequence[Problem], fix: str = "") -> str:
    """Formats a headline, one aligned row per problem, and the distinct fixes."""
    width = min(48, max((len(printable(p.subject)) for p in problems), default=0))
    rows = [f"  {printable(p.subject):<{width}}  {printable(p.why)}" for p in problems]
    fixes = list(dict.fromkeys([p.fix for p in problems if p.fix] + ([fix] if fix else [])))
    lines = [headline, *rows]
    if len(fixes) == 1:
        lines.append(f"Fix: {fixes[0]}")
    elif fixes:
        lines += ["Fix:", *(f"  - {fix}" for fix in fixes)]
    return "\n".join(lines)


def printable(text: str) -> str:
    r"""Returns text with control characters escaped, which could command a terminal.

    >>> print(printable("\x1b[2Jw"))
    \x1b[2Jw
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def raise_all(
    kind: type[ShardkitError], headline: str, problems: Sequence[Problem], fix: str = ""
) -> None:
    """Raises `kind` with every problem in one message; does nothing when there is none."""
    if problems:
        raise kind(format_problems(headline, problems, fix))


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; the name of its type if it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Returns `" Did you mean 'tensor'?"` for the closest option, or `""`.

    >>> did_you_mean("tensr", ["data", "tensor"]), did_you_mean("keep", ["steps", "max_to_keep"])
    (" Did you mean 'tensor'?", " Did you mean 'max_to_keep'?")
    >>> did_you_mean("tensor", ["mlp", "norm"])
    ''
    """
    known = list(options)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.65)
    close = close or [name for name in known if len(word) > 2 and word in name]
    return f" Did you mean {close[0]!r}?" if close else ""


def count(n: int, noun: str) -> str:
    """Returns `"1 leaf"`, `"2 leaves"`, `"3 axes"`: a number with its noun.

    >>> count(2, "parameter"), count(1, "leaf"), count(3, "logical axis")
    ('2 parameters', '1 leaf', '3 logical axes')
    """
    *before, last = noun.split(" ")
    plural = {"leaf": "leaves", "axis": "axes", "mesh": "meshes"}.get(last, last + "s")
    return f"{n} {noun if n == 1 else ' '.join([*before, plural])}"
