"""What an equation of a traced program says on every version of JAX."""

from collections.abc import Sequence
from typing import Any

from .source import Frame, Source, choose_source


def source_of_equation(equation: Any) -> Source | None:
    """The source of a jaxpr's equation; None if it has none."""
    trace = equation.source_info.traceback
    return choose_source(
        Frame(frame.file_name, frame.line_num, frame.function_name)
        for frame in (trace.frames if trace else ())
    )


def user_line(equation: Any) -> tuple[str, str]:
    """The line of the user's code that made an equation.

    Returns:
      `file:line in function`, and the text of the line; "" for both where there is none.
    """
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
