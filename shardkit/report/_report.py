"""`Report`: everything that a declaration became, to print, to save and to hold to a budget."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from . import _json, _read
from ._budget import Budget, check
from ._html import page
from ._text import render

if TYPE_CHECKING:
    from ..hardware import Chip
    from ._program import Program
    from .communication._ledger import Ledger
    from .communication._minimum import Minimum
    from .findings._findings import Finding
    from .memory._layouts import Layout
    from .memory._memory import Memory
    from .memory._peak import Peak
    from .time._flops import Flops
    from .time._timeline import Timeline


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiled step is.

    Bytes and counts are *compiled*: read from the program that the compiler made for this
    platform. Nothing in here was measured by running it.

    Attributes:
      mesh: names and sizes of the mesh axes.
      platform: what it was compiled for: `"cpu"`, `"tpu"`, `"gpu"`.
      device_kind: the device's own name.
      ledger: every collective.
      memory: bytes per device.
      flops: FLOPs of a step, all devices together; None without a jaxpr.
      findings: what a user would want to know, the most bytes first.
      minima: textbook minimum of each axis whose kind is declared.
      reductions: axis that splits the batch → how often each gradient is reduced over it.
      leaves: every array of the step's input and how it lies on the mesh.
      advice: what would make a step that does not fit its device fit.
      compiles: how often the step was compiled.
      messages_complete: the compiler's messages are known, so that no finding is missing.
      peak: what is alive when most is; None where the program's text does not tell.
      timeline: the modelled step time; None for a device of which nothing is known.
      seconds: wall time that this machine took to `trace`, `lower` and `compile` the step, as far
        as known, and to `read` the compiled program; not part of what is compared.
    """

    mesh: tuple[tuple[str, int], ...]
    platform: str
    device_kind: str
    ledger: "Ledger"
    memory: "Memory"
    flops: "Flops | None"
    findings: "tuple[Finding, ...]"
    minima: "tuple[Minimum, ...]" = ()
    reductions: Mapping[str, float] = dataclasses.field(default_factory=dict)
    leaves: "tuple[Layout, ...]" = ()
    advice: tuple[str, ...] = ()
    compiles: int = 1
    messages_complete: bool = True
    timeline: "Timeline | None" = None
    peak: "Peak | None" = None
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, program: "Program", *, chip: "str | Chip | None" = None) -> "Report":
        """Reads a compiled step.

        Args:
          program: the compiled step.
          chip: of `shardkit.hardware.CHIPS`, by name, or another, for which its time is modelled;
            by default that of the program's own device, and no time at all for simulated ones.

        Raises:
          ReportError: there is no such chip.
        """
        return cls(**_read.read(program, chip))

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be read or counted; with any, some totals are lower bounds."""
        counted = self.flops.problems if self.flops else ()
        return self.ledger.problems + self.memory.problems + counted

    def check(self, budget: Budget) -> None:
        """Holds the step to a budget.

        Raises:
          BudgetError: something exceeds the budget, or cannot be told.
          ReportError: the budget names an axis, a kind or a finding that there is not.
        """
        check(self, budget)

    def __str__(self) -> str:
        """Tables of at most 100 columns, the most important first."""
        return render(self)

    def to_json(self) -> str:
        """Returns the report as JSON, in a schema that later versions can read."""
        return _json.write(self)

    def to_html(self) -> str:
        """Returns one self-contained page, which needs no network, as text of a `.html` file.

        It draws the mesh and each array's layout on it, memory, collectives, FLOPs and findings.
        Write it with `Path("report.html").write_text(report.to_html(), "utf-8")`.
        """
        return page(_json.write(self, indent=None))

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Reopens what `to_json` wrote.

        Raises:
          ReportError: the text is no report, or of a version that this shardkit cannot read.
        """
        return _json.made(cls, _json.read(text))
