"""Which mesh for this model on these devices: every layout estimated, the fitting ones ranked."""

from ._candidate import Candidate
from ._compile import compile_best, compiled, report_of
from ._declared_step import Modelled, modelled
from ._network import Network
from ._plan import plan
from ._result import Plan
from ._space import SearchSpace, code_of

__all__ = [
    "Candidate",
    "Modelled",
    "Network",
    "Plan",
    "SearchSpace",
    "code_of",
    "compile_best",
    "compiled",
    "modelled",
    "plan",
    "report_of",
]
