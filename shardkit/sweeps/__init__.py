"""Which mesh for this step: every mesh × accumulation × remat compiled, ranked and recorded."""

from ._case import SweepCase as SweepCase
from ._compilers import Factory as Factory
from ._factories import ConfigFactory as ConfigFactory
from ._factories import declare_case as declare_case
from ._factories import make_factory as make_factory
from ._plots import draw_plots as draw_plots
from ._result import Sweep as Sweep
from ._row import SweepRow as SweepRow
from ._sweep import sweep as sweep
