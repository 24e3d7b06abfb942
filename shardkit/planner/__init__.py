"""Which mesh for this model on these devices: every layout estimated, those that fit ranked."""

from ._candidate import Candidate as Candidate
from ._compile import compile_best as compile_best
from ._compile import compile_layout as compile_layout
from ._declared_step import StepEstimate as StepEstimate
from ._declared_step import estimate_step as estimate_step
from ._network import Network as Network
from ._plan import plan as plan
from ._result import Plan as Plan
from ._space import SearchSpace as SearchSpace
from ._space import format_layout as format_layout
