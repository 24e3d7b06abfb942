"""`--set path.to.field=value`: returns a changed config, or one error with every problem."""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from .._core.errors import ConfigError, Problem, ShardkitError, count, did_you_mean, raise_all
from .._core.options import describe_annotation, matches_annotation
from ..mesh import MeshSpec
from ._named import NAMED
from ._values import BadValue, hints, is_dataclass_type, parse

_Tree = TypeVar("_Tree")


@dataclasses.dataclass(frozen=True)
class _Assignment:
    """`model.num_layers=2` as path `("model", "num_layers")`, text `"2"`, and as written."""

    path: tuple[str, ...]
    text: str
    written: str


def apply_overrides(config: _Tree, assignments: Sequence[str]) -> _Tree:
    """Returns a config with fields set from text; for the same field the last one wins.

    Args:
      config: a frozen tree of dataclasses.
      assignments: `"path.to.field=value"`. Model, strategy and mesh also have short forms:
        `model=llama2-7b`, `strategy=fsdp|tensor`, `mesh=data=2`. `mesh.tensor=2` sets an axis.

    Raises:
      ConfigError: unknown fields, values of another type, texts without `=`; all of them in one
        message.
    """
    overrides = _Overrides()
    changed = overrides.set_fields(config, overrides.split(assignments), 0)
    n = count(len(overrides.problems), "override")
    raise_all(ConfigError, f"{n} cannot be applied.", overrides.problems)
    if overrides.refused:
        raise overrides.refused[0]
    return changed


def type_problems(config: Any, where: str = "") -> list[Problem]:
    """Lists the fields of a tree whose value is not of the declared type."""
    problems = []
    for name, annotation in hints(type(config)).items():
        value, field = getattr(config, name), f"{where}{name}"
        if not matches_annotation(annotation, value):
            why = f"expected {describe_annotation(annotation)}, got {value!r}."
            problems.append(
                Problem(field, why, f"{field} of type {describe_annotation(annotation)}")
            )
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(Problem(field, f"is {value}.", f"{field}=0.1, a finite number"))
        elif is_dataclass_type(type(value)) and _is_group(annotation):
            problems += type_problems(value, f"{field}.")
    return problems


def _is_group(annotation: Any) -> bool:
    """Whether an annotation is a group of fields, or one of several such groups."""
    return all(map(is_dataclass_type, typing.get_args(annotation) or (annotation,)))


@dataclasses.dataclass(frozen=True)
class _Overrides:
    """Sets fields from text, and collects the problems."""

    problems: list[Problem] = dataclasses.field(default_factory=list)  # texts that cannot be parsed
    # errors of the checks of groups and short forms. They are reported only if every text could be
    # parsed, since a missing value alone can make a group fail its check.
    refused: list[ShardkitError] = dataclasses.field(default_factory=list)

    def split(self, assignments: Sequence[str]) -> list[_Assignment]:
        parts = []
        for written in assignments:
            path, equals, text = written.partition("=")
            if equals and path.strip():
                parts.append(_Assignment(tuple(path.strip().split(".")), text.strip(), written))
            else:
                why = "is not of the form path.to.field=value."
                self.problems.append(Problem(f"--set {written}", why, "--set train.steps=100"))
        return parts

    def set_fields(self, node: Any, wanted: list[_Assignment], depth: int) -> Any:
        """Sets all fields of a group at once, so that it checks itself only in its final state."""
        fields, rebuild = _fields(node)
        changes: dict[str, Any] = {}
        deeper: dict[str, list[_Assignment]] = {}
        for assignment in wanted:
            name = assignment.path[depth]
            if name not in fields:
                self.problems.append(_describe_unknown(assignment, depth, node, list(fields)))
            elif len(assignment.path) > depth + 1:
                deeper.setdefault(name, []).append(assignment)
            else:
                self._parse_field(changes, assignment, fields[name][0])
        for name, below in deeper.items():
            value = changes.get(name, fields[name][1])
            changes[name] = self.set_fields(value, below, depth + 1)
        try:
            return rebuild(**changes)
        except ShardkitError as error:
            self.refused.append(error)
            return node

    def _parse_field(
        self, changes: dict[str, Any], assignment: _Assignment, annotation: Any
    ) -> None:
        try:
            changes[assignment.path[-1]] = _parse(annotation, assignment.text)
        except BadValue as error:
            kind = describe_annotation(annotation)
            fix = f"--set {'.'.join(assignment.path)}=VALUE, where VALUE is {kind}"
            self.problems.append(Problem(f"--set {assignment.written}", str(error), fix))
        except ShardkitError as error:  # short forms make declarations, which check themselves
            self.refused.append(error)


def _fields(node: Any) -> tuple[dict[str, tuple[Any, Any]], Callable[..., Any]]:
    """Returns `{field: (type, value)}` of a group, and a function that makes a changed group."""
    if isinstance(node, MeshSpec):
        return {axis: (int, size) for axis, size in node.axes.items()}, node.with_axes
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return {}, lambda: node
    # Rules make their fields of other arguments, so no text can set one.
    made_of_fields: bool = vars(type(node))["__dataclass_params__"].init
    if not made_of_fields:
        return {}, lambda: node
    fields = {name: (kind, getattr(node, name)) for name, kind in hints(type(node)).items()}
    return fields, functools.partial(dataclasses.replace, node)


def _parse(annotation: Any, text: str) -> Any:
    named: Callable[[str], Any] | None = NAMED.get(annotation)
    if named is not None:
        return named(text)
    if is_dataclass_type(annotation):
        fields = ", ".join(hints(annotation))
        raise BadValue(f"is a group of fields, set one of them: {fields}.")
    return parse(annotation, text)


def _describe_unknown(assignment: _Assignment, depth: int, node: Any, fields: list[str]) -> Problem:
    place = ".".join(assignment.path[:depth]) or "the config"
    subject, name = f"--set {assignment.written}", assignment.path[depth]
    if not fields:
        why = f"{place} is {node!r} which has no fields."
        return Problem(subject, why, f"--set {place}=VALUE")
    why = f"{place} has no field {name!r}; it has {', '.join(fields)}.{did_you_mean(name, fields)}"
    return Problem(subject, why)
