"""StepSpec and compile_step: a spec becomes one checked, compiled, read-back training step."""

from ._ambient import around_init as around_init
from ._ambient import no_ambient_mesh as no_ambient_mesh
from ._batch_rows import arrange_specs as arrange_specs
from ._batch_rows import list_row_dims as list_row_dims
from ._compiled import CompiledStep as CompiledStep
from ._layout import AbstractState as AbstractState
from ._layout import StepLayout as StepLayout
from ._layout import abstract_state as abstract_state
from ._layout import resolve_layout as resolve_layout
from ._load import load_step as load_step
from ._nonfinite import SKIPPED as SKIPPED
from ._nonfinite import OnNonfinite as OnNonfinite
from ._objective import build_objective as build_objective
from ._program_cache import can_keep_programs as can_keep_programs
from ._spec import StepSpec as StepSpec
from ._spec import check_mesh_given as check_mesh_given
from ._spec import check_step_spec as check_step_spec
from ._spec import compile_step as compile_step
from ._step_functions import find_mixed_rows as find_mixed_rows
from ._trainable import find_partition as find_partition
from .optim._extra_args import call_update as call_update
from .optim._follow import FollowParams as FollowParams
from .optim._follow import moment_spec as moment_spec
from .self_check import SelfCheck as SelfCheck
