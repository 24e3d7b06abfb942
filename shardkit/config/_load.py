"""Loads config files: Python with `def config() -> sk.Config`."""

import difflib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Sequence
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
from .._core.io._files import local_path
from ._override import apply_overrides, type_problems
from ._tree import Config
from ._values import hints, is_dataclass_type

_UNEXPECTED = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Loads a config and applies overrides.

    Args:
      path: a Python file with `def config() -> sk.Config`, or the name of a shipped one, such as
        `nano`; None for `Config()`.
      overrides: `"path.to.field=value"`, as `--set` takes them.

    Raises:
      ConfigError: the file does not exist, raises or returns something else; a field has a
        value of another type; or an override cannot be applied.
    """
    config = (
        Config() if path is None else _run_file(_find_file(local_path(path, ConfigError, _NO_FILE)))
    )
    problems = type_problems(config)
    raise_all(ConfigError, f"{path} sets fields to values of other types.", problems)
    return apply_overrides(config, overrides)


def _shipped_folders() -> list[Path]:
    """Returns the folder of shipped configs: in the wheel inside the package, else beside it."""
    package = Path(__file__).parents[1]
    checkout = [package.parent] if (package.parent / "pyproject.toml").is_file() else []
    return [folder / "configs" for folder in (package, *checkout)]


def shipped_configs() -> list[Path]:
    """Returns the files of the shipped configs, by name: `context.py`, `default.py`, …."""
    return next(found for folder in _shipped_folders() if (found := sorted(folder.glob("*.py"))))


def _find_file(path: Path) -> Path:
    """Returns the shipped config that a bare name means; any other path unchanged."""
    if path.suffix or len(path.parts) != 1:
        return path
    return next((file for file in shipped_configs() if file.stem == path.name), path)


def _run_file(path: Path) -> Config:
    module = _import(path)
    if not callable(getattr(module, "config", None)):
        why = "defines no function config()."
        raise ConfigError.of("This is not a config file.", str(path), why, _EXAMPLE)
    config = _call_user(path, module.config)
    if not isinstance(config, Config):
        why = f"config() returned {type(config).__name__}, not sk.Config."
        raise ConfigError.of("This is not a config file.", str(path), why, _EXAMPLE)
    return config


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(format_problems(_NO_FILE, [_describe_missing(path)]))
    name = f"shardkit_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    loader = spec.loader if spec else None
    if spec is None or loader is None:
        why = "is not a Python file (.py)."
        raise ConfigError.of("This is not a config file.", str(path), why, _EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses in the file look up their module when they are defined.
    sys.modules[name] = module
    _call_user(path, lambda: loader.exec_module(module))
    return module


def _describe_missing(path: Path) -> Problem:
    folders = dict.fromkeys((path.parent, Path("configs")))
    near = [str(file) for folder in folders for file in sorted(folder.glob("*.py"))]
    if not path.suffix:  # a name, not a file of this folder
        near = [file.stem for folder in _shipped_folders() for file in sorted(folder.glob("*.py"))]
    close = difflib.get_close_matches(path.stem, [Path(file).stem for file in near], n=1)
    hint = next((f" Did you mean {file!r}?" for file in near if Path(file).stem in close), "")
    fix = f"one of {', '.join(near)}" if near else "leave CONFIG out to train the default"
    return Problem(str(path), f"there is no such file.{hint}", fix)


def _call_user(path: Path, call: Callable[[], Any]) -> Any:
    """Calls code of a user's file; reports what it raises in one line, with its line number."""
    try:
        return call()
    except ShardkitError as error:
        error.add_note(f"(in {_locate(path, error)})")
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {_describe_error(error)}"
        raise ConfigError.of("The config file fails.", _locate(path, error), why) from error


def _locate(path: Path, error: Exception) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _describe_error(error: Exception) -> str:
    """Returns the message of an error; for an unknown field also the known ones."""
    text = str(error)
    match = _UNEXPECTED.search(text)
    fields = _dataclass_fields(match[1]) if match else []
    if not match or not fields:
        return text
    # Python 3.13 appends a suggestion of its own, which is cut off.
    return f"{text[: match.end()]}; it has {', '.join(fields)}.{did_you_mean(match[2], fields)}"


_NO_FILE = "There is no such config."
_EXAMPLE = "def config() -> sk.Config: return sk.Config(...)"


def _dataclass_fields(name: str) -> list[str]:
    """Returns the fields of a dataclass in `Config` by class name; none for another class."""
    classes: list[type[Any]] = [Config]
    for cls in classes:
        if cls.__name__ == name:
            return list(hints(cls))
        classes += [field for field in hints(cls).values() if is_dataclass_type(field)]
    return []
