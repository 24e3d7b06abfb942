"""Llama-2-7B whole, 32 layers, for four machines that are not here.

    python benchmarks/llama_whole.py [NAME ...]

Length 2048, bf16 products, f32 weights and adamw state. Each is compiled by its target's own
compiler (`pip install "shardkit[tpu]"`, `"shardkit[cuda13]"`) in a child process, one at a time.
Nothing runs on these machines: bytes are compiled, times modelled. Seconds and host memory are the
child's: of the whole (with imports and tracing), of the compiler alone, and of what reads the
compiled program for ledger, memory, findings and timeline.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import _harness
from llama_v5p import BASE

CONFIG = "configs/llama2_7b.py"
NAME = "llama_whole"
V5P = {**BASE, "model.attention": "splash"}
MACHINES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "v5p_fsdp_tensor": ("tpu:v5p:4x4x4", V5P),
    "v5p_fsdp": ("tpu:v5p:4x4x4", {**V5P, "strategy": "fsdp", "mesh": "fsdp=64"}),
    "h100": (
        "gpu:h100:1x8x8",
        {
            "mesh": "fsdp=8,tensor=8",
            "strategy": BASE["strategy"],
            "strategy.remat": BASE["strategy.remat"],
            "strategy.precision": "bfloat16",
        },
    ),
    "v5p_6144": (
        "tpu:v5p:16x16x24",
        {
            **V5P,
            "strategy": "data|fsdp|tensor(sequence=True)",
            "mesh": "data=24,fsdp=64,tensor=4",
            "data.batch_size": "3072",
        },
    ),
}

NOTE = (
    "Times are modelled. Where an axis sends more than 1.1 times its textbook minimum: tensor "
    "1.27 is the normed input of each branch, gathered again for the gradient of its weights (2 "
    "gathers beside 8 collectives a layer; saving the gathered inputs would take 128 MiB a branch "
    "and layer on v5p), and 1/(2 x 32) for embedding and loss. fsdp 1.97 over all 64 chips of the "
    "slice is the compiler's own choice to gather weights and scatter gradients by all-reduce, "
    "which sends twice the bytes; over 64 of 6144 chips, with data and tensor beside it, the same "
    "declaration is gathered and scattered at 1.00. read is the time that ledger, memory, findings "
    "and timeline take to be read out of the compiled program. MFU counts as recomputation what a "
    "backward pass by hand computes again (in older rows put right afterwards)."
)


def measure(name: str) -> dict[str, Any]:
    """Compiles for one machine and returns its row."""
    from shardkit.targets import StepSource, compile_for

    target, fields = MACHINES[name]
    ordered = sorted(fields, key=lambda field: field.count("."))
    start = time.perf_counter()
    report = compile_for(
        StepSource(CONFIG, tuple(f"{field}={fields[field]}" for field in ordered)),
        target,
        timeout=3600,
    )
    seconds = time.perf_counter() - start
    host = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    _harness.write_rows(f"{NAME}_{name}", f"Llama-2-7B, {fields.get('mesh', '')} {target}", report)
    memory, timeline, ledger = report.memory, report.timeline, report.ledger
    assert memory.capacity
    return {
        "machine": target,
        "mesh": fields.get("mesh", "fsdp=16,tensor=4"),
        "batch": int(fields.get("data.batch_size", "128")),
        "peak (GiB)": round(memory.total / 2**30, 2),
        "capacity (GiB)": round(memory.capacity / 2**30, 1),
        "fits": memory.total <= memory.capacity,
        "wire by axis (GiB)": ", ".join(
            f"{axis} {ledger.total(axis=axis) / 2**30:.2f}" for axis in dict(report.mesh)
        ),
        "÷ minimum": ", ".join(f"{m.axis} {m.ratio:.2f}" for m in report.minima if m.ratio),
        "step (ms, modelled)": f"{timeline.low * 1e3:.0f} to {timeline.high * 1e3:.0f}",
        "MFU (modelled)": f"{timeline.mfu:.3f} to {timeline.best_mfu:.3f}",
        "findings": ", ".join(sorted({one.kind for one in report.findings})) or "none",
        "whole (s)": round(seconds),
        "compile (s)": round(report.seconds["compile"]),
        "read (s)": round(report.seconds["read"], 1),
        "host (GiB)": round(host, 1),
    }


def main() -> None:
    """Compiles for the machines and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(MACHINES), metavar="NAME")
    arguments = parser.parse_args()
    kept = _harness.read_rows(NAME)
    rows = {(row["machine"], row["mesh"]): row for row in kept}
    for name in arguments.names:
        if len(arguments.names) > 1:  # a process each, or its peak is the largest so far
            subprocess.run([sys.executable, __file__, name], check=True)
            continue
        row = measure(name)
        rows[row["machine"], row["mesh"]] = row
        where = "compiled for the machines named, on a CPU"
        _harness.write(NAME, "compiled", where, list(rows.values()), NOTE)


if __name__ == "__main__":
    main()
