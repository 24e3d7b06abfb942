"""Proof that a step gives the numbers of one device on every mesh."""

from ._certificate import Certificate, Row
from ._verify import Standard, StepFactory, made_up, one_device, step_factory, verify

__all__ = [
    "Certificate",
    "Row",
    "Standard",
    "StepFactory",
    "made_up",
    "one_device",
    "step_factory",
    "verify",
]
