"""Where a child process finds the declaration that it is to compile."""

import dataclasses
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from .._errors import ConfigError, Problem, did_you_mean, format_problems
from ..config import load_config
from ..lm import declare_run
from ..mesh import MeshSpec
from ..step import Declaration


@dataclasses.dataclass(frozen=True)
class Source:
    """A config file, or a function of research code, that declares a step.

    Attributes:
      name: a path to a config file, `""` for the default config, or `module:function`, where the
        function returns an `sk.Declaration` whose mesh is a `MeshSpec`.
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

    def load(self) -> Declaration:
        """Loads the config, or imports the function and calls it.

        Raises:
          ConfigError: there is no such file, module or function, or it returns something else.
        """
        return self._call() if self.is_function else self._config()

    def _config(self) -> Declaration:
        config = load_config(self.name or None, list(self.overrides))
        optimizer = config.optimizer.build(config.train.steps)
        made = declare_run(config.model, config.data, config.mesh, config.strategy, optimizer)
        return dataclasses.replace(made, **config.compile.arguments)

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
            fix = f"{module_name}:{close[0]}" if close else "def NAME() -> sk.Declaration, as NAME"
            _refuse(self.name, why, fix)
        return getattr(module, function)

    def _call(self) -> Declaration:
        function, called = self.name.partition(":")[2], self.imported()
        try:
            inspect.signature(called).bind(**self.arguments)
        except TypeError as error:
            fix = f"give it a default: def {function}(argument=...) -> sk.Declaration"
            _refuse(self.name, f"cannot be called: {error}", fix)
        made = called(**self.arguments)
        if not isinstance(made, Declaration) or not isinstance(made.mesh, MeshSpec):
            what = type(made).__name__
            if isinstance(made, Declaration):
                what = f"a Declaration whose mesh is a {type(made.mesh).__name__}"
            fix = "return sk.Declaration(loss_fn=..., optimizer=..., init=..., batch=...,"
            _refuse(self.name, f"returned {what}", f"{fix} mesh=sk.MeshSpec(...), strategy=...)")
        return made


def _refuse(name: str, why: str, fix: str) -> NoReturn:
    raise ConfigError(format_problems("There is nothing to compile.", [Problem(name, why)], fix))
