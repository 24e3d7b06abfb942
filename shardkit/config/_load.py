"""A config file: Python with `def config() -> sk.Config`."""

import difflib
import importlib.util
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .._core.errors import (
    ConfigError,
    Problem,
    ShardkitError,
    did_you_mean,
    format_problems,
    raise_all,
)
from ._override import apply_overrides, type_problems
from ._tree import Config
from ._values import hints, is_dataclass_type

_UNEXPECTED = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Loads a config and applies overrides.

    Args:
      path: a Python file with `def config() -> sk.Config`; None for `Config()`.
      overrides: `"path.to.field=value"`, as `--set` takes them.

    Raises:
      ConfigError: there is no such file, it fails, it returns something else, a field holds a
        value of another type, or an override cannot be applied.
    """
    config = Config() if path is None else _call(Path(path))
    problems = type_problems(config)
    raise_all(ConfigError, f"{path} sets fields to values of other types.", problems)
    return apply_overrides(config, overrides)


def _call(path: Path) -> Config:
    module = _import(path)
    if not callable(getattr(module, "config", None)):
        problem = Problem(str(path), "defines no function config().", _EXAMPLE)
        raise ConfigError(format_problems("This is not a config file.", [problem]))
    made = _guarded(path, module.config)
    if not isinstance(made, Config):
        why = f"config() returned {type(made).__name__}, not sk.Config."
        problem = Problem(str(path), why, _EXAMPLE)
        raise ConfigError(format_problems("This is not a config file.", [problem]))
    return made


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(format_problems("There is no such config.", [_missing(path)]))
    name = f"shardkit_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    loader = spec.loader if spec else None
    if spec is None or loader is None:
        problem = Problem(str(path), "is not a Python file (.py).", _EXAMPLE)
        raise ConfigError(format_problems("This is not a config file.", [problem]))
    module = importlib.util.module_from_spec(spec)
    # Dataclasses of the file look their module up while they are being made.
    sys.modules[name] = module
    _guarded(path, lambda: loader.exec_module(module))
    return module


def _missing(path: Path) -> Problem:
    folders = dict.fromkeys((path.parent, Path("configs")))
    near = [str(found) for folder in folders for found in sorted(folder.glob("*.py"))]
    close = difflib.get_close_matches(path.stem, [Path(one).stem for one in near], n=1)
    hint = next((f" Did you mean {one!r}?" for one in near if Path(one).stem in close), "")
    fix = f"one of {', '.join(near)}" if near else "leave CONFIG out to train the default"
    return Problem(str(path), f"there is no such file.{hint}", fix)


def _guarded(path: Path, call: Any) -> Any:
    """Calls into a user's file; what it raises is told in one line, with the line it is in."""
    try:
        return call()
    except ShardkitError as error:
        error.add_note(f"(in {_place(path, error)})")
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {_told(error)}"
        problem = Problem(_place(path, error), why)
        raise ConfigError(format_problems("The config file fails.", [problem])) from error


def _place(path: Path, error: Exception) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _told(error: Exception) -> str:
    """What an error says; of an unknown field also which ones there are."""
    text = str(error)
    match = _UNEXPECTED.search(text)
    fields = _dataclass_fields(match[1]) if match else []
    if not match or not fields:
        return text
    # Python 3.13 suggests a name of its own behind its message.
    return f"{text[: match.end()]}; it has {', '.join(fields)}.{did_you_mean(match[2], fields)}"


_EXAMPLE = "def config() -> sk.Config: return sk.Config(...)"


def _dataclass_fields(name: str) -> list[str]:
    """Returns the fields of a config's dataclass by class name, or nothing for another class."""
    kinds: list[type[Any]] = [Config]
    for kind in kinds:
        if kind.__name__ == name:
            return list(hints(kind))
        kinds += [one for one in hints(kind).values() if is_dataclass_type(one)]
    return []
