"""StepSpec and compile_step: a spec becomes one checked, compiled, read-back training step."""

from ._ambient import around_init, no_ambient_mesh
from ._batch_rows import arrange_specs, list_row_dims
from ._compiled import CompiledStep
from ._layout import AbstractState, StepLayout, abstract_state, resolve_layout
from ._load import load_step
from ._nonfinite import SKIPPED, OnNonfinite
from ._objective import build_objective
from ._program_cache import can_keep_programs
from ._spec import StepSpec, check_mesh_given, check_step_spec, compile_step
from ._step_functions import find_mixed_rows
from ._trainable import find_partition
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
    "around_init",
    "arrange_specs",
    "build_objective",
    "call_update",
    "can_keep_programs",
    "check_mesh_given",
    "check_step_spec",
    "compile_step",
    "find_mixed_rows",
    "find_partition",
    "list_row_dims",
    "load_step",
    "moment_spec",
    "no_ambient_mesh",
    "resolve_layout",
]
