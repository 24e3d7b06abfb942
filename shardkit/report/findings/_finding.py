"""`Finding`: something in a compiled step that a user would want to know."""

import dataclasses
from collections.abc import Iterable

from ..._core.source import Source
from ..._core.tree import format_bytes
from ..communication._ledger import LedgerRow

# A collective of up to 1 KiB costs its latency, whatever its dtype.
SMALL = 1024


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something in a compiled step that a user would want to know.

    Attributes:
      kind: one of `FINDINGS`.
      leaf: path of the leaf, with its part: `opt_state/0/mu/w`; or "".
      scope: the model's scope, or "".
      axes: mesh axes involved.
      bytes: its cost on one device: of memory, or sent per step by collectives.
      why: what happens, with numbers.
      fix: what to change, as code where possible.
      source: the line of the user's code that causes most of it; None if unknown.
    """

    kind: str
    _: dataclasses.KW_ONLY
    leaf: str = ""
    scope: str = ""
    axes: tuple[str, ...] = ()
    bytes: int = 0
    why: str
    fix: str
    source: Source | None = None

    def __str__(self) -> str:
        """Returns `replicated params/w, 16.0 KiB: …`."""
        about = self.leaf or self.scope
        return f"{self.kind} {about + ', ' if about else ''}{format_bytes(self.bytes)}: {self.why}"


def source_of_rows(rows: Iterable[LedgerRow]) -> Source | None:
    """The source of the row that sends the most, of those that have one."""
    known = [row for row in rows if row.source]
    return max(known, key=lambda row: row.wire_bytes).source if known else None
