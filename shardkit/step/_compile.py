"""One program: traced and lowered without any ambient mesh, compiled, its warnings kept."""

import contextlib
import dataclasses
import functools
import hashlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.extend import core
from jax.sharding import AbstractMesh, Mesh

from .._core.errors import Problem, StepError, raise_all
from .._core.tree import format_bytes, nbytes
from ..nn._constrain import Resolver, use_resolver
from ._deadlocks import check_waits
from ._stderr import copied_stderr

# Two settings of the whole process, each changed and set back by one thread at a time.
_CACHE_SETTING, _WARNING_FILTERS = threading.Lock(), threading.Lock()


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A compiled function with what its making told.

    Attributes:
      compiled: the executable, called with the arguments that it was compiled for.
      jaxpr: what was traced.
      from_cache: the executable came out of JAX's persistent cache.
      seconds: wall time of (trace, lower, compile).
      digest: SHA-256 of what was lowered, 64 hexadecimal digits, by which several processes know
        that they run one program; "" where there is one process.
    """

    compiled: jax.stages.Compiled
    jaxpr: Any
    from_cache: bool
    seconds: tuple[float, float, float]
    digest: str
    _said: Callable[[], str]

    @functools.cached_property
    def messages(self) -> str:
        """What the compiler writes to file descriptor 2.

        A hit in the persistent cache compiles nothing and says nothing: then the program is
        compiled once more without the cache, when somebody asks.
        """
        return self._said()


def compile_program(
    run: Callable[..., Any],
    args: tuple[Any, ...],
    in_shardings: Any,
    out_shardings: Any,
    resolver: Resolver,
    check: Callable[[Any], None],
    donate: tuple[int, ...] = (),
    options: Mapping[str, Any] | None = None,
) -> CompiledProgram:
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

    Raises:
      StepError: what was compiled would wait without end.
    """
    wanted = dict(options) if options else None

    def traced(function: Callable[..., Any]) -> jax.stages.Traced:
        return jax.jit(
            function,
            in_shardings=in_shardings,
            out_shardings=out_shardings,
            donate_argnums=donate,
            keep_unused=True,
        ).trace(*args)

    start = time.perf_counter()
    with no_ambient_mesh(), use_resolver(resolver):
        first = traced(run)
        check(first.jaxpr)
        at_trace = time.perf_counter()
        lowered = first.lower()
        at_lower = time.perf_counter()
        with (
            copied_stderr() as messages,
            _cache_hits() as hits,
            _known_options(wanted),
            _room(args, in_shardings),
        ):
            compiled = lowered.compile(compiler_options=wanted)
    end = time.perf_counter()
    check_waits(compiled, jax.tree.leaves(in_shardings)[0].mesh)

    def again() -> str:
        # JAX keeps what it made of a function, so this is another one, of the same operations.
        def replay(*given: Any) -> Any:
            results = core.jaxpr_as_fun(first.jaxpr)(*jax.tree.leaves(given))
            return jax.tree.unflatten(jax.tree.structure(first.out_info), results)

        with no_ambient_mesh(), use_resolver(resolver), _without_cache(), copied_stderr() as said:
            traced(replay).lower().compile(compiler_options=wanted)
        return said.text

    seconds = (at_trace - start, at_lower - at_trace, end - at_lower)
    said = again if hits else lambda: messages.text
    # The text of a large program takes as long as lowering it, which one process is spared.
    text = lowered.as_text() if jax.process_count() > 1 else ""
    digest = hashlib.sha256(text.encode()).hexdigest() if text else ""
    return CompiledProgram(compiled, first.jaxpr, bool(hits), seconds, digest, said)


@contextlib.contextmanager
def _known_options(wanted: Mapping[str, Any] | None) -> Iterator[None]:
    """Says in the words of a declaration that the compiler does not know an option of it.

    Raises:
      StepError: naming the option.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        named = [name for name in wanted or () if f"'{name}'" in str(error)]
        if not named:
            raise
        problems = [
            Problem(f"compiler_options[{name!r}]", str(error).splitlines()[0]) for name in named
        ]
        fix = "names are those of the target's own compiler: another target, or leave it out"
        raise_all(StepError, "The compiler does not take the options.", problems, fix)


@contextlib.contextmanager
def _room(args: tuple[Any, ...], placed: Any) -> Iterator[None]:
    """Says in the words of a declaration that a compiler finds no room for a program.

    Compilers that know their device refuse what is larger, so that there is no report to read.

    Raises:
      StepError: with the compiler's figures beside the bytes of the arguments.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0]
        if not said.startswith("RESOURCE_EXHAUSTED"):
            raise
        shardings = jax.tree.leaves(placed)
        held = sum(
            nbytes(sharding.shard_shape(leaf.shape), leaf.dtype)
            for leaf, sharding in zip(jax.tree.leaves(args), shardings, strict=True)
        )
        devices = shardings[0].mesh.devices
        which = f"each of {devices.size} x {devices.flat[0].device_kind}"
        why = f"{said} State and batch take {format_bytes(held)} beside that."
        fix = (
            'accumulate=2 for half the rows at a time, remat="full" to keep less, or specs and a '
            "mesh that split more: shardkit plan CONFIG --target T lists what fits"
        )
        raise_all(StepError, "The program does not fit on its devices.", [Problem(which, why)], fix)


@contextlib.contextmanager
def _cache_hits() -> Iterator[list[str]]:
    """Collects an entry for each program that this thread takes from JAX's persistent cache."""
    hits: list[str] = []
    thread = threading.get_ident()

    def listen(event: str, **_: str | int) -> None:
        if event == "/jax/compilation_cache/cache_hits" and threading.get_ident() == thread:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Turns JAX's persistent cache off; it looks at its setting only after a reset.

    The setting is the whole process's: one thread at a time turns it off and on.
    """
    with _CACHE_SETTING:
        before = jax.config.jax_enable_compilation_cache
        try:
            jax.config.update("jax_enable_compilation_cache", False)
            reset_cache()
            yield
        finally:
            jax.config.update("jax_enable_compilation_cache", before)
            reset_cache()


@contextlib.contextmanager
def no_ambient_mesh() -> Iterator[None]:
    """Hides `with mesh:` and `jax.set_mesh` of the caller: a step is what was declared."""
    empty = Mesh(np.empty((), object), ())
    with contextlib.ExitStack() as stack:
        with _WARNING_FILTERS, warnings.catch_warnings():
            # `with mesh:` is deprecated, but where a caller uses it there is no other way out.
            warnings.simplefilter("ignore", DeprecationWarning)
            stack.enter_context(empty)
        stack.enter_context(jax.sharding.use_abstract_mesh(AbstractMesh((), ())))
        yield
