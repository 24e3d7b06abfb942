"""Remat × batch × accumulation on one GPU: which of them fits, and which is the fastest.

python benchmarks/sweep_gpu.py [--model llama2-7b --layers 4] [--batches 8,16,32] [FOLDER]

Runs on the first device that JAX finds, so on a machine without a GPU it does the same on one CPU
device (take `--model nano --length 64` there). One sweep per batch size, since a batch is not what
a sweep varies; what runs out of memory is a row. Times are measured on the device.
"""

import argparse
from pathlib import Path
from typing import Any

import _harness

import shardkit as sk


def arguments() -> argparse.Namespace:
    """What to sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=_harness.RESULTS / "sweep_gpu")
    parser.add_argument("--model", default="llama2-7b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batches", default="8,16,32")
    parser.add_argument("--accumulate", default="1,2,4")
    parser.add_argument("--remat", default="none,dots,full")
    parser.add_argument("--precision", default="bfloat16")
    return parser.parse_args()


def swept(asked: argparse.Namespace, batch: int) -> list[dict[str, Any]]:
    """Sweeps one batch size and returns its rows for the result."""
    from shardkit.cli._verify import make_ragged_batches
    from shardkit.sweeps import ConfigFactory

    overrides = (
        f"model={asked.model}",
        f"model.num_layers={asked.layers}",
        f"data.seq_len={asked.length}",
        f"data.batch_size={batch}",
        f"strategy.precision={asked.precision}",
        "optimizer.name=adamw",
    )
    factory = ConfigFactory("", overrides)
    found = sk.sweep(
        factory,
        out=asked.folder / f"batch-{batch}",
        devices=1,
        accumulate=[int(k) for k in asked.accumulate.split(",")],
        remat=asked.remat.split(","),
        time=True,
        batches=make_ragged_batches(factory.config),
        on_row=lambda row, done, total: print(f"[{done}/{total}] {row.case.key} {row.status}"),
    )
    print(found)
    tokens = batch * asked.length
    return [
        {
            "batch": batch,
            "accumulate": row.case.accumulate,
            "remat": row.case.remat,
            "status": row.status,
            "ms": round(1e3 * row.seconds, 2) if row.seconds else "",
            "tokens/s": round(tokens / row.seconds) if row.seconds else "",
            "compiled MiB": round(row.total / 2**20) if row.total else "",
            "compile s": round(row.measured.get("compile_seconds", {}).get("whole", 0), 1),
            "why": row.reason,
        }
        for row in (*found.ranked, *found.unranked)
    ]


def main() -> None:
    """Sweeps every batch size and writes one table."""
    import jax

    asked = arguments()
    device = jax.devices()[0].device_kind
    rows = [row for size in asked.batches.split(",") for row in swept(asked, int(size))]
    note = f"{asked.model}, {asked.layers} layers, length {asked.length}, {asked.precision}."
    platform = jax.devices()[0].platform
    name = "sweep_gpu" if platform == "gpu" else f"sweep_one_{platform}"
    _harness.write(name, "measured", device, rows, note)


if __name__ == "__main__":
    main()
