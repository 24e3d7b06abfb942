"""Callbacks of a run: the protocol, and those that every run has."""

from ._callback import Callback, RunContext, StepMetrics
from ._defaults import check_callbacks, default_callbacks
from ._finite import FiniteCheck
from ._progress import ProgressDisplay, describe_metrics

__all__ = [
    "Callback",
    "FiniteCheck",
    "ProgressDisplay",
    "RunContext",
    "StepMetrics",
    "check_callbacks",
    "default_callbacks",
    "describe_metrics",
]
