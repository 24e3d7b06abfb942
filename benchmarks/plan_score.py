"""How right a plan is, beside the target's own compiler, row by row.

    python benchmarks/plan_score.py FOLDER --rows 64
    python benchmarks/plan_score.py FOLDER --score

Each row is one compile in a child process; rows that FOLDER/rows.jsonl has already are skipped, so
a run that was ended goes on. Layouts are drawn evenly, without looking at their figures, from all
that a plan considers. `--score` prints the tables from the rows alone.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardkit.plan import Candidate, Space, compiled, plan
from shardkit.targets import Source

TARGETS = ("tpu:v5p:2x2x2", "tpu:v5e:4x4", "tpu:v6e:2x4", "tpu:v5p:4x4x4")
MODELS: Mapping[str, tuple[str, ...]] = {
    "wide": ("model.embed=1024", "model.heads=8", "model.mlp=2816", "model.vocab=8192"),
    "long": ("model.embed=512", "model.heads=8", "model.mlp=1408", "data.length=2048"),
    "vocab": ("model.embed=512", "model.heads=8", "model.mlp=1408", "model.vocab=65536"),
}
COMMON = ("model.layers=4", "data.batch=64", "data.length=512", "optimizer.name=adamw")
SPACE = Space(accumulate=(1, 2), reduce=("each",), zero=(0, 1), max_size={"tensor": 8})
Row = dict[str, Any]


def cases(per_sweep: int) -> Iterator[tuple[str, str, Source, Candidate]]:
    """Layouts of every model on every target, evenly from all of a plan."""
    for name, changes in MODELS.items():
        for target in TARGETS:
            fields = dict(one.split("=", 1) for one in (*COMMON, *changes))
            text = tuple(f"{field}={value}" for field, value in fields.items())
            source = Source("", text)
            loaded = source.load()
            low = dataclasses.replace(loaded.strategy, precision="bfloat16")
            made = plan(dataclasses.replace(loaded, strategy=low), target, space=SPACE)
            every = sorted((*made.rows, *made.tight), key=lambda c: (str(c.mesh), c.remat, str(c)))
            naive = [c for c in (baseline(every, "fsdp"), baseline(every, "data")) if c]
            chosen = every[:: max(1, len(every) // per_sweep)][: max(0, per_sweep - 3)]
            for one in dict.fromkeys(map(str, (made.best, *naive, *chosen))):
                yield name, target, source, next(c for c in every if str(c) == one)


def baseline(candidates: Sequence[Candidate], axis: str) -> Candidate | None:
    """All devices on one axis, with the remat that takes least memory if it is needed."""
    own = [
        c
        for c in candidates
        if {a for a, n in c.mesh.items() if n > 1} == {axis}
        and (c.zero, c.accumulate.steps) == (0, 1)
    ]
    fit = [c for c in own if c.margin >= 0]
    return min(fit, key=lambda c: c.seconds) if fit else None


def measure(name: str, target: str, source: Source, one: Candidate) -> Row:
    """One compile beside its estimate."""
    low = Source(source.name, source.overrides)
    made = compiled(one, low, target, None, precision="bfloat16")
    return {
        "case": f"{name} {target} {one}",
        "sweep": f"{name} {target}",
        "baseline": [
            a for a in ("fsdp", "data") if {x for x, n in one.mesh.items() if n > 1} == {a}
        ],
        "predicted": {
            "state": one.state,
            "temp": one.temp,
            "seconds": one.seconds,
            "wire": dict(one.wire),
        },
        "compiled": made.compiled,
        "failed": made.failed,
        "kind": "modelled beside compiled",
    }


def error(predicted: float, true: float) -> float:
    """Relative error, of the truth."""
    return abs(predicted - true) / true if true else float(predicted != 0)


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks, ties in order."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    return [float(order.index(i)) for i in range(len(values))]


def score(rows: Sequence[Row]) -> str:
    """Median and worst error by class, and how each sweep is ranked."""
    good = [row for row in rows if row["compiled"]]
    lines = [
        f"{len(good)} cases, {len(rows) - len(good)} not compiled",
        "",
        "| class | median | worst |",
    ]
    lines.append("|---|---|---|")
    classes: dict[str, Callable[[Row], float]] = {
        "state": lambda r: error(r["predicted"]["state"], r["compiled"]["state"]),
        "activations and temporaries": lambda r: error(
            r["predicted"]["temp"], r["compiled"]["temp"]
        ),
        "wire, all axes": lambda r: error(
            sum(r["predicted"]["wire"].values()), sum(r["compiled"]["wire"].values())
        ),
    }
    for what, of in classes.items():
        found = [of(row) for row in good]
        lines.append(f"| {what} | {statistics.median(found):.1%} | {max(found):.1%} |")
    lines += [
        "",
        "| sweep | cases | Spearman | regret | all fsdp | all data |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_ranking(sweep, good) for sweep in dict.fromkeys(r["sweep"] for r in good)]
    return "\n".join(lines)


def _ranking(sweep: str, rows: Sequence[Row]) -> str:
    own = [row for row in rows if row["sweep"] == sweep]
    guess = [row["predicted"]["seconds"] for row in own]
    true = [row["compiled"]["seconds"] for row in own]
    best = min(true)
    regret = true[guess.index(min(guess))] / best - 1
    naive = []
    for axis in ("fsdp", "data"):
        times = [t for t, row in zip(true, own, strict=True) if axis in row["baseline"]]
        naive.append(f"{min(times) / best - 1:.1%}" if times else "-")
    rho = statistics.correlation(ranks(guess), ranks(true)) if len(own) > 2 else float("nan")
    return f"| {sweep} | {len(own)} | {rho:.2f} | {regret:.1%} | {naive[0]} | {naive[1]} |"


def main() -> None:
    """Makes the rows that are missing, or scores those that are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--per-sweep", type=int, default=8)
    parser.add_argument("--score", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not arguments.score:
        done = {row["case"] for row in rows}
        for case in cases(arguments.per_sweep):
            if len(rows) >= arguments.rows:
                break
            name, target, _, one = case
            if f"{name} {target} {one}" in done:
                continue
            rows.append(measure(*case))
            with path.open("a") as out:
                out.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1]["case"], rows[-1]["failed"] or "compiled", flush=True)
    print(score(rows))


if __name__ == "__main__":
    main()
