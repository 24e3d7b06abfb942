"""A whole sweep of a small decoder on 1, 2, 4 and 8 simulated devices, and how a plan ranks it.

    python benchmarks/sweep_cpu.py [--out FOLDER] [--rows-as-they-stand]

Every mesh of data × fsdp × tensor, compiled, held to one device's numbers and timed in turns. Rows,
table, CSV and plots go to `results/sweep_cpu`; ended at any instant, it goes on there. Times of
simulated devices are no speed claim: all of them share the host's cores. What a plan would have
chosen is held against them for what they are, with the links and peaks of a share of this machine.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import _harness
import scipy.stats

import shardkit as sk

if TYPE_CHECKING:
    from shardkit.hardware import Chip
    from shardkit.sweeps import ConfigFactory, Sweep, SweepRow

CUT = (
    "model.num_layers=2",
    "model.embed_dim=128",
    "model.num_heads=4",
    "model.kv_heads=4",
    "model.mlp_dim=256",
    "model.vocab=256",
    "data.seq_len=64",
    "data.batch_size=16",
    "optimizer.name=adamw",
)


def swept(folder: Path, factory: "ConfigFactory") -> "Sweep":
    """Sweeps, or goes on with what is there."""
    from shardkit.cli._verify import make_ragged_batches

    return sk.sweep(
        factory,
        out=folder,
        axes=("data", "fsdp", "tensor"),
        devices=(1, 2, 4, 8),
        verify=True,
        time=True,
        repeats=4,
        batches=make_ragged_batches(factory.config),
        on_row=lambda row, done, total: print(f"[{done}/{total}] {row.case.key} {row.status}"),
    )


def as_they_stand(folder: Path) -> "Sweep":
    """The rows of a folder, whatever commit they are of."""
    from shardkit.sweeps import Sweep, SweepRow

    rows = map(SweepRow.from_line, (folder / "rows.jsonl").read_text().splitlines()[1:])
    newest = {row.case.key: row for row in rows}
    return Sweep(tuple(newest.values()), folder, "Sweep of nano.py on cpu.")


def planned(rows: Sequence["SweepRow"], factory: "ConfigFactory", chip: "Chip") -> dict[str, float]:
    """Key of a row → seconds of its step by a plan's model."""
    from shardkit.planner import Network, estimate_step

    found = {}
    for row in rows:
        case = row.case
        spec = sk.MeshSpec(dcn=None, **case.sizes)
        declared = factory(spec, accumulate=case.accumulate, remat=case.remat)
        network = Network(shared(chip, case.devices))
        found[case.key] = estimate_step(declared, case.sizes, network).seconds
    return found


def shared(chip: "Chip", devices: int) -> "Chip":
    """One of several simulated devices, which share what was measured of the whole machine."""
    return dataclasses.replace(
        chip,
        flops={dtype: rate / devices for dtype, rate in chip.flops.items()},
        memory_bandwidth=chip.memory_bandwidth / devices,
        link=chip.link / devices,
        network=chip.network / devices,
    )


def ranking(rows: Sequence["SweepRow"], seconds: Mapping[str, float]) -> list[dict[str, str]]:
    """How a plan orders the rows of each number of devices, beside the naive choices."""
    table = []
    for n in sorted({row.case.devices for row in rows} - {1}):
        own = sorted((row for row in rows if row.case.devices == n), key=_measured)
        guess = [seconds[row.case.key] for row in own]
        order = scipy.stats.spearmanr(guess, list(map(_measured, own))).statistic
        first = own[guess.index(min(guess))]
        table.append(
            {
                "devices": str(n),
                "rows": str(len(own)),
                "fastest": f"{own[0].case.shown}, {1e3 * _measured(own[0]):.1f} ms",
                "Spearman": f"{order:.2f}",
                "the plan's first": f"{first.case.shown}: {_regret(first, own)}",
                **{f"all {axis}": _naive(own, axis) for axis in ("fsdp", "data")},
            }
        )
    return table


def _measured(row: "SweepRow") -> float:
    assert row.seconds is not None  # what is ok was timed
    return row.seconds


def _regret(row: "SweepRow", own: Sequence["SweepRow"]) -> str:
    return f"{_measured(row) / _measured(own[0]) - 1:+.0%}"


def _naive(own: Sequence["SweepRow"], axis: str) -> str:
    return next(_regret(row, own) for row in own if row.case.sizes[axis] == row.case.devices)


def page(found: "Sweep", table: Sequence[Mapping[str, str]], chip: "Chip") -> str:
    """The result as Markdown: the sweep's own table, and the one of the ranking."""
    load = statistics.median(row.measured["load"] for row in found.ranked)
    spread = statistics.median(_spread(row) for row in found.ranked)
    figures = f"{chip.flops['f32'] / 1e9:.0f} GFLOP/s, {chip.memory_bandwidth / 1e9:.1f} GB/s"
    lines = [
        "# A sweep of a small decoder on simulated devices",
        "",
        f"```text\n{found}\n```",
        "",
        "## The plan's order beside the measured one",
        "",
        "| " + " | ".join(table[0]) + " |",
        "| --- " * len(table[0]) + "|",
        *("| " + " | ".join(row.values()) + " |" for row in table),
        "",
        *_WHAT_IT_IS.format(load=load, spread=spread, figures=figures).splitlines(),
        "",
    ]
    return "\n".join(lines)


_WHAT_IT_IS = """\
Spearman's correlation of modelled with measured seconds, and by how much a choice is slower than
the fastest row (+0%): the plan's first, and the naive choices, all devices on `fsdp`, and all on
`data` until that does not fit (here it always does). These are times of two shared cores, at a load
of {load:.1f}; half the quartiles' distance is {spread:.0%} of a median, so smaller differences say
nothing. No link between such devices is faster than a copy, so their order foretells none of real
devices. The model has the figures of this machine as they were when the table was made
({figures}), an equal share for each device."""


def _spread(row: "SweepRow") -> float:
    timed = row.measured["step_seconds"]
    return (timed["high"] - timed["low"]) / 2 / timed["median"]


def main() -> None:
    """Sweeps, prints both tables and draws the plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=_harness.RESULTS / "sweep_cpu")
    parser.add_argument(
        "--rows-as-they-stand", action="store_true", help="only draw and score what is there"
    )
    asked = parser.parse_args()
    sk.simulate_devices(8)
    from shardkit.hardware import measure_cpu
    from shardkit.sweeps import ConfigFactory, draw_plots

    factory = ConfigFactory(str(_harness.RESULTS.parents[1] / "configs" / "nano.py"), CUT)
    found = as_they_stand(asked.out) if asked.rows_as_they_stand else swept(asked.out, factory)
    chip = measure_cpu()
    table = ranking(found.ranked, planned(found.ranked, factory, chip))
    draw_plots(found)
    text = page(found, table, chip)
    (asked.out / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
