"""What an equation of a traced program says on every version of JAX."""

import pathlib
import sysconfig
from collections.abc import Iterable, Sequence
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
    return next((frame for frame in frames if _is_users(frame.file_name)), None)


def find_user_line(places: Iterable[tuple[str, int]]) -> str:
    """The first of some places in code, the innermost first, that is a user's; "" if none is.

    >>> find_user_line([(__file__, 3), ("/home/ada/model.py", 12), ("/home/ada/train.py", 7)])
    '/home/ada/model.py:12'
    """
    return next((f"{name}:{line}" for name, line in places if _is_users(name)), "")


def _is_users(file_name: str) -> bool:
    return "site-packages" not in file_name and not file_name.startswith(_NOT_OF_A_USER)


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
