"""Which mesh for this step: every mesh × accumulation × remat compiled, ranked and recorded."""

from ._case import SweepCase
from ._compilers import Factory
from ._factories import ConfigFactory, declare_case, make_factory
from ._plots import draw_plots
from ._result import Sweep
from ._row import SweepRow
from ._sweep import sweep

__all__ = [
    "ConfigFactory",
    "Factory",
    "Sweep",
    "SweepCase",
    "SweepRow",
    "declare_case",
    "draw_plots",
    "make_factory",
    "sweep",
]
