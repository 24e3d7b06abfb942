"""StepSpec and compile_step: a spec becomes one checked, compiled, read-back training step."""

from ._batch_rows import arrange_specs, list_row_dims
from ._compiled import CompiledStep
from ._layout import AbstractState, StepLayout, abstract_state, resolve_layout
from ._nonfinite import SKIPPED, OnNonfinite
from ._objective import build_objective
from ._spec import StepSpec, check_mesh_given, check_step_spec, compile_step
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
    "arrange_specs",
    "build_objective",
    "check_mesh_given",
    "check_step_spec",
    "compile_step",
    "list_row_dims",
    "moment_spec",
    "resolve_layout",
]
