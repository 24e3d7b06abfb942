"""What a compiled step is: its collectives, memory, FLOPs, findings and budgets."""

from ._advice import advice
from ._axis_kind import AxisKind, Part
from ._budget import Budget, check
from ._compare import Change, Comparison, compare
from ._findings import FINDINGS, Finding
from ._flops import Flops, count_flops
from ._ledger import Ledger, Row, read_ledger, wire_bytes
from ._memory import Memory, read_memory
from ._minimum import Minimum
from ._program import CompiledBytes, Declared, Placed, Program
from ._report import Report
from ._timeline import Segment, Timeline, model_time

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
    "wire_bytes",
]
