"""What an equation of a traced program says on every version of JAX."""

import linecache
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
    for frame in trace.frames if trace else ():
        name = frame.file_name
        if "site-packages" not in name and not name.startswith(_NOT_OF_A_USER):
            return frame
    return None


def user_line(equation: core.JaxprEqn) -> tuple[str, str]:
    """The line of the user's code that made an equation.

    Returns:
      `file:line in function`, and the text of the line; "" for both where there is none.
    """
    frame = user_frame(equation)
    if frame is None:
        return "", ""
    name = frame.file_name.rpartition("/")[2]
    code = linecache.getline(frame.file_name, frame.line_num).strip()
    return f"{name}:{frame.line_num} in {frame.function_name}", code


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
