"""What a compiled step is: its collectives, memory, FLOPs, findings and budgets."""

from ._budget import Budget, check
from ._compare import Change, Comparison, compare
from ._placed_leaf import PlacedLeaf
from ._program import (
    AxisKind,
    CompiledBytes,
    Declarations,
    Program,
    SplitPart,
    find_batch_axes,
)
from ._report import Report
from ._saved import TickTable
from .communication._axis_traffic import AxisTraffic
from .communication._entries import PRODUCTS, find_readers
from .communication._governing import (
    GoverningConstraint,
    OddDeclaration,
    SplitDim,
    layouts_of_others,
)
from .communication._ledger import Ledger, LedgerRow, read_ledger, wire_bytes
from .communication._minimum import Minimum
from .findings._finding import AGREE, FOLLOW, MOVE, Finding
from .findings._findings import FINDINGS
from .findings._miscompiled import read_miscompiled
from .findings._odd_declarations import move_dims
from .hlo._scope import phase_of, scope_of
from .hlo._source_lines import restore_paths
from .memory._memory import MEMORY_CLASSES, Memory, read_memory
from .memory._suggestions import suggest_memory_savings
from .time._flops import Flops, count_flops
from .time._profile import find_profile
from .time._timeline import Segment, Timeline, model_time

__all__ = [
    "AGREE",
    "FINDINGS",
    "FOLLOW",
    "MEMORY_CLASSES",
    "MOVE",
    "PRODUCTS",
    "AxisKind",
    "AxisTraffic",
    "Budget",
    "Change",
    "Comparison",
    "CompiledBytes",
    "Declarations",
    "Finding",
    "Flops",
    "GoverningConstraint",
    "Ledger",
    "LedgerRow",
    "Memory",
    "Minimum",
    "OddDeclaration",
    "PlacedLeaf",
    "Program",
    "Report",
    "Segment",
    "SplitDim",
    "SplitPart",
    "TickTable",
    "Timeline",
    "check",
    "compare",
    "count_flops",
    "find_batch_axes",
    "find_profile",
    "find_readers",
    "layouts_of_others",
    "model_time",
    "move_dims",
    "phase_of",
    "read_ledger",
    "read_memory",
    "read_miscompiled",
    "restore_paths",
    "scope_of",
    "suggest_memory_savings",
    "wire_bytes",
]
