"""Strategies: how a step is laid out, one file per kind of parallelism."""

from . import strategies
from ._compose import advise, check_composition, check_used
from ._names import CONVENTIONAL
from ._schedule import Schedule, schedule
from ._strategy import Strategy
from ._ticks import Branch, Ticks, ticks

__all__ = [
    "CONVENTIONAL",
    "Branch",
    "Schedule",
    "Strategy",
    "Ticks",
    "advise",
    "check_composition",
    "check_used",
    "schedule",
    "strategies",
    "ticks",
]
