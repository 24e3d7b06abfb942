"""StepSpec and compile_step: a spec becomes one checked, compiled, read-back training step."""

from ._compiled import CompiledStep
from ._layout import AbstractState, StepLayout, abstract_state, resolve_layout
from ._nonfinite import SKIPPED, OnNonfinite
from ._objective import build_objective
from ._spec import StepSpec, check_mesh_given, check_step_spec, compile_step
from ._step_functions import find_mixed_rows
from .optim._extra_args import call_update
from .optim._follow import FollowParams, moment_spec
from .self_check import SelfCheck

__all__ = [
    "SKIPPED",
    "AbstractState",
    "CompiledStep",
    "FollowParams",
    "OnNonfinite",
    "SelfCheck",
    "StepLayout",
    "StepSpec",
    "abstract_state",
    "build_objective",
    "call_update",
    "check_mesh_given",
    "check_step_spec",
    "compile_step",
    "find_mixed_rows",
    "moment_spec",
    "resolve_layout",
]
