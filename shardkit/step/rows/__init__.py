"""What a function does with the rows of its batch, read from its jaxpr."""

from ._check import check_rows
from ._equation import RowCounts
from ._follow import follow_rows, has_own_derivatives
from ._rules import is_elementwise
from ._solves import derive_solves_alike
from ._states import AlwaysZero, Cause, Columns, Constant, Mixed, PerRow, RowSum, State, describe

__all__ = [
    "AlwaysZero",
    "Cause",
    "Columns",
    "Constant",
    "Mixed",
    "PerRow",
    "RowCounts",
    "RowSum",
    "State",
    "check_rows",
    "derive_solves_alike",
    "describe",
    "follow_rows",
    "has_own_derivatives",
    "is_elementwise",
]
