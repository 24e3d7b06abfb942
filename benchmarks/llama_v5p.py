"""Llama-2-7B widths on 64 absent TPU v5p chips: what the compiler makes of each lever.

    python benchmarks/llama_v5p.py [--layers 4] [NAME ...]

4 layers, length 2048, global batch 128, fsdp 16 x tensor 4, bf16 products, f32 weights and adamw
state, compiled by libtpu (`pip install "shardkit[tpu]"`) in child processes, one at a time; about
a minute each on two idle cores. Nothing runs on a TPU: bytes are compiled, times modelled.

Each variant differs from `base` by what its name says. Wire is what one device sends per step
(ring formulae x trips); sync is the part that no compute hides; peak is the compiler's; cycles is
the sum of its estimates x trips, operations without one (kernels) counted as their memory traffic.
Variants that were compiled before stay in the result, so a part of the table can be made anew.
"""

import argparse
import time
from collections.abc import Mapping
from typing import Any

import _harness

TARGET = "tpu:v5p:4x4x4"
CONFIG = "configs/llama2_7b.py"
NAME = "llama_v5p"
BASE = {
    "strategy": "fsdp|tensor(sequence=True)",
    "strategy.remat": "save:attn_out",
    "strategy.precision": "bfloat16",
    # Products are never cut into steps that hide permutes: the cuts cost more than they hide.
    "compile.options": "xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",
}
GATHERED = "save:attn_in,mlp_in,attn_out"
KEPT = "fsdp(reshard_after_forward=False)|tensor(sequence=True)"
LEVERS: Mapping[str, Mapping[str, str]] = {
    "base": {},
    "windowed einsum on": {"compile.options": ""},
    "full remat": {"strategy.remat": "full"},
    "stream whole over tensor": {"strategy": "fsdp|tensor", "strategy.remat": "save:attn_out"},
    "mlp_in saved": {"strategy.remat": "save:mlp_in,attn_out"},
    "gathered inputs saved": {"strategy.remat": GATHERED},
    "weights kept gathered": {"strategy": KEPT},
    "loss in 1 chunk": {"model.loss_chunks": "1"},
    "loss in 32 chunks": {"model.loss_chunks": "32"},
    "attention not blocked": {"model.attention": "xla"},
    "splash": {"model.attention": "splash"},
    "splash, mlp_in saved": {"model.attention": "splash", "strategy.remat": "save:mlp_in,attn_out"},
    "splash, gathered inputs saved": {"model.attention": "splash", "strategy.remat": GATHERED},
    "splash, gathered inputs saved, weights kept": {
        "model.attention": "splash",
        "strategy": KEPT,
        "strategy.remat": GATHERED,
    },
    "splash, windowed einsum on": {"model.attention": "splash", "compile.options": ""},
}
# Variants whose wire is laid open row by row, and the file that it goes to.
ROWS = {"base": "rows", "splash, gathered inputs saved, weights kept": "least_rows"}
NOTE = (
    "MaxText with the same widths, mesh and compiler: splash attention 1.78 GiB peak, 6.86 GiB "
    "wire, 4.24 sync, 164 M cycles; dot-product attention 2.36, 6.86, 4.24, 221 M. "
    "What the wire consists of: llama_v5p_rows.md. 3.00 GiB are the 8 collectives of each layer, "
    "0.38 those of embedding, last norm and loss, 1.29 fsdp's gathers and scatters. base sends "
    "0.75 more, the inputs of branches gathered again for weight gradients: saving them (gathered "
    "inputs saved) takes 1 GiB of peak, saving one of the two (mlp_in saved) half of that for "
    "half of it. Weights kept from forward to backward save another 0.36. So an aim of 4.5 GiB "
    "of wire is met at 3.3 GiB of peak (last but one row: 4.31), one of 1.75 GiB of peak at "
    "5.0 GiB of wire (splash, mlp_in saved): each layer's gathered inputs are 256 MiB. On v5p "
    "gathers and scatters are synchronous operations; only windowed einsum makes part of them "
    "asynchronous, for 57 to 61 M cycles more: synchronous wire of 4.2 GiB is not reached (4.31 "
    "with weights kept, 4.33 with windowed einsum). Whole streams over tensor send the least, as "
    "saved activations are not gathered again, at 4 times their memory. Whole is the child, with "
    "imports, tracing and reading; compile is libtpu alone. MFU counts as recomputation what a "
    "backward pass by hand computes again (in older rows put right afterwards). But for base, "
    "seconds are of a machine that was busy with other work."
)


def measure(name: str, layers: int) -> dict[str, Any]:
    """Compiles one variant and returns its row."""
    from shardkit.hardware import CHIPS
    from shardkit.targets import StepSource, compile_for

    fields = {**BASE, "model.num_layers": str(layers), **LEVERS[name]}
    # A strategy is replaced as a whole, so it comes before its own fields.
    ordered = sorted(fields, key=lambda field: field.count("."))
    start = time.perf_counter()
    report = compile_for(
        StepSource(CONFIG, tuple(f"{field}={fields[field]}" for field in ordered)),
        TARGET,
        timeout=3600,
    )
    seconds = time.perf_counter() - start
    ledger, timeline = report.ledger, report.timeline
    if name in ROWS:
        _harness.write_rows(f"{NAME}_{ROWS[name]}", f"{name}, {TARGET}, {layers} layers", report)
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
        "findings": ", ".join(sorted({one.kind for one in report.findings})),
        "whole (s)": round(seconds),
        "compile (s)": round(report.seconds["compile"]),
    }


def main() -> None:
    """Compiles the variants and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(LEVERS), metavar="NAME")
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    kept = _harness.read_rows(NAME)
    # Older rows hold one number of seconds, that of the whole child.
    renamed = [{"whole (s)" if key == "seconds" else key: row[key] for key in row} for row in kept]
    rows = {row["lever"]: row for row in renamed if row["lever"] in LEVERS}
    for name in arguments.names:
        rows[name] = measure(name, arguments.layers)
        where = f"compiled for {TARGET}, {arguments.layers} layers, by libtpu, on a CPU"
        ordered = [rows[one] for one in LEVERS if one in rows]
        _harness.write(NAME, "compiled", where, ordered, NOTE)


if __name__ == "__main__":
    main()
