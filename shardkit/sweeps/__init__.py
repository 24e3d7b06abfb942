"""Every mesh × accumulation × remat of a step, tried, ranked and written down as it goes."""

from ._case import Case
from ._compilers import Factory
from ._factories import ConfigFactory, declared, factory_of
from ._plots import plots
from ._result import Sweep
from ._row import Row
from ._sweep import sweep

__all__ = [
    "Case",
    "ConfigFactory",
    "Factory",
    "Row",
    "Sweep",
    "declared",
    "factory_of",
    "plots",
    "sweep",
]
