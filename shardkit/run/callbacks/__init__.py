"""Callbacks of a run: the protocol, and those that every run has."""

from ._callback import Callback, RunContext, StepMetrics
from ._defaults import check_callbacks, default_callbacks
from ._progress import Describe, describe_metrics

__all__ = [
    "Callback",
    "Describe",
    "RunContext",
    "StepMetrics",
    "check_callbacks",
    "default_callbacks",
    "describe_metrics",
]
