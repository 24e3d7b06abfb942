"""What a function does with the rows of its batch, read from its jaxpr."""

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
    "describe",
    "follow_rows",
]
