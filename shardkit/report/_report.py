"""`Report`: what a compiled step is, to print, to save, to compare and to hold to a budget."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Self

from .._core.errors import ReportError
from .._core.io._files import local_path
from .._core.io._outputs import write_output
from ._budget import Budget, check
from ._by_source import BySource, group_by_source
from ._compare import Comparison, compare
from ._data import ReportData
from ._json import from_json, to_json
from ._read import read_program
from ._text import one_line, summary_html, to_text
from .page import to_html
from .time._profile import read_profile
from .time._trace import to_trace

if TYPE_CHECKING:
    from ..hardware import Chip
    from ._program import Program


class Report(ReportData):
    """What a compiled step is; see `ReportData` for its fields.

    Bytes and counts are *compiled*: read from the program that the compiler made for this
    platform. Nothing here is measured by running it.
    """

    @classmethod
    def of(cls, program: "Program", *, chip: "str | Chip | None" = None) -> "Report":
        """Reads a compiled step.

        Args:
          program: the compiled step.
          chip: the chip whose step time is modelled: a name in `shardkit.hardware.CHIPS`, or a
            `Chip`. By default that of the program's own device; simulated devices have none.

        Raises:
          ReportError: the hardware table has no such chip.
        """
        return cls(**vars(read_program(program, chip)))

    def check(self, budget: Budget) -> None:
        """Holds the step to a budget.

        Raises:
          BudgetError: the step exceeds the budget, or the report cannot tell.
          ReportError: the budget names an axis, a kind or a finding that does not exist.
        """
        check(self, budget)

    def by_source(self) -> BySource:
        """Returns what the step sends, by the line of code that causes it; printed, with reasons.

        Lines that findings are about come first. Each collective names what made its array, what
        reads the result, and the declaration behind it, as far as the compiled program says.
        """
        return group_by_source(self.ledger, self.findings)

    def compare(self, after: ReportData) -> Comparison:
        """Returns what changed from this report to another."""
        return compare(self, after)

    def with_profile(self, path: str | os.PathLike[str]) -> Self:
        """Returns the report with the measured time of each collective, from a profile.

        Args:
          path: a folder that `jax.profiler` or `train.profile` wrote to while the step ran, or one
            of its `.xplane.pb` files.

        Raises:
          ReportError: there is no profile, or none of this step.
        """
        return dataclasses.replace(self, measured=read_profile(path, self.ledger))

    def to_trace(self, path: str | os.PathLike[str]) -> Path:
        """Writes the modelled timeline of a step as a trace for Perfetto or `chrome://tracing`.

        Args:
          path: the `.json` file; an existing one is replaced.

        Raises:
          ReportError: no time is modelled, since the device is not in the hardware table.
          ConfigError: the file cannot be written.
        """
        if self.timeline is None:
            why = f"{self.device_kind or self.platform} is not in the hardware table"
            fix = 'step.report(chip="v5p").to_trace(path)'
            raise ReportError.of("No time is modelled.", "timeline", why, fix)
        file = local_path(path, ReportError, "The trace cannot be written.")
        write_output(file, to_trace(self.timeline, self.mesh_text))
        return file

    def __str__(self) -> str:
        """Tables of at most 100 columns, the most important first."""
        return to_text(self)

    def to_json(self) -> str:
        """Returns the report as JSON, in a versioned schema."""
        return to_json(self)

    def to_html(self) -> str:
        """Returns one self-contained page, which needs no network, as text of a `.html` file.

        It draws the mesh and each array's layout on it, memory, collectives, FLOPs and findings.
        Write it with `Path("report.html").write_text(report.to_html(), "utf-8")`.
        """
        return to_html(self)

    def __repr__(self) -> str:
        return one_line(self)

    def _repr_html_(self) -> str:
        return summary_html(self)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Reopens what `to_json` wrote.

        Raises:
          ReportError: the text is not a report, or has a version that this shardkit cannot read.
        """
        return cls(**vars(from_json(text)))
