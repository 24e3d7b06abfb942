"""Callbacks of a run: the protocol, and those that every run has."""

from ._callback import Callback as Callback
from ._callback import RunContext as RunContext
from ._callback import StepMetrics as StepMetrics
from ._defaults import check_callbacks as check_callbacks
from ._defaults import default_callbacks as default_callbacks
from ._progress import Describe as Describe
from ._progress import describe_metrics as describe_metrics
