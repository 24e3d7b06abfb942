"""Runs a function in a child process with simulated devices."""

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

from .._core.errors import MeshError
from ..mesh import simulate_devices


def simulated_devices(n: int, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Calls a function in a child process that has `n` simulated CPU devices.

    The JAX of the calling process is unchanged, whether or not it has started a backend.

    Args:
      n: number of devices of the child.
      function: the child imports it by name, so it is defined at the top level of a module.
      *args: picklable arguments; arrays as numpy.
      **kwargs: the same.

    Returns:
      The result of the function, pickled.

    Raises:
      MeshError: the function cannot be imported by name.
      Exception: the exception of the function, with the child's traceback as its cause.

    A script that calls this guards its main code with `if __name__ == "__main__":`, as for
    any child process that Python spawns.
    """
    if "<" in function.__qualname__:
        why = "is not a function that a child process can import by name"
        fix = "define it at the top level of a module, and pass its data as arguments"
        headline = f"simulated_devices({n}) cannot call this function."
        raise MeshError.of(headline, f"{function.__module__}.{function.__qualname__}", why, fix)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=spawn, initializer=_start_devices, initargs=(n,)
    ) as child:
        where = (function.__module__, inspect.getfile(function), function.__qualname__)
        return child.submit(_call_in_child, where, args, kwargs).result()


def _call_in_child(
    where: tuple[str, str, str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls a function given as (module name, file, qualified name)."""
    module, file, name = where
    function: Any = sys.modules.get(module) or _import_module(module, file)
    for part in name.split("."):
        function = getattr(function, part)
    return function(*args, **kwargs)


def _import_module(name: str, file: str) -> ModuleType:
    """Imports a module by name; by file if the name is not importable, as for pytest's tests."""
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


def _start_devices(n: int) -> None:
    """Gives this process `n` devices before it uses JAX; drops the caller's device count."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    jax.config.update("jax_platforms", "cpu")
    simulate_devices(n)
