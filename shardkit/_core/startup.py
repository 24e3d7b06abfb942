"""What runs before JAX is imported: the system, lazy names of packages, a quiet TPU library."""

import glob
import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

# libtpu asks the cloud for these, and off the cloud prints a stack of errors whenever JAX lists its
# devices. With them it finds no TPU silently. Compiling for an absent topology does not read them.
_LIBTPU_ANSWERS = {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}


def check_platform() -> None:
    """Refuses a system that shardkit does not run on.

    Raises:
      ImportError: on Windows, whose processes have no groups, and whose files and sockets differ.
    """
    if sys.platform == "win32":
        raise ImportError(
            "shardkit does not run on Windows: it needs process groups and POSIX file locks. "
            "Use it in WSL 2 (wsl --install), where JAX supports GPUs too."
        )


def quiet_libtpu(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns variables that keep libtpu quiet in a process with this environment.

    {} if a TPU may be present, or the environment has one of the variables. They must be set before
    JAX lists its devices, which loads libtpu.
    """
    if any(name in environment for name in _LIBTPU_ANSWERS) or glob.glob("/dev/accel*"):
        return {}
    return {} if glob.glob("/dev/vfio/[0-9]*") else dict(_LIBTPU_ANSWERS)


def lazy_names(
    package: str, homes: Mapping[str, str | None]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Returns `__getattr__`, `__dir__`, `__all__` of a package that imports on first use (PEP 562).

    Type checkers cannot follow them, so each caller also lists the names as ordinary imports under
    `TYPE_CHECKING`; a test keeps the two equal.

    Args:
      package: `__name__` of the package.
      homes: for public names, between spaces, the module that defines them, relative to the
        package: `"._types"`; `"._types:Mean"` if one has another name there; None for submodules.
    """
    homes = {name: home for names, home in homes.items() for name in names.split()}
    # `plan` from `.plan`: importing the module must not replace the function by the module.
    shadowed = {name for name, home in homes.items() if home == f".{name}"}

    class Package(ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            if name not in shadowed or not isinstance(value, ModuleType):
                super().__setattr__(name, value)

    module = sys.modules[package]
    if shadowed:
        module.__class__ = Package

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        if home is None:
            return importlib.import_module(f".{name}", package)
        module_name, _, name_there = home.partition(":")
        value = getattr(importlib.import_module(module_name, package), name_there or name)
        setattr(module, name, value)  # so that the next use does not call this
        return value

    return get, lambda: sorted({*vars(module), *homes}), sorted(homes)
