"""`Sweep`: the rows of a sweep, ranked."""

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

from .._core.io._files import write_atomic
from ._journal import sweep_file_errors
from ._row import MEMORY_CLASSES, OK, SweepRow
from ._show import format_sweep

MEASURED, MODELLED, COMPILED = "measured step time", "modelled step time", "compiled wire bytes"
"""What rows are ranked by: the first of them that every row that is ok has."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep found. `print` it, take its rows, or write them as CSV or plots.

    Attributes:
      rows: every case that was asked for, in the order in which they were tried.
      folder: where `rows.jsonl` and `rows.csv` are.
      title: what was swept, in one line.
    """

    rows: tuple[SweepRow, ...]
    folder: Path
    title: str

    @property
    def by(self) -> str:
        """What the rows are ranked by."""
        done = [row for row in self.rows if row.status == OK]
        if done and all(row.seconds is not None for row in done):
            return MEASURED
        if done and all("step_seconds" in row.modelled for row in done):
            return MODELLED
        return COMPILED

    @property
    def ranked(self) -> tuple[SweepRow, ...]:
        """The rows that are ok, the best first; of equals the one with the least memory."""
        done = [row for row in self.rows if row.status == OK]
        return tuple(sorted(done, key=lambda row: (rank_value(row, self.by), row.total or 0)))

    @property
    def others(self) -> tuple[SweepRow, ...]:
        """The rows that are not ok, each with its reason."""
        return tuple(row for row in self.rows if row.status != OK)

    def __str__(self) -> str:
        """Tables of at most 100 columns: the ranked rows, and the others with their reasons."""
        return format_sweep(self.title, self.ranked, self.others, self.by)

    def to_csv(self) -> str:
        """Returns one line per row, ranked, the figures of a row each in a column."""
        text = io.StringIO()
        rows = [flatten_row(row) for row in (*self.ranked, *self.others)]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def write_csv(self) -> Path:
        """Writes `rows.csv` into the folder, whole or not at all.

        Raises:
          SweepError: it cannot be written.
        """
        path = self.folder / "rows.csv"
        with sweep_file_errors(path), write_atomic(path) as part:
            part.write_text(self.to_csv(), "utf-8")
        return path


def rank_value(row: SweepRow, by: str) -> float:
    """The number that a row is ranked by, the smallest best."""
    found = {MEASURED: row.seconds, COMPILED: row.wire}
    value = row.modelled.get("step_seconds") if by == MODELLED else found[by]
    assert value is not None  # `Sweep.by` has looked
    return value


def flatten_row(row: SweepRow) -> dict[str, Any]:
    """A row as the cells of a table, with the word that says where a figure is from before it."""
    case, compiled = row.case, row.compiled or {}
    timed = row.measured.get("step_seconds", {})
    memory = compiled.get("memory", {})
    found = {
        "mesh": case.shown,
        "devices": case.devices,
        **{f"axis {axis}": size for axis, size in case.mesh},
        "accumulate": case.accumulate,
        "remat": case.remat,
        "status": row.status,
        **{f"measured step {name}": value for name, value in timed.items()},
        "measured where": row.measured.get("where", ""),
        "measured warm-up seconds": row.measured.get("warm_up_seconds", ""),
        "measured compile seconds": row.measured.get("compile_seconds", {}).get("whole", ""),
        "modelled step seconds": row.modelled.get("step_seconds", ""),
        "modelled plan seconds": row.modelled.get("plan_seconds", ""),
        "modelled bytes total": row.modelled.get("memory", ""),
        "modelled wire bytes": row.modelled.get("wire", ""),
        **{f"compiled bytes {part}": memory.get(part, "") for part in (*MEMORY_CLASSES, "total")},
        "compiled wire bytes": compiled.get("wire", ""),
    }
    for axis, sent in compiled.get("axes", {}).items():
        found[f"compiled wire bytes {axis}"] = sent["wire"]
        found[f"ratio to minimum {axis}"] = "" if sent["ratio"] is None else sent["ratio"]
    for name, n in (compiled.get("flops") or {}).items():
        found[f"flops {name}"] = n
    found["findings"] = "; ".join(
        f"{kind} ×{one['count']}" for kind, one in compiled.get("findings", {}).items()
    )
    found["equals one device"] = "" if row.verified is None else row.verified["ok"]
    found["reason"] = row.reason
    said = row.circumstances
    versions = " ".join(f"{name} {version}" for name, version in said.get("versions", {}).items())
    return found | {
        "target": row.on.get("target", ""),
        "device kind": row.on.get("device_kind", ""),
        "commit": said.get("commit") or "",
        "date": said.get("date", ""),
        "versions": versions,
    }
