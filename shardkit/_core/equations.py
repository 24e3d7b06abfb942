"""What an equation of a traced program says on every version of JAX."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core, source_info_util
from jax.sharding import AbstractMesh

from .source import Frame, Source, choose_source, package_of


def source_of_equation(equation: Any) -> Source | None:
    """The source of a jaxpr's equation; None if it has none."""
    trace = equation.source_info.traceback
    return choose_source(
        Frame(frame.file_name, frame.line_num, frame.function_name)
        for frame in (trace.frames if trace else ())
    )


def name_derivative_rule(equation: Any, source: Source) -> Source:
    """The source of an equation, which says so where it is of a backward rule.

    JAX gives what `jax.custom_vjp` computes backward the line that calls the function.
    """
    trace = equation.source_info.traceback
    line = source.file, source.line
    inner = itertools.takewhile(
        lambda frame: (frame.file_name, frame.line_num) != line, trace.frames if trace else ()
    )
    if not any(frame.function_name.startswith("custom_vjp.") for frame in inner):
        return source
    return dataclasses.replace(source, function=f"a backward rule called by {source.function}")


def is_written_in(equation: Any, package: str) -> bool:
    """Whether the innermost line that made an equation, outside of JAX, is in a package."""
    trace = equation.source_info.traceback
    files = (package_of(frame.file_name) for frame in (trace.frames if trace else ()))
    return next((name for name in files if name not in ("jax", "jaxlib")), "") == package


def user_line(equation: Any) -> tuple[str, str]:
    """The user's `file:line in function` that made an equation, and its text; both may be ""."""
    source = source_of_equation(equation)
    return (str(source), source.code) if source else ("", "")


def count_scan_operands(equation: Any) -> tuple[int, int]:
    """Returns how many operands of a scan are constants, and how many are carried.

    The parameters that say so have other names in each version of JAX; the ranks do not change.
    Outside of the body, scanned inputs and collected outputs have one dim more than inside:

        invars   consts [4]   carry [2]   xs [10, 3]      body: [4] [2] [3]
        outvars               carry [2]   ys [10, 3]      body:     [2] [3]

    So the outputs of equal rank are the carry, and the inputs of equal rank constants and carry.
    """
    body = equation.params["jaxpr"].jaxpr

    def count_equal_ranks(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(len(outer.aval.shape) == len(inner.aval.shape) for outer, inner in pairs)

    carried = count_equal_ranks(equation.outvars, body.outvars)
    return count_equal_ranks(equation.invars, body.invars) - carried, carried


_INLINED = ("jit", "pjit", "closed_call", "core_call")


def inlined_program(equation: core.JaxprEqn) -> Any:
    """The program of an equation that only calls it; None for any other equation."""
    params = equation.params
    if equation.primitive.name not in _INLINED:
        return None
    return params["jaxpr" if "jaxpr" in params else "call_jaxpr"]


def bind(equation: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Computes an equation with other operands; returns its results."""
    params = equation.primitive.get_bind_params(equation.params)
    results = equation.primitive.bind(*values, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Returns a jaxpr that takes its constants as arguments of their own, and the constants."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())


def evaluate(
    program: Any,
    args: Sequence[Any],
    compute: Callable[[int, core.JaxprEqn, list[Any]], Sequence[Any]],
) -> list[Any]:
    """Evaluates a program, closed or not, with a function in place of its operations.

    `compute(position, equation, values of its operands)` returns the values of its results, of any
    type. It is called with the name and the line of the equation around it.
    """
    jaxpr, consts = open_jaxpr(program)
    values: dict[Any, Any] = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
    )

    def read(variable: Any) -> Any:
        # A literal of the trace knows its mesh, which may have had more axes.
        if not isinstance(variable, core.Literal):
            return values[variable]
        of: Any = variable.aval
        return np.asarray(variable.val, of.dtype)

    for position, equation in enumerate(jaxpr.eqns):
        with context_of(equation):
            results = compute(position, equation, [read(v) for v in equation.invars])
        values.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


@contextlib.contextmanager
def context_of(equation: core.JaxprEqn) -> Iterator[None]:
    """Gives what is traced in the block the name, the line and the options of an equation."""
    source = equation.source_info
    scope = source_info_util.current_name_stack() + source.name_stack
    with contextlib.ExitStack() as stack:
        stack.enter_context(source_info_util.user_context(source.traceback, name_stack=scope))
        mesh = jax.sharding.get_abstract_mesh()
        stack.enter_context(equation.ctx.manager)
        # The trace without types may have had more axes, so its mesh is left before this one's.
        stack.enter_context(jax.sharding.use_abstract_mesh(AbstractMesh((), ())))
        stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
        yield
