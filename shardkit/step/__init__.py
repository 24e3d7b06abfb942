"""StepSpec and compile_step: a spec becomes one checked, compiled, read-back training step."""

from ._compile_step import compile_step
from ._compiled import CompiledStep
from ._layout import Abstract, Layout, abstract_state, resolve_layout
from ._nonfinite import SKIPPED, OnNonfinite
from ._objective import objective
from ._spec import StepSpec, check_mesh_given, check_step_spec
from .optim._follow import FollowParams, moment_spec
from .self_check import SelfCheck

__all__ = [
    "SKIPPED",
    "Abstract",
    "CompiledStep",
    "FollowParams",
    "Layout",
    "OnNonfinite",
    "SelfCheck",
    "StepSpec",
    "abstract_state",
    "check_mesh_given",
    "check_step_spec",
    "compile_step",
    "moment_spec",
    "objective",
    "resolve_layout",
]
