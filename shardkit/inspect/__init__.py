"""What a compiled step is: its collectives, memory, FLOPs, findings and budgets."""

from ._ledger import Ledger, LedgerError, Row, read_ledger, wire_bytes
from ._program import CompiledBytes, Declared, Placed, Program

__all__ = [
    "CompiledBytes",
    "Declared",
    "Ledger",
    "LedgerError",
    "Placed",
    "Program",
    "Row",
    "read_ledger",
    "wire_bytes",
]
