"""Random keys that are used twice, found by tracing what the user wrote."""

from collections.abc import Callable
from typing import Any

import jax

from .._core.errors import Problem, StepError, raise_all


def check_keys(functions: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
    """Traces functions under JAX's checker of random keys.

    Args:
      functions: `{name: (function, abstract arguments)}`.

    Raises:
      StepError: naming each that uses a key twice, which draws the same numbers twice.
    """
    problems = []
    for name, (function, args) in functions.items():
        try:
            with jax.debug_key_reuse(True):
                # The checker looks at what is traced for a jit, and at nothing else.
                jax.jit(lambda *given, run=function: run(*given)).trace(*args)
        except jax.errors.KeyReuseError as error:
            problems.append(Problem(name, f"uses a random key twice: {_first_line(error)}"))
    fix = "first, second = jax.random.split(key)"
    raise_all(StepError, "Random numbers would repeat.", problems, fix)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
