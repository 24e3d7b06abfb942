"""Finds random keys that are used twice, by tracing the user's functions."""

from collections.abc import Callable
from typing import Any

import jax

from .._core.errors import Problem, StepError, raise_all


def check_key_reuse(functions: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
    """Traces functions under JAX's key-reuse checker.

    Args:
      functions: `{name: (function, abstract arguments)}`.

    Raises:
      StepError: naming each function that uses a key twice, which draws equal numbers.
    """
    problems = []
    for name, (function, args) in functions.items():
        try:
            with jax.debug_key_reuse(True):
                # The checker runs only on what is traced for a jit.
                jax.jit(lambda *args, run=function: run(*args)).trace(*args)
        except jax.errors.KeyReuseError as error:
            problems.append(Problem(name, f"uses a random key twice: {str(error).splitlines()[0]}"))
    fix = "first, second = jax.random.split(key)"
    raise_all(StepError, "Random numbers would repeat.", problems, fix)
