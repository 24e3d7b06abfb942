"""Every field of a config as a row: its value, its type, its default, and what set it."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from .._core.options import describe_annotation
from .._core.precision import AS_INITIALIZED
from ..mesh import MeshSpec
from ..parallel import Strategy
from ._load import load_config
from ._tree import Config
from ._values import hints, is_dataclass_type

# Fields whose texts their own checks compare, with what these allow. Other fields of a strategy are
# rules, which its short form makes.
_ALLOWED = {
    "model.attention": "auto, blocked, xla, cudnn or splash",
    "strategy.accumulate": "int",
    "strategy.remat": "none, full, dots, dots_no_batch or save:NAME,NAME",
    "strategy.precision": "float32, bfloat16 or pure_bfloat16",
    "train.loggers": "tensorboard,wandb",
    "train.check": "first, off or every N",
    "train.resume": "auto, never or the folder of a run",
    "compile.mode": "auto or shard_map",
}


@dataclasses.dataclass(frozen=True)
class FieldRow:
    """One field of a config."""

    path: str  # as `--set` takes it: `train.steps`
    value: str  # as text
    kind: str  # its type, or its allowed values
    default: str  # that of `Config()`, as text
    origin: str  # `default`, the config file, or `--set`


def describe_fields(path: str | None = None, overrides: Sequence[str] = ()) -> list[FieldRow]:
    """Lists every field of a config that text can set.

    Args:
      path: as `load_config` takes it.
      overrides: `"path.to.field=value"`.

    Returns:
      One row per field, in the order of the tree.

    Raises:
      ConfigError: as `load_config` raises it.

    >>> rows = {row.path: row for row in describe_fields(overrides=["train.steps=7"])}
    >>> row = rows["train.steps"]
    >>> row.value, row.kind, row.default, row.origin
    ('7', 'int', '400', '--set')
    """
    default = {name: text for name, _, text in _walk(Config())}
    in_file = {name: text for name, _, text in _walk(load_config(path))}
    written = {assignment.partition("=")[0].strip() for assignment in overrides}

    def origin(name: str, value: str) -> str:
        if any(name == one or name.startswith(f"{one}.") for one in written):
            return "--set"
        if value != in_file.get(name):  # the short form of a group sets its fields
            return "--set"
        return "default" if value == default.get(name) else str(path)

    return [
        FieldRow(name, value, kind, default.get(name, ""), origin(name, value))
        for name, kind, value in _walk(load_config(path, overrides))
    ]


def _walk(node: Any, where: str = "") -> Iterator[tuple[str, str, str]]:
    """Yields `(path, type, value)` of each field."""
    for name, annotation in hints(type(node)).items():
        value, path = getattr(node, name), f"{where}{name}"
        if isinstance(value, MeshSpec):
            for axis, size in value.axes.items():
                yield f"{path}.{axis}", "int", str(size)
        elif isinstance(value, Strategy):
            yield path, "strategies joined by |", " | ".join(map(str, value.kinds)) or "replicated"
            for field in ("accumulate", "remat", "precision"):
                text = format_value(getattr(value, field))
                yield f"{path}.{field}", _ALLOWED[f"{path}.{field}"], text
        elif is_dataclass_type(type(value)):
            yield from _walk(value, f"{path}.")
        else:
            kind = _ALLOWED.get(path) or describe_annotation(annotation)
            yield path, kind.replace("'", ""), format_value(value)


def format_value(value: Any) -> str:
    """A value as `--set` takes it.

    >>> format_value(None), format_value((0.9, 0.95)), format_value(True)
    ('none', '0.9,0.95', 'true')
    """
    if isinstance(value, tuple):
        return ",".join(map(format_value, value))
    if value == AS_INITIALIZED:
        return "as init gives them"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)
