"""Names of a package that are imported when they are first used (PEP 562)."""

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str | None]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Returns a package's `__getattr__`, `__dir__` and `__all__`.

    A type checker does not see through them: beside the call stands a block under `TYPE_CHECKING`
    with the same names as ordinary imports, and a test that holds the two equal.

    Args:
      package: `__name__` of the package.
      homes: for each public name the module that defines it, relative to the package: `"._types"`;
        `"._types:Mean"` where it has another name there; None for a module of the package itself.
    """
    # `plan` of `.plan`: importing the module must not put it in the function's place.
    hidden = {name for name, home in homes.items() if home == f".{name}"}

    class Package(ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            if name not in hidden or not isinstance(value, ModuleType):
                super().__setattr__(name, value)

    module = sys.modules[package]
    if hidden:
        module.__class__ = Package

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        if home is None:
            return importlib.import_module(f".{name}", package)
        where, _, other = home.partition(":")
        value = getattr(importlib.import_module(where, package), other or name)
        setattr(module, name, value)  # the next use does not come here
        return value

    return get, lambda: sorted({*vars(module), *homes}), sorted(homes)
