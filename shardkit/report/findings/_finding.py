"""`Finding`: something in a compiled step that a user would want to know."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from ..._core.source import Source
from ..._core.tree import format_bytes
from ..communication._ledger import Ledger, LedgerRow

# A collective of up to 1 KiB costs its latency, whatever its dtype.
SMALL = 1024
# What `try_fixes` compiles: the layout of all other declarations, that of the parameters, or one
# that splits another dim.
AGREE, FOLLOW, MOVE = "agree", "follow", "move"


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
      rows: the collectives that send these bytes, as indices into `report.ledger`.
      alternatives: what `step.report(try_fixes=True)` compiles: `"constrain"` (the rows of what
        `source` computes), `"agree"` (the layout that all other declarations have), `"follow"` (the
        layout of the parameters for their moments), `"shard_map"` (the mode), `"end"` (one
        reduction per step) or `"owners"` (matrices of the optimizer).
      declarations: those that the fix changes, `PathRules["**/w"] of params/w`: which all others
        disagree with, or, of `"move"`, which split a dim that an operation needs; else ().
      remaining: bytes that the whole step would send with the best of them; None if not compiled.
      tried: `alternatives` were compiled; what came of it stands in `fix`.
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
    rows: tuple[int, ...] = ()
    alternatives: tuple[str, ...] = ()
    declarations: tuple[str, ...] = ()
    remaining: int | None = None
    tried: bool = False

    def __post_init__(self) -> None:
        """A report that was saved before `tried` has only the bytes of what was compiled."""
        object.__setattr__(self, "tried", self.tried or self.remaining is not None)

    @property
    def fix_title(self) -> str:
        """What stands before the fix: whether it was compiled, where bytes are to come down."""
        return "Fix" if self.tried or not self.bytes else "Fix, not tried"

    def __str__(self) -> str:
        """Returns `replicated params/w, 16.0 KiB: …`."""
        about = self.leaf or self.scope
        return f"{self.kind} {about + ', ' if about else ''}{format_bytes(self.bytes)}: {self.why}"


def row_numbers(ledger: Ledger) -> dict[int, int]:
    """`id` of a row → its index in the ledger."""
    return {id(row): number for number, row in enumerate(ledger)}


def named_shares(ledger: Ledger, findings: Sequence[Finding]) -> list[float]:
    """Share of each row of the ledger that findings are about, at most 1."""
    shares = [0.0] * len(ledger)
    for finding in findings:
        sent = {n: ledger[n].wire_bytes * _declared_share(ledger[n], finding) for n in finding.rows}
        for number, size in sent.items():
            own = (
                size / ledger[number].wire_bytes * finding.bytes / sum(sent.values()) if size else 0
            )
            shares[number] = min(1.0, shares[number] + own)
    return shares


def _declared_share(row: LedgerRow, finding: Finding) -> float:
    """Share of a row in the arrays that a finding's declarations cause; 1 where it has none."""
    sizes = row.operand_bytes
    parts = zip(sizes, row.ends, strict=True) if AGREE in finding.alternatives and row.ends else ()
    caused = sum(size for size, end in parts if end.declared_by in finding.declarations)
    return caused / sum(sizes) if caused else 1.0


def bytes_by_source(rows: Iterable[tuple[LedgerRow, float]]) -> dict[Source, float]:
    """Bytes of each line of code, the most first; rows of unknown lines are left out."""
    lines: dict[tuple[str, int], tuple[Source, float]] = {}
    for row, size in rows:
        if source := row.source:
            key = source.file, source.line
            first, before = lines.get(key, (source, 0.0))
            lines[key] = first, before + size
    return dict(sorted(lines.values(), key=lambda one: -one[1]))


def about_rows(ledger: Ledger, rows: Sequence[LedgerRow]) -> dict[str, Any]:
    """The fields of a finding about some collectives: the line that sends the most, and `rows`."""
    numbers = row_numbers(ledger)
    lines = bytes_by_source((row, row.wire_bytes) for row in rows)
    return {
        "source": next(iter(lines), None),
        "rows": tuple(dict.fromkeys(numbers[id(row)] for row in rows)),
    }
