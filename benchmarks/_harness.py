"""Interleaved timing and result files: what every benchmark here shares.

Contestants take turns, A B C A B C …, so that a busy moment of the machine hits all of them.
A result is a JSON file with its circumstances and one row per contestant, and the same as a
short table in Markdown beside it.
"""

import ctypes
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch")
LABELS = ("measured", "compiled", "modelled")

# glibc's mallopt parameters.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one contestant's turns, and what the process spent in them.

    Attributes:
      median: wall-clock seconds.
      low: the quarter of turns below which lie the fastest, seconds.
      high: the same from above.
      cpu: median of user and system seconds of all threads.
      faults: median number of page faults.
      walls: wall-clock seconds of every turn, in order.
    """

    median: float
    low: float
    high: float
    cpu: float
    faults: int
    walls: tuple[float, ...]


def keep_freed_memory() -> None:
    """Tells glibc to keep large freed blocks for the next use instead of unmapping them.

    XLA on CPUs asks for its temporaries anew in every call; blocks of more than 32 MiB are fresh
    mappings then, and the kernel clears each page of them again. Call it before JAX is imported.
    """
    libc = ctypes.CDLL(None)
    for parameter, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)):
        if not libc.mallopt(parameter, value):
            raise OSError(f"mallopt({parameter}, {value}) was refused")


def interleave(
    contestants: Mapping[str, Callable[[], None]], turns: int, warm_up: int = 2
) -> dict[str, Timing]:
    """Runs every contestant `warm_up + turns` times in turn; each call blocks until it is done.

    Who begins changes from turn to turn, so that nobody always follows the same one.
    """
    seen: dict[str, list[tuple[float, float, int]]] = {name: [] for name in contestants}
    order = list(contestants.items())
    for turn in range(warm_up + turns):
        for name, call in (*order[turn % len(order) :], *order[: turn % len(order)]):
            used, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            call()
            wall, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
            cpu = now.ru_utime - used.ru_utime + now.ru_stime - used.ru_stime
            if turn >= warm_up:
                seen[name].append((wall, cpu, now.ru_minflt - used.ru_minflt))
    return {name: _timing(rows) for name, rows in seen.items()}


def _timing(rows: list[tuple[float, float, int]]) -> Timing:
    walls, cpus, faults = (list(column) for column in zip(*rows, strict=True))
    low, median, high = statistics.quantiles(walls, n=4)
    return Timing(
        median, low, high, statistics.median(cpus), int(statistics.median(faults)), tuple(walls)
    )


def circumstances(devices: str) -> dict[str, Any]:
    """Commit, date, versions, device kind, and how busy the machine was: beside every result."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=RESULTS,
        capture_output=True,
        text=True,
        check=True,
    )
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
        "devices": devices,
        "cores": os.cpu_count(),
        "load": [round(x, 1) for x in os.getloadavg()],
    }


def read_rows(name: str) -> list[dict[str, Any]]:
    """The rows of `results/<name>.json`; none if nothing was measured yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def write(
    name: str, label: str, devices: str, rows: list[dict[str, Any]], note: str = ""
) -> pathlib.Path:
    """Writes `results/<name>.json` and `.md`, and returns the first.

    Args:
      name: of the benchmark and its variant.
      label: `"measured"`, `"compiled"` or `"modelled"`.
      devices: what it ran on, or was compiled for.
      rows: one dict per contestant; the keys of any are the table's columns, those of the one that
        has most of them first.
      note: what a reader must know to read the numbers.
    """
    assert label in LABELS, label
    facts = circumstances(devices)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"name": name, "label": label, **facts, "note": note, "rows": rows}
    path.write_text(json.dumps(content, indent=2) + "\n")
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    fullest = max(rows, key=len)
    columns = list(dict.fromkeys([*fullest, *(key for row in rows for key in row)]))
    lines = [
        f"# {name}: {label}",
        "",
        f"{devices}; {facts['cores']} cores, load {facts['load']}; Python {facts['python']}, "
        f"{versions}; commit {facts['commit']}, {facts['date']}.",
        "",
        *([note, ""] if note else []),
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
        *("| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in rows),
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return path


def write_rows(name: str, title: str, report: Any) -> None:
    """Writes `results/<name>.md`: a ledger by axes, kind, phase and scope, the most bytes first.

    Args:
      name: of the file.
      title: what was compiled, for what.
      report: an `sk.Report`.
    """
    sums: dict[tuple[str, ...], tuple[int, int]] = {}
    for row in report.ledger:
        key = (", ".join(row.axes), row.kind, row.dtype, row.phase, row.scope or "")
        wire, trips = sums.get(key, (0, 0))
        sums[key] = wire + row.wire_bytes, trips + (row.trips or 1)
    total = report.ledger.total()
    lines = [
        f"# {title}: compiled",
        "",
        f"Wire bytes of one device and step, {total / 2**30:.2f} GiB in all; rows below 0.1 % of "
        "it are left out. What each axis sends beside its textbook minimum:",
        "",
        "| axis | wire (MiB) | minimum (MiB) | ratio |",
        "| --- | --- | --- | --- |",
        *(
            f"| {one.axis} ({one.kind}) | {one.wire / 2**20:.0f} | {one.bytes / 2**20:.0f} "
            f"| {one.ratio or 0:.2f} |"
            for one in report.minima
        ),
        "",
        "| axes | collective | dtype | phase | scope | times | wire (MiB) | share |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {' | '.join(key)} | {times} | {wire / 2**20:.1f} | {wire / total:.1%} |"
            for key, (wire, times) in sorted(sums.items(), key=lambda item: -item[1][0])
            if wire > total / 1000
        ),
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
