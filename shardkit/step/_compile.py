"""One program: traced and lowered without any ambient mesh, compiled, its warnings kept."""

import contextlib
import dataclasses
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from .._constrain import Resolver, resolving


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function with what its making told.

    Attributes:
      compiled: the executable, called with the arguments that it was compiled for.
      jaxpr: what was traced.
      messages: what the compiler wrote to file descriptor 2.
      messages_complete: whether it did compile; a hit in the persistent cache says nothing.
      seconds: wall time of (trace, lower, compile).
    """

    compiled: jax.stages.Compiled
    jaxpr: Any
    messages: str
    messages_complete: bool
    seconds: tuple[float, float, float]


def compile_program(
    run: Callable[..., Any],
    args: tuple[Any, ...],
    in_shardings: Any,
    out_shardings: Any,
    resolver: Resolver,
    check: Callable[[Any], None],
    donate: tuple[int, ...] = (),
    options: Mapping[str, Any] | None = None,
) -> Program:
    """Traces, checks, lowers and compiles a function for abstract arguments.

    Args:
      run: a fresh function; JAX caches traces by identity.
      args: pytrees of `jax.ShapeDtypeStruct`.
      in_shardings: `NamedSharding`s of the arguments.
      out_shardings: `NamedSharding`s of the results.
      resolver: turns logical names into shardings.
      check: called with the jaxpr before it is lowered; raises what it finds.
      donate: numbers of the arguments whose buffers the results may reuse.
      options: XLA options by name.
    """
    jitted = jax.jit(
        run,
        in_shardings=in_shardings,
        out_shardings=out_shardings,
        donate_argnums=donate,
        keep_unused=True,
    )
    start = time.perf_counter()
    with no_ambient_mesh(), resolving(resolver):
        traced = jitted.trace(*args)
        check(traced.jaxpr)
        at_trace = time.perf_counter()
        lowered = traced.lower()
        at_lower = time.perf_counter()
        with captured_stderr() as messages:
            compiled = lowered.compile(compiler_options=dict(options) if options else None)
    end = time.perf_counter()
    seconds = (at_trace - start, at_lower - at_trace, end - at_lower)
    complete = not jax.config.jax_compilation_cache_dir
    return Program(compiled, traced.jaxpr, messages[0], complete, seconds)


@contextlib.contextmanager
def no_ambient_mesh() -> Iterator[None]:
    """Hides `with mesh:` and `jax.set_mesh` of the caller: a step is what was declared."""
    empty = Mesh(np.empty((), object), ())
    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():
            # `with mesh:` is deprecated, but where a caller uses it there is no other way out.
            warnings.simplefilter("ignore", DeprecationWarning)
            stack.enter_context(empty)
        stack.enter_context(jax.sharding.use_abstract_mesh(AbstractMesh((), ())))
        yield


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Keeps what is written to file descriptor 2, where XLA's C++ prints its warnings.

    The text is passed on afterwards, so that nothing a user would have seen is lost.
    """
    out = [""]
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield out
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            out[0] = file.read().decode(errors="replace")
            if out[0]:
                os.write(2, out[0].encode())
