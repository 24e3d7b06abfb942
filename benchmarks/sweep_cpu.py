"""A whole sweep of a small decoder on 1, 2, 4 and 8 simulated devices.

    python benchmarks/sweep_cpu.py [--out FOLDER]

Every mesh of data × fsdp × tensor, compiled, held to one device's numbers and timed in turns. Rows,
table, CSV and plots go to `results/sweep_cpu`; ended at any instant, it goes on there. Times of
simulated devices are no speed claim: all of them share the host's cores.
"""

import argparse
from pathlib import Path

import _harness

import shardkit as sk

CUT = (
    "model.layers=2",
    "model.embed=128",
    "model.heads=4",
    "model.kv_heads=4",
    "model.mlp=256",
    "model.vocab=256",
    "data.length=64",
    "data.batch=16",
    "optimizer.name=adamw",
)


def main() -> None:
    """Sweeps, prints the table and draws the plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=_harness.RESULTS / "sweep_cpu")
    asked = parser.parse_args()
    sk.simulate_devices(8)
    from shardkit.cli._verify import ragged_batches
    from shardkit.sweep import ConfigFactory, plots

    root = Path(__file__).parent.parent
    factory = ConfigFactory(str(root / "configs" / "nano.py"), CUT)
    found = sk.sweep(
        factory,
        out=asked.out,
        axes=("data", "fsdp", "tensor"),
        devices=(1, 2, 4, 8),
        verify=True,
        time=True,
        turns=4,
        batches=ragged_batches(factory.config),
        on_row=lambda row, done, total: print(f"[{done}/{total}] {row.case.key} {row.status}"),
    )
    plots(found)
    text = f"# A sweep of a small decoder on simulated devices\n\n```text\n{found}\n```\n"
    (asked.out / "README.md").write_text(text)
    print(found)


if __name__ == "__main__":
    main()
