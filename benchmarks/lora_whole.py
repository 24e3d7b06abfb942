"""Llama-3-8B and Mixtral-8x7B with low-rank adapters, whole, for machines that are not here.

    python benchmarks/lora_whole.py [NAME ...]

Adapters of rank 16 at the four products of attention, weights frozen in bf16, bf16 products, full
remat, f32 adapters and adamw state. Each is compiled by its target's own compiler
(`pip install "shardkit[tpu]"`, `"shardkit[cuda13]"`) in a child process, one at a time. Nothing
runs on these machines: bytes are compiled, times modelled.
"""

import argparse
import time
from collections.abc import Mapping
from typing import Any

import _harness

NAME = "lora_whole"
_BOTH = {
    "lora.rank": "16",
    "lora.alpha": "32",
    "lora.base_dtype": "bfloat16",
    "strategy": "fsdp",
    "strategy.precision": "bfloat16",
    "strategy.remat": "full",
    "data.seq_len": "2048",
    "data.batch_size": "16",
}
MODELS: Mapping[str, Mapping[str, str]] = {
    "llama3-8b": {"model": "llama3-8b", "model.loss_chunks": "8"},
    "mixtral-8x7b": {"model": "mixtral-8x7b"},
}
TARGETS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "v5e": ("tpu:v5e:4x4", {"mesh": "fsdp=16", "model.attention": "splash"}),
    "h100": ("gpu:h100:1x8", {"mesh": "fsdp=8"}),
}
MACHINES = {
    f"{model}_{name}": (model, target, {**_BOTH, **MODELS[model], **fields})
    for model in MODELS
    for name, (target, fields) in TARGETS.items()
}
NOTE = (
    "Bytes are compiled, times modelled. Gradients of frozen weights are neither computed nor "
    "reduced; Llama's all-reduce is that of adapters, loss and metrics. Mixtral's is the "
    "partitioner summing products of experts over fsdp instead of gathering their weights, 3.65 "
    "times the textbook minimum: a declaration to improve on, which fits. The compiler sends part "
    "of the gathers of weights as permutes. Llama's head, for a vocabulary of 128256 in 8 parts, "
    "is gathered again for each part and use, which is half of all that it sends."
)


def measure(name: str) -> dict[str, Any]:
    """Compiles for one machine and returns its row."""
    from shardkit.targets import StepSource, compile_for

    model, target, fields = MACHINES[name]
    ordered = sorted(fields, key=lambda field: field.count("."))
    start = time.perf_counter()
    report = compile_for(
        StepSource("configs/llama3_8b.py", tuple(f"{field}={fields[field]}" for field in ordered)),
        target,
        timeout=7200,
    )
    seconds = time.perf_counter() - start
    _harness.write_rows(f"{NAME}_{name}", f"{model} with adapters, {target}", report)
    memory, timeline, ledger = report.memory, report.timeline, report.ledger
    assert memory.capacity
    kinds = sorted({row.kind for row in ledger})
    return {
        "model": model,
        "machine": target,
        "mesh": fields["mesh"],
        "batch": f"{fields['data.batch_size']} × {fields['data.seq_len']}",
        "peak (GiB)": round(memory.total / 2**30, 2),
        "params (GiB)": round(memory.params / 2**30, 2),
        "moments (GiB)": round(memory.opt_state / 2**30, 3),
        "capacity (GiB)": round(memory.capacity / 2**30, 1),
        "fits": memory.total <= memory.capacity,
        "wire by kind (GiB)": ", ".join(f"{k} {ledger.total(kind=k) / 2**30:.2f}" for k in kinds),
        "model FLOPs a step": f"{report.flops.model:.3e}",
        "step (ms, modelled)": f"{timeline.low * 1e3:.0f} to {timeline.high * 1e3:.0f}",
        "findings": ", ".join(sorted({one.kind for one in report.findings})) or "none",
        "whole (s)": round(seconds),
    }


def main() -> None:
    """Compiles for the machines and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(MACHINES), metavar="NAME")
    arguments = parser.parse_args()
    kept = _harness.read_rows(NAME)
    rows = {(row["model"], row["machine"]): row for row in kept}
    for name in arguments.names:
        row = measure(name)
        rows[row["model"], row["machine"]] = row
        where = "compiled for the machines named, on a CPU"
        _harness.write(NAME, "compiled", where, list(rows.values()), NOTE)


if __name__ == "__main__":
    main()
