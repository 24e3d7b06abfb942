"""A whole sweep of the nano config, cut small, on 8 simulated devices.

python benchmarks/sweep_cpu.py [--verify] [--out FOLDER]

Every mesh of data × fsdp × tensor on 1 and on 8 devices, compiled and timed in turns, and
with `--verify` held to one device's numbers. Rows, table, CSV and plots go to
`results/sweep_cpu`; ended at any instant, it goes on there. Times of simulated devices are no speed
claim: all of them share two cores.
"""

import argparse
from pathlib import Path

import _harness

import shardkit as sk

CUT = (
    "model.layers=2",
    "model.embed=32",
    "model.mlp=64",
    "model.vocab=256",
    "data.length=32",
    "optimizer.name=adamw",
)


def main() -> None:
    """Sweeps, prints the table and draws the plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=_harness.RESULTS / "sweep_cpu")
    parser.add_argument("--verify", action="store_true")
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
        devices=(1, 8),
        verify=asked.verify,
        time=True,
        batches=ragged_batches(factory.config),
        on_row=lambda row, done, total: print(f"[{done}/{total}] {row.case.key} {row.status}"),
    )
    plots(found)
    (asked.out / "README.md").write_text(f"# A sweep of nano, cut small\n\n```text\n{found}\n```\n")
    print(found)


if __name__ == "__main__":
    main()
