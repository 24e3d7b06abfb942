"""`Sweep`: the rows of a sweep, ranked."""

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

from .._core.io._files import write_atomic
from .._core.io._notebook import text_html
from ..report import MEMORY_CLASSES
from ._journal import sweep_file_errors
from ._row import OK, SweepRow
from ._show import format_sweep

MEASURED, MODELLED, COMPILED = "measured step time", "modelled step time", "compiled wire bytes"
"""What rows are ranked by: the first of these figures that all rows with status ok have."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The rows of a sweep. `print` it, read its rows, or write them as CSV or plots.

    Attributes:
      rows: one for each case, in the order of the sweep.
      folder: of `rows.jsonl` and `rows.csv`.
      title: what was swept, in one line.
    """

    rows: tuple[SweepRow, ...]
    folder: Path
    title: str

    @property
    def ranked_by(self) -> str:
        """The figure that rows are ranked by."""
        done = [row for row in self.rows if row.status == OK]
        if done and all(row.seconds is not None for row in done):
            return MEASURED
        if done and all("step_seconds" in row.modelled for row in done):
            return MODELLED
        return COMPILED

    @property
    def ranked(self) -> tuple[SweepRow, ...]:
        """The rows with status ok, best first; among equals the one with the least memory first."""
        done = [row for row in self.rows if row.status == OK]
        return tuple(
            sorted(done, key=lambda row: (rank_value(row, self.ranked_by), row.total or 0))
        )

    @property
    def unranked(self) -> tuple[SweepRow, ...]:
        """The rows that are not ok, each with its reason."""
        return tuple(row for row in self.rows if row.status != OK)

    def __repr__(self) -> str:
        first = f", first {self.ranked[0].case.shown}" if self.ranked else ""
        return f"Sweep({len(self.ranked)} of {len(self.rows)} cases ranked{first})"

    def _repr_html_(self) -> str:
        return text_html(str(self))

    def __str__(self) -> str:
        """Tables of at most 100 columns: the ranked rows, and the other ones with their reasons."""
        return format_sweep(self.title, self.ranked, self.unranked, self.ranked_by)

    def to_csv(self) -> str:
        """Returns one line per row, ranked rows first, with one column per figure."""
        text = io.StringIO()
        rows = [flatten_row(row) for row in (*self.ranked, *self.unranked)]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def write_csv(self) -> Path:
        """Writes `rows.csv` into the folder, atomically.

        Raises:
          SweepError: it cannot be written.
        """
        path = self.folder / "rows.csv"
        with sweep_file_errors(path), write_atomic(path) as part:
            part.write_text(self.to_csv(), "utf-8")
        return path


def rank_value(row: SweepRow, by: str) -> float:
    """The number that a row is ranked by, the smallest best."""
    figures = {MEASURED: row.seconds, MODELLED: row.modelled.get("step_seconds")}
    value = row.wire if by == COMPILED else figures[by]
    assert value is not None  # `Sweep.ranked_by` takes a figure that all rows have
    return value


def flatten_row(row: SweepRow) -> dict[str, Any]:
    """A row as column → cell; the name of a figure begins with its origin."""
    case, compiled = row.case, row.compiled or {}
    timed = row.measured.get("step_seconds", {})
    memory = compiled.get("memory", {})
    cells = {
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
        cells[f"compiled wire bytes {axis}"] = sent["wire"]
        cells[f"compiled optimizer wire bytes {axis}"] = sent["optimizer"]
        cells[f"ratio to minimum {axis}"] = "" if sent["ratio"] is None else sent["ratio"]
    for name, n in (compiled.get("flops") or {}).items():
        cells[f"flops {name}"] = n
    cells["findings"] = "; ".join(
        f"{kind} ×{counted['count']}" for kind, counted in compiled.get("findings", {}).items()
    )
    cells["equals one device"] = "" if row.verified is None else row.verified["ok"]
    cells["reason"] = row.reason
    provenance = row.provenance
    versions = provenance.get("versions", {})
    return cells | {
        "target": row.on.get("target", ""),
        "device kind": row.on.get("device_kind", ""),
        "commit": provenance.get("commit") or "",
        "date": provenance.get("date", ""),
        "versions": " ".join(f"{name} {version}" for name, version in versions.items()),
    }
