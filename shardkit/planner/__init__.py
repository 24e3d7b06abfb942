"""Which mesh for this model on these devices: every layout estimated, those that fit ranked."""

from ._candidate import Candidate
from ._compile import compile_best, compile_layout
from ._declared_step import StepEstimate, estimate_step
from ._network import Network
from ._plan import plan
from ._result import Plan
from ._space import SearchSpace, format_layout

__all__ = [
    "Candidate",
    "Network",
    "Plan",
    "SearchSpace",
    "StepEstimate",
    "compile_best",
    "compile_layout",
    "estimate_step",
    "format_layout",
    "plan",
]
