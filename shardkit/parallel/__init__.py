"""Strategies: how a step is laid out, one file per kind of parallelism."""

from . import strategies
from ._compose import advise, check_composition, check_used
from ._kind import Choice, DeviceBytes, Kind, format_call
from ._kinds import (
    axes_splitting,
    kinds_by_specs,
    known_kinds,
    lane_axes,
    register_kind,
    weighed_kinds,
)
from ._names import CONVENTIONAL
from ._schedule import Schedule, schedule
from ._strategy import Strategy
from ._ticks import Branch, Ticks, ticks

__all__ = [
    "CONVENTIONAL",
    "Branch",
    "Choice",
    "DeviceBytes",
    "Kind",
    "Schedule",
    "Strategy",
    "Ticks",
    "advise",
    "axes_splitting",
    "check_composition",
    "check_used",
    "format_call",
    "kinds_by_specs",
    "known_kinds",
    "lane_axes",
    "register_kind",
    "schedule",
    "strategies",
    "ticks",
    "weighed_kinds",
]
