"""A function in a child process that has its own simulated devices."""

import concurrent.futures
import multiprocessing
import os
import re
from collections.abc import Callable
from typing import Any

import jax

from .._errors import MeshError, Problem, format_problems
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
        return child.submit(function, *args, **kwargs).result()


def _start(n: int) -> None:
    """Gives this process its devices, before anything else of JAX; the caller's flags go."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    jax.config.update("jax_platforms", "cpu")
    simulate_devices(n)
