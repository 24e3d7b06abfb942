"""Llama-2-7B widths on 64 absent TPU v5p chips: what the compiler makes of each lever.

    python benchmarks/llama_v5p.py [--layers 4] [NAME ...]

4 layers, length 2048, global batch 128, fsdp 16 x tensor 4, bf16 products, f32 weights and adamw
state, compiled by libtpu (`pip install "shardkit[tpu]"`) in child processes, one at a time; about
a minute each on two idle cores. Nothing runs on a TPU: bytes are compiled, times modelled.

Wire is what one device sends per step (ring formulae x trips); sync is the part that no compute
hides; cycles is the modelled compute time at the chip's clock, operations without an estimate
counted as their memory traffic.
"""

import argparse
import time
from collections.abc import Mapping
from typing import Any

import _harness

TARGET = "tpu:v5p:4x4x4"
CONFIG = "configs/llama2_7b.py"
STREAM = "strategy=fsdp|tensor(sequence=True)"
LEVERS: Mapping[str, tuple[str, ...]] = {
    "full remat": (STREAM, "strategy.remat=full"),
    "stream whole over tensor": ("strategy=fsdp|tensor", "strategy.remat=full"),
    "attn_out saved": (STREAM, "strategy.remat=save:attn_out"),
    "attn_out, mlp_in saved": (STREAM, "strategy.remat=save:attn_out,mlp_in"),
    "attn_out and gathered inputs saved": (STREAM, "strategy.remat=save:attn_in,mlp_in,attn_out"),
}


def measure(name: str, layers: int) -> dict[str, Any]:
    """Compiles one variant and returns its row."""
    from shardkit.hardware import CHIPS
    from shardkit.targets import Source, compile_for

    overrides = (*LEVERS[name], "strategy.precision=bfloat16", f"model.layers={layers}")
    start = time.perf_counter()
    report = compile_for(Source(CONFIG, overrides), TARGET, timeout=3600)
    seconds = time.perf_counter() - start
    ledger, timeline = report.ledger, report.timeline
    sync = sum(row.wire_bytes for row in ledger if not row.overlapped)
    ratios = {one.axis: one.ratio for one in report.minima}
    return {
        "lever": name,
        "peak (GiB)": round(report.memory.total / 2**30, 2),
        "wire (GiB)": round(ledger.total() / 2**30, 2),
        "sync (GiB)": round(sync / 2**30, 2),
        **{f"{axis} ÷ minimum": round(ratio, 2) for axis, ratio in ratios.items() if ratio},
        "cycles (M)": round(timeline.compute * CHIPS["v5p"].clock / 1e6),
        "step (ms, modelled)": round(timeline.high * 1e3),
        "MFU (modelled)": round(timeline.mfu, 3),
        "findings": len(report.findings),
        "seconds": round(seconds),
    }


def main() -> None:
    """Compiles the variants and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(LEVERS), metavar="NAME")
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.names:
        rows.append(measure(name, arguments.layers))
        where = f"compiled for {TARGET}, {arguments.layers} layers, by libtpu, on a CPU"
        _harness.write("llama_v5p", "compiled", where, rows, "Times and cycles are modelled.")


if __name__ == "__main__":
    main()
