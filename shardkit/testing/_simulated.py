"""A function in a child process that has its own simulated devices."""

import concurrent.futures
import importlib.util
import inspect
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax

from .._core.errors import MeshError, Problem, format_problems
from ..mesh import simulate_devices


def simulated_devices(n: int, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Calls a function in a child process that has `n` simulated CPU devices.

    The caller's JAX is not touched, whether or not it has started, and on whatever devices.

    Args:
      n: number of devices of the child.
      function: a function that the child can import by name: at the top level of a module.
      *args: picklable arguments; arrays as numpy.
      **kwargs: the same.

    Returns:
      What the function returned, pickled.

    Raises:
      MeshError: the function has no name to import it by.
      Exception: what the function raised, with the child's traceback as its cause.

    A script that calls this guards its main code with `if __name__ == "__main__":`, as for
    any child process that Python spawns.
    """
    if "<" in function.__qualname__:
        why = "is no function that a child process can import by name"
        problem = Problem(f"{function.__module__}.{function.__qualname__}", why)
        fix = "define it at the top level of a module, and pass what it needs as arguments"
        headline = f"simulated_devices({n}) cannot call this."
        raise MeshError(format_problems(headline, [problem], fix))
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=spawn, initializer=_start, initargs=(n,)
    ) as child:
        where = (function.__module__, inspect.getfile(function), function.__qualname__)
        return child.submit(_call, where, args, kwargs).result()


def _call(where: tuple[str, str, str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Finds a function in the child as the parent knows it, and calls it."""
    module, file, name = where
    found: Any = sys.modules.get(module) or _module(module, file)
    for part in name.split("."):
        found = getattr(found, part)
    return found(*args, **kwargs)


def _module(name: str, file: str) -> ModuleType:
    """Imports by name; by file where there is no such name, as in tests that pytest imports."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module


def _start(n: int) -> None:
    """Gives this process its devices, before anything else of JAX; the caller's flags go."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    jax.config.update("jax_platforms", "cpu")
    simulate_devices(n)
