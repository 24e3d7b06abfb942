"""What a compiled step is: its collectives, memory, FLOPs, findings and budgets."""

from ._advice import advice
from ._budget import Budget, check
from ._compare import Change, Comparison, compare
from ._findings import FINDINGS, Finding
from ._flops import Flops, count_flops
from ._ledger import Ledger, Row, read_ledger, wire_bytes
from ._memory import Memory, read_memory
from ._minimum import Minimum
from ._program import CompiledBytes, Declared, Placed, Program, explained_by
from ._report import Report
from ._timeline import Segment, Timeline, model_time

__all__ = [
    "FINDINGS",
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
    "explained_by",
    "model_time",
    "read_ledger",
    "read_memory",
    "wire_bytes",
]
