"""The source of a step, as plain values that a child process can load."""

import dataclasses
import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from .._core.errors import ConfigError, did_you_mean
from ..config import Config, load_config
from ..mesh import MeshSpec
from ..step import StepSpec

_RETURNS = "return sk.StepSpec(loss_fn=..., ..., strategy=...), sk.MeshSpec(data=-1, tensor=4)"


@dataclasses.dataclass(frozen=True)
class StepSource:
    """A config file, or a function of your code, that declares a step."""

    # a path to a config file, `""` for the default config, or `module:function`, where the function
    # returns `(sk.StepSpec, sk.MeshSpec)`, or a spec alone for `shardkit plan`
    name: str = ""
    overrides: tuple[str, ...] = ()  # `path.to.field=value`, for config files
    # keyword arguments of the function, plain JSON values
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_function(self) -> bool:
        """Whether `name` is `module:function`."""
        return ":" in self.name and not self.name.endswith(".py")

    @functools.cached_property
    def config(self) -> Config | None:
        """The config, loaded once; None for a function.

        Raises:
          ConfigError: the file does not exist, or declares none.
        """
        return None if self.is_function else load_config(self.name or None, self.overrides)

    def to_request(self) -> dict[str, Any]:
        """The source as plain values."""
        return {
            "name": self.name,
            "overrides": list(self.overrides),
            "arguments": dict(self.arguments),
        }

    @classmethod
    def from_request(cls, request: Mapping[str, Any]) -> "StepSource":
        """Reads what `to_request` returned."""
        return cls(request["name"], tuple(request["overrides"]), request["arguments"])

    def load(self) -> tuple[StepSpec, MeshSpec | None]:
        """Loads the config, or imports the function and calls it.

        Returns:
          The step, and its mesh if the function returns one.

        Raises:
          ConfigError: the file, module or function does not exist, or returns something else.
        """
        config = self.config
        return (config.step_spec(), config.mesh) if config else self._call()

    def load_with_mesh(self) -> tuple[StepSpec, MeshSpec]:
        """Loads a step that is to be compiled, which takes a mesh.

        Raises:
          ConfigError: as `load` does, or the function returns no mesh.
        """
        spec, mesh = self.load()
        if mesh is None:
            _refuse(self.name, "returned a StepSpec and no mesh to compile it for", _RETURNS)
        return spec, mesh

    def import_function(self) -> Callable[..., Any]:
        """Imports the function from the working folder or the path.

        Raises:
          ConfigError: the module or the function does not exist.
        """
        module_name, _, function = self.name.partition(":")
        if (folder := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, folder)
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and not module_name.startswith(error.name):
                raise
            _refuse(self.name, f"there is no module {module_name!r}", "run where it is importable")
        names = [name for name, value in vars(module).items() if inspect.isroutine(value)]
        if function not in names:
            why = f"{module_name} has no function {function!r}.{did_you_mean(function, names)}"
            close = difflib.get_close_matches(function, names, n=1, cutoff=0.5)
            fix = f"{module_name}:{close[0]}" if close else "def NAME() -> sk.StepSpec, as NAME"
            _refuse(self.name, why, fix)
        return getattr(module, function)

    def _call(self) -> tuple[StepSpec, MeshSpec | None]:
        function, name = self.import_function(), self.name.partition(":")[2]
        try:
            inspect.signature(function).bind(**self.arguments)
        except TypeError as error:
            fix = f"give it a default: def {name}(argument=...): ..."
            _refuse(self.name, f"cannot be called: {error}", fix)
        declared = function(**self.arguments)
        match declared:
            case StepSpec():
                return declared, None
            case (StepSpec() as spec, MeshSpec() as mesh):
                return spec, mesh
            case tuple():
                what = f"({', '.join(type(value).__name__ for value in declared)})"
            case _:
                what = type(declared).__name__
        _refuse(self.name, f"returned {what}", _RETURNS)


def _refuse(name: str, why: str, fix: str) -> NoReturn:
    raise ConfigError.of("The source does not declare a step.", name, why, fix)
