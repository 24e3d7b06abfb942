"""Strategies: how a step is laid out, one file per kind of parallelism."""

from . import strategies
from ._compose import advise, check_composition, check_used
from ._names import CONVENTIONAL
from ._strategy import Strategy

__all__ = ["CONVENTIONAL", "Strategy", "advise", "check_composition", "check_used", "strategies"]
