"""Compiles one program, and captures what the compiler prints."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.sharding import Mesh

from .._core.errors import Problem, StepError, first_line, raise_all
from .._core.interrupts import compiling
from .._core.source import find_user_line
from .._core.tracing import equations
from .._core.tree import format_bytes, nbytes
from .._core.types import PyTree
from ._executable_checks import (
    OnMiscompiled,
    check_deadlocks,
    check_miscompiled,
    check_transforms,
)
from ._jax_cache import record_cache_hits, without_jax_cache
from ._nonfinite import run_checked
from ._ordered import check_ordered
from ._program_cache import ProgramCache
from ._saved_programs import KeptProgram, SavedPrograms, digest_lines, name_program, save_programs
from ._stderr import copied_stderr


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A compiled function, with the facts of its compilation."""

    jaxpr: core.ClosedJaxpr  # the traced function
    # whether the executable comes from JAX's persistent cache, or from a saved step
    from_cache: bool
    seconds: tuple[float, float, float]  # wall time of (trace, lower, compile)
    # SHA-256 of the lowered program, 64 hexadecimal digits, by which several processes check that
    # they run the same one; "" with a single process
    digest: str
    # name under which a saved step or a folder keeps the executable; "" without either
    kept_as: str
    _made: KeptProgram  # compiled here, or from a cache
    _compute_name: Callable[[], str]
    _compute_lines: Callable[[], str]
    _compile_again: Callable[[], KeptProgram]

    @property
    def compiled(self) -> jax.stages.Compiled:
        """The executable."""
        return self._made.compiled

    @functools.cached_property
    def name(self) -> str:
        """Name of the executable in a file; see `_saved_programs`."""
        return self.kept_as or self._compute_name()

    @functools.cached_property
    def _printed_again(self) -> tuple[str, str] | None:
        """Text and messages of a second compilation; None if those of the first are right.

        Caches have the source lines of when the program was compiled, and JAX's does not have what
        the compiler printed: the program is compiled once more then, without them, and dropped.
        """
        if not self.from_cache or self._made.lines == self._compute_lines():
            return None
        again = self._compile_again()
        return _text_of(again.compiled), again.messages

    @property
    def messages(self) -> str:
        """What the compiler prints to file descriptor 2."""
        again = self._printed_again
        return again[1] if again else self._made.messages

    @property
    def hlo(self) -> str:
        """Text of the optimized program that each device runs."""
        again = self._printed_again
        return again[0] if again else _text_of(self.compiled)

    def keep(self) -> KeptProgram:
        """What a file keeps of it."""
        lines = self._made.lines if self.from_cache else self._compute_lines()
        return dataclasses.replace(self._made, messages=self.messages, lines=lines)

    def run(self, *args: PyTree) -> Any:
        """Computes its results; FloatingPointError as `jax_debug_nans` and its like ask for."""
        return run_checked(self.compiled, *args)


def compile_program(
    run: Callable[..., Any],
    args: tuple[PyTree, ...],
    in_shardings: PyTree,
    out_shardings: PyTree,
    surroundings: Callable[[], contextlib.AbstractContextManager[None]],
    check: Callable[[core.ClosedJaxpr], None],
    donate: tuple[int, ...] = (),
    options: Mapping[str, Any] | None = None,
    saved: SavedPrograms | ProgramCache | None = None,
    on_miscompiled: OnMiscompiled = "error",
) -> CompiledProgram:
    """Traces, checks, lowers and compiles a new function, since JAX caches traces by identity.

    Arguments are abstract; those at `donate` lend their buffers to the results. `surroundings`
    enters the mesh and the rules that the function is traced and lowered under; `check` gets the
    jaxpr before it is lowered, and raises the problems that it finds. The executable may be found
    in `saved`. Raises StepError if the compiler rejects an option or runs out of memory, or the
    program would deadlock or (unless `on_miscompiled="report"`) compute wrong numbers.
    """

    def trace(function: Callable[..., Any]) -> jax.stages.Traced:
        shardings = {"in_shardings": in_shardings, "out_shardings": out_shardings}
        return jax.jit(function, **shardings, donate_argnums=donate, keep_unused=True).trace(*args)

    mesh, options = jax.tree.leaves(in_shardings)[0].mesh, dict(options) if options else None
    callers = {f'"{frame.filename}":{frame.lineno}' for frame in traceback.extract_stack()}
    start = time.perf_counter()
    with surroundings():
        traced = trace(run)
        check(traced.jaxpr)
        check_ordered(equations(traced.jaxpr.jaxpr), mesh)
        at_trace = time.perf_counter()
        lowered = _lower(traced)
        at_lower = time.perf_counter()
        compute_name = functools.partial(name_program, lowered, options or {}, mesh)
        name = compute_name() if saved else ""
        found = saved.load(name, lowered) if saved else None
        with (
            record_cache_hits() as hits,
            _explain_unknown_options(options or {}),
            _explain_failures(mesh),
            _explain_out_of_memory(args, in_shardings),
        ):
            made = found or _compile(lowered, options, mesh)
    end = time.perf_counter()
    _check_collectives(made.compiled, mesh)
    if on_miscompiled == "error":
        check_miscompiled(made.compiled, args, traced.out_info, mesh)

    def compile_again() -> KeptProgram:
        with surroundings(), without_jax_cache():
            return _compile(trace(_replay(traced)).lower(), options, mesh)

    program = CompiledProgram(
        jaxpr=traced.jaxpr,
        from_cache=bool(hits) or found is not None,
        seconds=(at_trace - start, at_lower - at_trace, end - at_lower),
        digest=_digest(lowered),
        kept_as="" if hits else name,
        _made=made,
        _compute_name=compute_name,
        _compute_lines=lambda: digest_lines(lowered, callers),
        _compile_again=compile_again,
    )
    if saved and not program.from_cache:
        saved.store(name, program.keep())
    return program


def _text_of(compiled: jax.stages.Compiled) -> str:
    text = compiled.as_text()
    assert text is not None, "every backend of JAX can print its executables"
    return text


def _check_collectives(compiled: jax.stages.Compiled, mesh: Mesh) -> None:
    check_deadlocks(compiled, mesh)
    check_transforms(compiled, mesh)


def _compile(
    lowered: jax.stages.Lowered, options: dict[str, Any] | None, mesh: Mesh
) -> KeptProgram:
    with compiling(), without_jax_cache(mesh), copied_stderr() as printed:
        compiled = lowered.compile(compiler_options=options)
    return KeptProgram(compiled, printed.text)


def save_compiled(
    path: str | os.PathLike[str], programs: Sequence[CompiledProgram], mesh: Mesh
) -> None:
    """Saves executables; see `save_programs`."""
    save_programs(path, {program.name: program.keep() for program in programs}, mesh)


def _replay(traced: jax.stages.Traced) -> Callable[..., Any]:
    """A new function of the same jaxpr, which JAX compiles anew: it caches the lowering of one."""

    def replay(*args: PyTree) -> PyTree:
        results = core.jaxpr_as_fun(traced.jaxpr)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), results)

    return replay


def _digest(lowered: jax.stages.Lowered) -> str:
    # Printing a large program takes as long as lowering it, so a single process does not.
    several = jax.process_count() > 1
    return hashlib.sha256(lowered.as_text().encode()).hexdigest() if several else ""


@contextlib.contextmanager
def _explain_unknown_options(options: Mapping[str, Any]) -> Iterator[None]:
    """Turns the compiler's error about an unknown option into a StepError of `compiler_options`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        unknown = [name for name in options if f"'{name}'" in str(error)]
        if not unknown:
            raise
        reason = first_line(error)
        problems = [Problem(f"compiler_options[{name!r}]", reason) for name in unknown]
        fix = "remove it, or compile for a target whose compiler has this option"
        raise_all(StepError, "The compiler rejects the options.", problems, fix)


@contextlib.contextmanager
def _explain_out_of_memory(args: tuple[PyTree, ...], in_shardings: PyTree) -> Iterator[None]:
    """Adds the bytes of the arguments to a compiler's error that the program is too large.

    Some compilers reject a program that is larger than the device; then there is no report.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = first_line(error)
        if not reason.startswith("RESOURCE_EXHAUSTED"):
            raise
        shardings = jax.tree.leaves(in_shardings)
        size = sum(
            nbytes(sharding.shard_shape(leaf.shape), leaf.dtype)
            for leaf, sharding in zip(jax.tree.leaves(args), shardings, strict=True)
        )
        devices = shardings[0].mesh.devices
        subject = f"each of {devices.size} x {devices.flat[0].device_kind}"
        why = f"{reason} State and batch take another {format_bytes(size)}."
        fix = (
            'accumulate=2 for half the rows at a time, remat="full" for fewer residuals, or a mesh '
            "and specs that split more: shardkit plan CONFIG --target T lists what fits"
        )
        raise StepError.of("The program does not fit on its devices.", subject, why, fix) from error


@contextlib.contextmanager
def _explain_failures(mesh: Mesh) -> Iterator[None]:
    """Names the user's line in an error of the compiler about itself."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith(("INTERNAL", "UNIMPLEMENTED")):
            raise
        places = re.findall(r"^\s*(/[^\n]*?):(\d+):\d+ \[", str(error), re.MULTILINE)
        place = find_user_line((file, int(line)) for file, line in places)
        alone = [axis for axis, size in mesh.shape.items() if size == 1]
        fix = "another mesh, mode or spec; plain jax.jit of the loss shows whether it fails as well"
        if alone:
            fix = f"a mesh without its axes of size 1 ({', '.join(alone)}); or {fix}"
        subject, headline = place or "the step", "The compiler fails on this program."
        raise StepError.of(headline, subject, first_line(error), fix) from error


def _lower(traced: jax.stages.Traced) -> jax.stages.Lowered:
    """Names what JAX cannot lower on shards: `betainc` of some versions is a loop without types."""
    try:
        return traced.lower()
    except TypeError as error:
        if "manual axis types do not match" not in str(error):
            raise
        names = [frame.name for frame in traceback.extract_tb(error.__traceback__)][-2:]
        headline = 'JAX cannot lower a function of the loss in mode="shard_map".'
        why = f"{first_line(error)} Rows differ between devices, and its constants do not."
        raise StepError.of(headline, " > ".join(names), why, 'mode="auto"') from error
