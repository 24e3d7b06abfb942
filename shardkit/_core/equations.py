"""What an equation of a traced program says on every version of JAX."""

import pathlib
import sysconfig
from collections.abc import Sequence
from typing import Any

from jax.extend import core

_NOT_OF_A_USER = (
    f"{pathlib.Path(__file__).parents[1]}/",
    f"{sysconfig.get_path('stdlib')}/",
    "<",
)


def user_frame(equation: core.JaxprEqn) -> Any:
    """Innermost frame outside of this package, of installed ones and of the standard library.

    Returns:
      A frame with `file_name`, `line_num` and `function_name`; None if there is none.
    """
    trace = equation.source_info.traceback
    frames = trace.frames if trace else ()
    return next((frame for frame in frames if is_user_file(frame.file_name)), None)


def is_user_file(name: str) -> bool:
    """Whether a file is neither of this package nor of an installed or standard one."""
    return "site-packages" not in name and not name.startswith(_NOT_OF_A_USER)


def source_line(equation: core.JaxprEqn) -> str:
    """The line of the user's code that made an equation: `file:line in function`, or ""."""
    frame = user_frame(equation)
    return (frame and format_line(frame.file_name, frame.line_num, frame.function_name)) or ""


def format_line(file: str, line: int, function: str) -> str:
    """`model.py:12 in loss`, as errors name a line."""
    return f"{file.rpartition('/')[2]}:{line} in {function}"


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
