"""`CompiledStep.self_check`: the compiled gradient held to the loss of the same mesh."""

from ._check import run_self_check
from ._held_targets import hold_targets
from ._probes import Probes
from ._result import Check, SelfCheck
from ._training_loss import LossProgram, build_plain_objective, build_training_loss

__all__ = [
    "Check",
    "LossProgram",
    "Probes",
    "SelfCheck",
    "build_plain_objective",
    "build_training_loss",
    "hold_targets",
    "run_self_check",
]
