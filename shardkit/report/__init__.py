"""What a compiled step is: its collectives, memory, FLOPs, findings and budgets."""

from ._axis_kind import AxisKind, Part
from ._budget import Budget, check
from ._compare import Change, Comparison, compare
from ._program import CompiledBytes, Declared, Placed, Program
from ._report import Report
from .communication._ledger import Ledger, Row, read_ledger, wire_bytes
from .communication._minimum import Minimum
from .findings._findings import FINDINGS, Finding
from .hlo._scope import scope_of
from .memory._memory import Memory, read_memory
from .memory._suggestions import advice
from .time._flops import Flops, count_flops
from .time._timeline import Segment, Timeline, model_time

__all__ = [
    "FINDINGS",
    "AxisKind",
    "Budget",
    "Change",
    "Comparison",
    "CompiledBytes",
    "Declared",
    "Finding",
    "Flops",
    "Ledger",
    "Memory",
    "Minimum",
    "Part",
    "Placed",
    "Program",
    "Report",
    "Row",
    "Segment",
    "Timeline",
    "advice",
    "check",
    "compare",
    "count_flops",
    "model_time",
    "read_ledger",
    "read_memory",
    "scope_of",
    "wire_bytes",
]
