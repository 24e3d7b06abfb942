"""Proof that a step gives the numbers of one device on every mesh."""

from ._parity_report import ParityReport, Row, format_error
from ._record import Trial
from ._verify import Standard, StepFactory, made_up, one_device, step_factory, verify

__all__ = [
    "ParityReport",
    "Row",
    "Standard",
    "StepFactory",
    "Trial",
    "format_error",
    "made_up",
    "one_device",
    "step_factory",
    "verify",
]
