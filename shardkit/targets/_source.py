"""Where a child process finds the step that it is to compile."""

import dataclasses
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from .._core.errors import ConfigError, Problem, did_you_mean, format_problems
from ..config import load_config
from ..mesh import MeshSpec
from ..step import StepSpec

_RETURNS = "return sk.StepSpec(loss_fn=..., ..., strategy=...), sk.MeshSpec(data=-1, tensor=4)"


@dataclasses.dataclass(frozen=True)
class StepSource:
    """A config file, or a function of research code, that declares a step.

    Attributes:
      name: a path to a config file, `""` for the default config, or `module:function`, where the
        function returns `(sk.StepSpec, sk.MeshSpec)`, or a spec alone for `shardkit plan`.
      overrides: `path.to.field=value`, for config files.
      arguments: what the function is called with by name, plain JSON values; nothing by default.
    """

    name: str = ""
    overrides: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_function(self) -> bool:
        """Whether `name` is `module:function`."""
        return ":" in self.name and not self.name.endswith(".py")

    def to_request(self) -> dict[str, Any]:
        """Plain values from which the child makes the same source."""
        return {
            "name": self.name,
            "overrides": list(self.overrides),
            "arguments": dict(self.arguments),
        }

    @classmethod
    def from_request(cls, request: Mapping[str, Any]) -> "Source":
        """The source that `to_request` described."""
        return cls(request["name"], tuple(request["overrides"]), request["arguments"])

    def load(self) -> tuple[StepSpec, MeshSpec | None]:
        """Loads the config, or imports the function and calls it.

        Returns:
          The step, and the mesh that it is to be compiled for, if the function gives one.

        Raises:
          ConfigError: there is no such file, module or function, or it returns something else.
        """
        return self._call() if self.is_function else self._config()

    def load_with_mesh(self) -> tuple[StepSpec, MeshSpec]:
        """The same for a step that is compiled, which takes a mesh.

        Raises:
          ConfigError: as `load` does, or the function gives no mesh.
        """
        spec, mesh = self.load()
        if mesh is None:
            _refuse(self.name, "returned a StepSpec and no mesh to compile it for", _RETURNS)
        return spec, mesh

    def _config(self) -> tuple[StepSpec, MeshSpec]:
        config = load_config(self.name or None, list(self.overrides))
        return config.step_spec(), config.mesh

    def imported(self) -> Callable[..., Any]:
        """Returns the function that is named, imported from the working folder or the path.

        Raises:
          ConfigError: there is no such module, or no such function in it.
        """
        module_name, _, function = self.name.partition(":")
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)
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
        function, called = self.name.partition(":")[2], self.imported()
        try:
            inspect.signature(called).bind(**self.arguments)
        except TypeError as error:
            fix = f"give it a default: def {function}(argument=...): ..."
            _refuse(self.name, f"cannot be called: {error}", fix)
        made = called(**self.arguments)
        match made:
            case StepSpec():
                return made, None
            case (StepSpec() as spec, MeshSpec() as mesh):
                return spec, mesh
            case tuple():
                what = f"({', '.join(type(one).__name__ for one in made)})"
            case _:
                what = type(made).__name__
        _refuse(self.name, f"returned {what}", _RETURNS)


def _refuse(name: str, why: str, fix: str) -> NoReturn:
    raise ConfigError(format_problems("There is nothing to compile.", [Problem(name, why)], fix))
