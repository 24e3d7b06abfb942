"""What a function does with the rows of its batch, read from its jaxpr."""

from ._check import check_rows
from ._follow import follow_rows
from ._states import Cause, Columns, Constant, Mixed, PerRow, RowSum, State, Zero, describe

__all__ = [
    "Cause",
    "Columns",
    "Constant",
    "Mixed",
    "PerRow",
    "RowSum",
    "State",
    "Zero",
    "check_rows",
    "describe",
    "follow_rows",
]
