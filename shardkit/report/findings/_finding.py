"""What a finding is, and what every search for findings may look at."""

import dataclasses

from ..._core.tree import format_bytes
from .._program import Program
from ..communication._ledger import Ledger

# A collective this small costs its latency, whatever its dtype or reason.
SMALL = 1024


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something in a compiled step that a user would want to know.

    Attributes:
      kind: one of `FINDINGS`.
      leaf: path of the leaf it is about, with its part: `opt_state/0/mu/w`; or "".
      scope: the model's scope it is about, or "".
      axes: mesh axes involved.
      bytes: what it costs on one device: held for memory, sent per step for collectives.
      why: what is the case, with numbers.
      fix: what to change, as code where possible.
    """

    kind: str
    leaf: str
    scope: str
    axes: tuple[str, ...]
    bytes: int
    why: str
    fix: str

    def __str__(self) -> str:
        """Returns `replicated params/w, 16.0 KiB: …`."""
        about = self.leaf or self.scope
        return f"{self.kind} {about + ', ' if about else ''}{format_bytes(self.bytes)}: {self.why}"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What every search for findings may look at."""

    program: Program
    ledger: Ledger

    @property
    def rows_over(self) -> set[str]:
        """Mesh axes that split the rows of the batch."""
        leaves = self.program.leaves
        return {axis for leaf in leaves if leaf.part == "batch" for axis in leaf.axes()}
