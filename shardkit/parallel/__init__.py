"""Strategies: how a step is laid out, one file per kind of parallelism."""

from . import strategies
from ._axis_names import axis_names
from ._compose import (
    check_axes_used,
    check_composition,
    check_overrides_called,
    suggest_options,
    suggest_renames,
)
from ._compression import GradientCompression, compressed_sum
from ._kind import DeviceBytes, Kind, PlanChoice, format_call
from ._kinds import (
    axes_splitting,
    gradient_shard_axes,
    infer_kinds,
    known_kinds,
    planned_kinds,
    register_kind,
)
from ._names import CONVENTIONAL
from ._strategy import Strategy
from ._zero_update import Zero, update_specs
from .context._blockwise import attend_backward
from .pipeline._schedule import PipelineSchedule, schedule
from .pipeline._tick_program import Branch, TickProgram, tick_program

__all__ = [
    "CONVENTIONAL",
    "Branch",
    "DeviceBytes",
    "GradientCompression",
    "Kind",
    "PipelineSchedule",
    "PlanChoice",
    "Strategy",
    "TickProgram",
    "Zero",
    "attend_backward",
    "axes_splitting",
    "axis_names",
    "check_axes_used",
    "check_composition",
    "check_overrides_called",
    "compressed_sum",
    "format_call",
    "gradient_shard_axes",
    "infer_kinds",
    "known_kinds",
    "planned_kinds",
    "register_kind",
    "schedule",
    "strategies",
    "suggest_options",
    "suggest_renames",
    "tick_program",
    "update_specs",
]
