"""A sweep under way: what no row tells yet is compiled, and then timed, row by row."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..step import CompiledStep
from ._attempt import CaseRunner, is_done
from ._case import SweepCase
from ._journal import Journal
from ._row import OK, SweepRow
from ._timing import time_rows

OnRow = Callable[[SweepRow, int, int], None]


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """A sweep under way: what it tries, and where it writes."""

    journal: Journal
    attempts: CaseRunner
    wanted: Sequence[SweepCase]
    on_row: OnRow

    def compile(self, *, verify: bool, timed: bool) -> dict[str, CompiledStep]:
        """Tries what no row tells yet; returns the steps that are to be timed."""
        rows, steps = self.journal.rows, {}
        todo = [c for c in self.wanted if not is_done(rows.get(c.key), prove=verify, timed=timed)]
        for done, case in enumerate(todo, len(self.wanted) - len(todo) + 1):
            row, step = self.attempts.try_case(case, rows.get(case.key))
            self.journal.add(row)
            self.on_row(rows[case.key], done, len(self.wanted))
            if timed and step is not None and row.status == OK:
                steps[case.key] = step
        return steps

    def time(
        self,
        steps: Mapping[str, CompiledStep],
        batches: Sequence[Any] | None,
        repeats: int,
        steps_per_repeat: int,
    ) -> None:
        """Times steps in turns."""
        rows = {key: self.journal.rows[key] for key in steps}
        for done, row in enumerate(time_rows(rows, steps, batches, repeats, steps_per_repeat), 1):
            self.journal.add(row)
            self.on_row(row, done, len(steps))
