"""Strategies: how a step is laid out, one file per kind of parallelism."""

from . import strategies
from ._compose import advise, check_composition, check_used
from ._compression import GradientCompression, compressed_sum
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
from ._strategy import Strategy
from ._zero_update import Zero, update_specs
from .context._attention import across
from .context._blockwise import attend_backward
from .context._pairwise import Pairs
from .context._ring import Ring
from .context._ulysses import HeadExchange
from .context._zigzag import zigzag_order
from .pipeline._schedule import Schedule, schedule
from .pipeline._tick_program import Branch, Ticks, ticks

__all__ = [
    "CONVENTIONAL",
    "Branch",
    "Choice",
    "DeviceBytes",
    "GradientCompression",
    "HeadExchange",
    "Kind",
    "Pairs",
    "Ring",
    "Schedule",
    "Strategy",
    "Ticks",
    "Zero",
    "across",
    "advise",
    "attend_backward",
    "axes_splitting",
    "check_composition",
    "check_used",
    "compressed_sum",
    "format_call",
    "kinds_by_specs",
    "known_kinds",
    "lane_axes",
    "register_kind",
    "schedule",
    "strategies",
    "ticks",
    "update_specs",
    "weighed_kinds",
    "zigzag_order",
]
