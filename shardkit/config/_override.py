"""`--set path.to.field=value`: one frozen tree becomes another, or one error says why not."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from .._errors import ConfigError, Problem, ShardkitError, count, did_you_mean, raise_all
from .._options import describe, matches
from ..mesh import MeshSpec
from ._named import NAMED
from ._values import BadValue, hints, is_dataclass_type, parse


@dataclasses.dataclass(frozen=True)
class _Wrong:
    """Everything found so far: texts that cannot be read, and values that a group refused."""

    problems: list[Problem] = dataclasses.field(default_factory=list)
    refused: list[ShardkitError] = dataclasses.field(default_factory=list)


_Tree = TypeVar("_Tree")


@dataclasses.dataclass(frozen=True)
class _Assignment:
    """`model.layers=2` as `("model", "layers")` and `"2"`, and as it was written."""

    path: tuple[str, ...]
    text: str
    written: str


def apply_overrides(config: _Tree, assignments: Sequence[str]) -> _Tree:
    """Returns a config with some fields set from text; of two for one field the later wins.

    Args:
      config: a frozen tree of dataclasses.
      assignments: `"path.to.field=value"`. A whole subtree may be set where it has named
        values: `model=llama2-7b`, `strategy=fsdp|tensor`. `mesh.tensor=2` sets an axis.

    Raises:
      ConfigError: an unknown field, a value of another type or a text without `=`; all of
        them in one message.
    """
    wrong = _Wrong()
    parsed = [_split(written, wrong.problems) for written in assignments]
    wanted = [one for one in parsed if one is not None]
    changed = _set(config, wanted, 0, wrong)
    n = count(len(wrong.problems), "override")
    raise_all(ConfigError, f"{n} cannot be applied.", wrong.problems)
    if wrong.refused:
        raise wrong.refused[0]
    return changed


def type_problems(config: Any, where: str = "") -> list[Problem]:
    """Lists the fields of a tree that hold a value of another type than they declare."""
    problems = []
    for name, annotation in hints(type(config)).items():
        value, field = getattr(config, name), f"{where}{name}"
        if not matches(annotation, value):
            why = f"expected {describe(annotation)}, got {value!r}."
            problems.append(Problem(field, why, f"{field} of type {describe(annotation)}"))
        elif dataclasses.is_dataclass(value) and is_dataclass_type(annotation):
            problems += type_problems(value, f"{field}.")
    return problems


def _split(written: str, problems: list[Problem]) -> _Assignment | None:
    path, equals, text = written.partition("=")
    if equals and path.strip():
        return _Assignment(tuple(path.strip().split(".")), text.strip(), written)
    why = "is not of the form path.to.field=value."
    problems.append(Problem(f"--set {written}", why, "--set train.steps=100"))
    return None


def _set(node: Any, wanted: list[_Assignment], depth: int, wrong: _Wrong) -> Any:
    """Sets the fields of one dataclass together, so that it checks itself once, at the end."""
    fields = hints(type(node))
    changes: dict[str, Any] = {}
    deeper: dict[str, list[_Assignment]] = {}
    for one in wanted:
        name = one.path[depth]
        if name not in fields:
            wrong.problems.append(_unknown(one, depth, list(fields)))
        elif len(one.path) > depth + 1:
            deeper.setdefault(name, []).append(one)
        else:
            _read_into(changes, name, fields[name], one, wrong)
    for name, below in deeper.items():
        value = changes.get(name, getattr(node, name))
        changes[name] = _set_below(value, below, depth + 1, wrong)
    return _made(lambda: dataclasses.replace(node, **changes), node, wrong)


def _set_below(value: Any, wanted: list[_Assignment], depth: int, wrong: _Wrong) -> Any:
    if isinstance(value, MeshSpec):
        return _set_axes(value, wanted, depth, wrong)
    if dataclasses.is_dataclass(value):
        return _set(value, wanted, depth, wrong)
    for one in wanted:
        why = f"{'.'.join(one.path[:depth])} is {value!r} and has no fields of its own."
        fix = f"--set {'.'.join(one.path[:depth])}=VALUE"
        wrong.problems.append(Problem(f"--set {one.written}", why, fix))
    return value


def _set_axes(spec: MeshSpec, wanted: list[_Assignment], depth: int, wrong: _Wrong) -> MeshSpec:
    sizes: dict[str, int] = {}
    for one in wanted:
        if one.path[depth] not in spec.axes:
            wrong.problems.append(_unknown(one, depth, list(spec.axes)))
        elif len(one.path) > depth + 1:
            wrong.problems.append(_unknown(one, depth + 1, []))
        else:
            _read_into(sizes, one.path[depth], int, one, wrong)
    return _made(lambda: spec.with_axes(**sizes), spec, wrong)


def _made(make: Callable[[], Any], before: Any, wrong: _Wrong) -> Any:
    """What a group checks itself is told only when every text could be read."""
    try:
        return make()
    except ShardkitError as error:
        wrong.refused.append(error)
        return before


def _read_into(
    changes: dict[str, Any], name: str, annotation: Any, one: _Assignment, wrong: _Wrong
) -> None:
    try:
        changes[name] = _read(annotation, one.text)
    except BadValue as error:
        fix = f"--set {'.'.join(one.path)}=VALUE, where VALUE is {describe(annotation)}"
        wrong.problems.append(Problem(f"--set {one.written}", str(error), fix))
    except ShardkitError as error:  # named values are declarations of their own
        wrong.refused.append(error)


def _read(annotation: Any, text: str) -> Any:
    named: Callable[[str], Any] | None = NAMED.get(annotation)
    if named is not None:
        return named(text)
    if is_dataclass_type(annotation):
        fields = ", ".join(hints(annotation))
        raise BadValue(f"is a group of fields, set one of them: {fields}.")
    return parse(annotation, text)


def _unknown(one: _Assignment, depth: int, fields: list[str]) -> Problem:
    place = ".".join(one.path[:depth]) or "the config"
    if not fields:
        return Problem(f"--set {one.written}", f"{place} has no fields of its own.")
    why = f"{place} has no field {one.path[depth]!r}; it has {', '.join(fields)}."
    return Problem(f"--set {one.written}", why + did_you_mean(one.path[depth], fields))
