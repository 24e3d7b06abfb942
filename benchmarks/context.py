"""Memory of one absent TPU v5p chip of 64 against the global length, with the length split.

    python benchmarks/context.py [NAME ...] [--target cpu:64]

Two layers, embed 1024, 16 heads of width 128 on 4 key heads, bf16, full remat, one row for every
`context` chips, the other axis `data`. All-to-all stops at 16 chips, one head each. Compiled by
libtpu (`pip install "shardkit[tpu]"`), or for simulated devices, in child processes, one at a time;
nothing runs. Without names it compiles what the result does not hold yet, row by row.

Temp is what the step needs besides weights, optimizer state and batch: activations, blocks under
way, gradients. Unsplit rows are attended to in at most eight blocks of queries, whose f32 logits
grow with the square of the length: that column is modelled, heads x length x length / 8 x 4 bytes.
"""

import argparse
import time
from typing import Any

import _harness

TARGETS, CHIPS = {"tpu:v5p:4x4x4": "context", "cpu:64": "context_cpu"}, 64
LAYERS, EMBED, HEADS, KEY_HEADS, WIDTH = 2, 1024, 16, 4, 128
MODEL = (
    f"model.num_layers={LAYERS}",
    f"model.embed_dim={EMBED}",
    f"model.num_heads={HEADS}",
    f"model.kv_heads={KEY_HEADS}",
    f"model.head_dim={WIDTH}",
    "model.mlp_dim=4096",
    "strategy.remat=full",
    "strategy.precision=bfloat16",
)
WAYS = {"ring": "context", "all_to_all": "context(attention='all_to_all', kv_heads='replicate')"}
# Length per chip, chips that share a row.
SPLITS = (
    *((1024, 8), (128, 64), (1024, 64), (4096, 64)),
    *((16_384, 8), (16_384, 16), (16_384, 32), (16_384, 64)),
)
CASES = {
    **{
        f"{way} {own * n}/{n}": (way, own, n)
        for own, n in SPLITS
        for way in WAYS
        if way == "ring" or n <= HEADS
    },
    "full 8192/1": ("full", 8192, 1),
    "full 16384/1": ("full", 16_384, 1),
}

NOTE = (
    "Full logits are modelled. Beyond the minimum go the exchanges that full remat makes again "
    "and, round the ring, gradients of blocks in f32: 5/3 of it, and the swap into zig-zag order; "
    "all-to-all 3/2, and 2 where 4 key heads are copied to 16 chips. Before tiles' masks were kept "
    "out of the layers' residuals, all-to-all took 17.0 GiB at 131,072 over 8 chips, and the ring "
    "3.13 at 1,048,576 over 64."
)


def measure(target: str, way: str, own: int, n: int) -> dict[str, Any]:
    """Compiles one case and returns its row."""
    from shardkit.targets import StepSource, compile_for

    length = own * n
    strategy = f"data | {WAYS[way]}" if way in WAYS else "data"
    overrides = (
        *MODEL[:-2],
        f"strategy={strategy}",
        *MODEL[-2:],
        f"data.seq_len={length}",
        f"data.batch_size={CHIPS // n}",
        f"mesh=data={CHIPS // n},context={n}" if way in WAYS else f"mesh=data={CHIPS}",
    )
    start = time.perf_counter()
    report = compile_for(StepSource("", overrides), target, timeout=3600)
    ledger = report.ledger
    ratios = {one.axis: one.ratio for one in report.minima}
    return {
        "attention": way,
        "length": length,
        "context": n,
        "length per chip": own,
        "temp (GiB)": round((report.memory.temp or 0) / 2**30, 3),
        "full logits (GiB, modelled)": round(HEADS * length * length / 8 * 4 / 2**30, 2),
        "wire over context (GiB)": round(ledger.total("context") / 2**30, 3) if n > 1 else 0,
        "÷ minimum": round(ratios["context"], 2) if ratios.get("context") else "",
        "findings": len(report.findings),
        "seconds": round(time.perf_counter() - start),
    }


def main() -> None:
    """Compiles the cases and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--target", choices=TARGETS, default="tpu:v5p:4x4x4")
    arguments = parser.parse_args()
    result = TARGETS[arguments.target]
    found = _harness.read_rows(result)
    rows = {f"{row['attention']} {row['length']}/{row['context']}": row for row in found}
    for name in arguments.names or [case for case in CASES if case not in rows]:
        rows[name] = measure(arguments.target, *CASES[name])
        where = f"compiled for {arguments.target}, {LAYERS} layers, on a CPU"
        ordered = [rows[case] for case in CASES if case in rows]
        _harness.write(result, "compiled", where, ordered, NOTE)


if __name__ == "__main__":
    main()
