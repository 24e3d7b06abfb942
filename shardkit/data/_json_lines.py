"""Examples from JSON lines: chats, prompts with completions, and plain text, one a line."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._core.errors import DataError, Problem, count, raise_all
from .._core.io._files import check_regular, local_path, os_errors_as
from .._core.io._foreign import parse_json

ANSWERS = ("assistant", "completion", "text")
"""Roles whose words count in the loss."""

_KEYS = (("messages",), ("prompt", "completion"), ("text",))
_TOOLS = ("tools", "functions", "documents")
_ROLES = ("system", "user", "assistant")
_SUFFIXES = (".jsonl", ".ndjson", ".json")
_SHOWN = 10
_HEADLINE = "The examples cannot be read."
_FORMS = '{"messages": [{"role": "user", "content": "…"}, …]}, {"prompt": "…", "completion": "…"}'
_FORMS += ' or {"text": "…"}'
_FIX = f"one JSON object a line: {_FORMS}"


@dataclasses.dataclass(frozen=True)
class Turn:
    """A part of an example."""

    role: str  # `system`, `user` or `assistant` of a chat; `prompt` or `completion`; or `text`
    content: str  # the words

    @property
    def is_answer(self) -> bool:
        """Whether its tokens count in the loss."""
        return self.role in ANSWERS


@dataclasses.dataclass(frozen=True)
class Example:
    """One line."""

    where: str  # `file:line`
    turns: tuple[Turn, ...]  # its parts, in order

    @property
    def is_chat(self) -> bool:
        """Whether a template is needed to write it as text."""
        return self.turns[0].role in _ROLES

    @property
    def is_text(self) -> bool:
        """Whether all of it counts in the loss, so that it may be cut anywhere."""
        return self.turns[0].role == "text"


class _BadLineError(ValueError):
    """What is wrong with a line."""


def read_examples(path: str | os.PathLike[str]) -> list[Example]:
    """Reads every example of a file, or of the `.jsonl` files of a folder, in order of names.

    Raises DataError if a file is missing or cannot be read or there is no example, and with the
    first ten lines that are none.
    """
    root = local_path(path, DataError, _HEADLINE)
    examples, problems = list[Example](), list[Problem]()
    for file in _list_files(root):
        for where, line in _read_lines(file):
            try:
                examples.append(Example(where, _parse_line(line)))
            except _BadLineError as error:
                problems.append(Problem(where, str(error)))
    raise_some(_HEADLINE, problems, _FIX)
    if not examples:
        raise DataError.of(_HEADLINE, str(root), "has no example", _FIX)
    return examples


def raise_some(headline: str, problems: Sequence[Problem], fix: str) -> None:
    """Raises a `DataError` with the first ten of some problems, and how many more there are."""
    shown = list(problems[:_SHOWN])
    if len(problems) > _SHOWN:
        more = count(len(problems) - _SHOWN, "more line")
        shown.append(Problem("…", f"and {more} like these"))
    raise_all(DataError, headline, shown, fix)


def _list_files(root: Path) -> list[Path]:
    if not os.path.isdir(root):
        return [root]
    files = sorted(file for file in root.iterdir() if file.suffix in _SUFFIXES)
    if not files:
        why = f"holds no file that ends in {', '.join(_SUFFIXES)}"
        raise DataError.of(_HEADLINE, str(root), why, _FIX)
    return files


def _read_lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yields `(file:line, text)` of the lines that are not empty."""
    fix = "--set data.path=FILE.jsonl, a file that can be read"
    with os_errors_as(DataError, _HEADLINE, file, fix):
        check_regular(file)
        # Lines end at line feeds alone: JSON may hold other separators of Unicode.
        for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
            where = f"{file.name}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                why = f"is not UTF-8: {error.reason}"
                raise DataError.of(_HEADLINE, where, why, _FIX) from None
            if text:
                yield where, text


def _parse_line(line: str) -> tuple[Turn, ...]:
    try:
        values = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise _BadLineError(f"is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise _BadLineError(f"is a {type(values).__name__}, not a JSON object")
    forms = [form for form in _KEYS if any(key in values for key in form)]
    if len(forms) != 1:
        keys = ", ".join(map(repr, values)) or "none"
        wanted = "messages, or prompt and completion, or text"
        raise _BadLineError(f"has the keys {keys}; an example has {wanted}")
    if extra := [key for key in _TOOLS if values.get(key)]:
        raise _BadLineError(f"has {extra[0]!r}, which no template here writes")
    if forms[0] == ("messages",):
        return _parse_messages(values["messages"])
    turns = tuple(Turn(key, _text(values, key, f"{key!r}")) for key in forms[0])
    if not turns[-1].content:
        raise _BadLineError(f"has an empty {turns[-1].role!r}, so nothing to learn")
    return turns


def _parse_messages(messages: Any) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise _BadLineError("has no list of messages")
    turns = []
    for number, message in enumerate(messages):
        what = f"messages[{number}]"
        if not isinstance(message, dict):
            raise _BadLineError(f"{what} is not a JSON object")
        role = message.get("role")
        if role not in _ROLES:
            raise _BadLineError(f"{what} has role {role!r}; known: {', '.join(_ROLES)}")
        if extra := sorted(message.keys() - {"role", "content", "name"}):
            raise _BadLineError(f"{what} has {extra[0]!r}, which no template here writes")
        turns.append(Turn(role, _text(message, "content", f"the content of {what}")))
    answers = [turn for turn in turns if turn.is_answer]
    if not answers or any(not turn.content.strip() for turn in answers):
        found = "an empty answer" if answers else "no words of the assistant"
        raise _BadLineError(f"has {found}, so nothing to learn")
    if any(turn.role == "system" for turn in turns[1:]):
        raise _BadLineError("has a system message that is not the first")
    return tuple(turns)


def _text(values: Mapping[str, Any], key: str, what: str) -> str:
    value = values.get(key)
    if not isinstance(value, str):
        kind = "missing" if key not in values else f"a {type(value).__name__}"
        raise _BadLineError(f"{what} is {kind}, not text")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise _BadLineError(f"{what} has half of a character, which UTF-8 cannot encode")
    return value
