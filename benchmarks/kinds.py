"""Every kind of parallelism, compiled for a TPU and a GPU: what is sent, against the textbook.

python benchmarks/kinds.py TARGET [NAME …] [--layers 4]

TARGET is a key of `TARGETS`; run it where `jax[tpu]` or `jax[cuda13]` is installed. Without names
it compiles the kinds that the result does not hold yet, and each is written as it is done, so that
a run that was ended goes on; where none is missing, the page is written anew from its rows.
"""

import argparse
import math
import time
from collections.abc import Mapping
from typing import Any

import _harness

# Target → devices. One slice of chips with a torus, and one host of GPUs.
TARGETS = {"tpu:v5p:4x4x4": 64, "gpu:h100:1x8": 8, "tpu:v5e:2x4": 8, "cpu:8": 8}

# Kind → strategy as the command line reads it, and mesh, where N is what the other axes leave over.
KINDS: dict[str, tuple[str, str]] = {
    "data": ("data", "data=N"),
    "ZeRO-1": ("zero", "data=N"),
    "ZeRO-2": ("zero(stage=2)", "data=N"),
    "fsdp": ("fsdp", "fsdp=N"),
    "fsdp, weights kept": ("fsdp(reshard_after_forward=False)", "fsdp=N"),
    "HSDP": ("data|fsdp", "data=2,fsdp=N"),
    "tensor": ("data|tensor", "data=N,tensor=4"),
    "tensor + sequence": ("data|tensor(sequence=True)", "data=N,tensor=4"),
    "context, ring": ("data|context", "data=N,context=4"),
    "context, all-to-all": ('data|context(attention="all_to_all")', "data=N,context=4"),
    "pipeline, 1F1B": ("data|pipeline(micro_batches=4)", "data=N,pipe=4"),
    "pipeline × tensor": ("data|pipeline(micro_batches=4)|tensor", "data=N,pipe=2,tensor=2"),
    "pipeline × context": ("data|pipeline(micro_batches=4)|context", "data=N,pipe=2,context=2"),
    "pipeline × experts": ("data|pipeline(micro_batches=2)|expert", "data=N,pipe=2,expert=2"),
    "ZeRO-2 × tensor": ("zero(stage=2)|tensor(sequence=True)", "data=N,tensor=4"),
    "ZeRO-2 × fsdp": ("zero(stage=2)|fsdp", "data=2,fsdp=N"),
    "fsdp × tensor + sequence": ("fsdp|tensor(sequence=True)", "fsdp=N,tensor=4"),
    "experts": ("data|expert", "data=N,expert=4"),
    "experts, dropless": ("data|expert", "data=N,expert=4"),
    "fsdp × experts × tensor, dropless": ("fsdp|expert|tensor", "fsdp=N,expert=2,tensor=2"),
    "fsdp × experts × tensor": ("fsdp|expert|tensor", "fsdp=N,expert=2,tensor=2"),
    "shard_map: data": ("data", "data=N"),
    "shard_map: ZeRO-1": ("zero", "data=N"),
    "shard_map: fsdp": ("fsdp", "fsdp=N"),
    "shard_map: fsdp × tensor + sequence": ("fsdp|tensor(sequence=True)", "fsdp=N,tensor=4"),
}

# What a kind's model has besides `SIZES`.
EXPERTS = ("model.experts=8", "model.expert_mlp=384")
BOUNDED = (*EXPERTS, "model.capacity_factor=1.0")
MODELS = {
    "experts": BOUNDED,
    "experts, dropless": EXPERTS,
    "fsdp × experts × tensor, dropless": EXPERTS,
    "fsdp × experts × tensor": BOUNDED,
    "pipeline × experts": BOUNDED,
}

# What lies behind a ratio above 1.1 besides the column of what is beyond the minimum: kind →
# compiler → why. Read off the rows of the ledgers by phase and scope; looked at again when a
# compiler's ratio changes.
STORED = "data: gathers weights as they are stored, f32, where the minimum has bf16"
REDUCED = "gathers and scatters over one axis of all chips are made of all-reduces, twice the bytes"
TICKS = "pipe: idle ticks send too, and gradients of embedding and head are summed over the stages"
EVERY_TICK = "every backward tick reduces the gradients of its stage"
CHOICES = "tensor: sums both choices of a token, where a dense branch has one sum"
AGAIN = "tensor: attention's input gathered once more for its weights' gradients, 6.0"
WIDE = "gradients of experts leave their ragged products as f32"
ROOM = "tensor: sums the room for all tokens that could come, twice what does"
WHY: dict[str, dict[str, str]] = {
    "ZeRO-1": {"gpu": STORED, "tpu": f"{STORED}; {REDUCED}"},
    "ZeRO-2": {"gpu": STORED, "tpu": f"{STORED}; {REDUCED}"},
    "shard_map: ZeRO-1": {"gpu": STORED, "tpu": f"{STORED}; {REDUCED}"},
    "fsdp": {"tpu": REDUCED},
    "fsdp, weights kept": {"tpu": REDUCED},
    "shard_map: fsdp": {"tpu": REDUCED},
    "tensor + sequence": {"gpu": AGAIN},
    "fsdp × tensor + sequence": {"gpu": AGAIN},
    "pipeline, 1F1B": {"gpu": TICKS, "tpu": TICKS},
    "pipeline × tensor": {"gpu": TICKS},
    "pipeline × context": {
        "gpu": f"{TICKS}; context: {EVERY_TICK}, 14.0",
        "tpu": f"context: {EVERY_TICK}, 14.0",
    },
    "pipeline × experts": {
        "gpu": f"{TICKS}; expert: {EVERY_TICK}, 2.5, and gathers heads and rows of tokens, 4.5",
        "tpu": f"expert: {EVERY_TICK}, 2.5",
    },
    "ZeRO-2 × tensor": {
        "gpu": f"{STORED}; {AGAIN}",
        "tpu": f"{STORED}; data: a third of the scatters are chains of permutes, which go home too",
    },
    "ZeRO-2 × fsdp": {
        "gpu": STORED,
        "tpu": f"{STORED}; fsdp: gradients all-reduced over data×fsdp at once, then sliced",
    },
    "experts, dropless": {"gpu": f"data: {WIDE}"},
    "fsdp × experts × tensor, dropless": {"gpu": f"{ROOM}; fsdp: {WIDE}", "tpu": ROOM},
    "fsdp × experts × tensor": {
        "gpu": f"{CHOICES}; fsdp: some experts' weights gathered twice in the backward pass, 1.5",
        "tpu": CHOICES,
    },
}

SIZES = (
    "model.vocab=1024",
    "model.embed_dim=256",
    "model.num_heads=4",
    "model.kv_heads=4",
    "model.mlp_dim=768",
    "data.seq_len=128",
    "data.batch_size=64",
    "optimizer.name=adamw",
    "strategy.precision=bfloat16",
    "strategy.remat=full",
)


def mesh_of(text: str, devices: int) -> str:
    """The mesh with N replaced by what is left of the devices."""
    taken = math.prod(int(n) for _, n in _pairs(text) if n != "N")
    return text.replace("=N", f"={devices // taken}")


def _pairs(text: str) -> list[list[str]]:
    return [part.split("=") for part in text.split(",")]


def measure(name: str, target: str, layers: int) -> dict[str, Any]:
    """Compiles one kind and returns its row."""
    from shardkit.targets import StepSource, compile_for

    strategy, mesh = KINDS[name][0], mesh_of(KINDS[name][1], TARGETS[target])
    mode = "shard_map" if name.startswith("shard_map") else "auto"
    overrides = (f"strategy={strategy}", f"mesh={mesh}", *SIZES, *MODELS.get(name, ()))
    overrides = (*overrides, f"model.num_layers={layers}", f"compile.mode={mode}")
    start = time.perf_counter()
    report = compile_for(StepSource("", overrides), target, timeout=1800)
    seconds = time.perf_counter() - start
    by_kind: dict[str, float] = {}
    for row in report.ledger:
        key = f"{row.kind} over {'×'.join(row.axes)}" + (" (windowed)" if row.windowed else "")
        by_kind[key] = by_kind.get(key, 0) + row.wire_bytes
    ranked = sorted(by_kind.items(), key=lambda item: -item[1])
    mib = 2**20
    return {
        "kind": name,
        "mesh": mesh,
        "wire (MiB)": round(report.ledger.total() / mib, 1),
        "÷ minimum": ", ".join(f"{m.axis} {m.ratio:.2f}" for m in report.minima if m.ratio),
        "state (MiB)": round((report.memory.params + report.memory.opt_state) / mib, 1),
        "temp (MiB)": round((report.memory.temp or 0) / mib, 1),
        "ledger (MiB)": "; ".join(f"{k} {v / mib:.1f}" for k, v in ranked if v >= mib / 20),
        "beyond the minimum (MiB)": "; ".join(
            f"{m.axis}: {what} {size / mib:.1f}" for m in report.minima for what, size in m.excess
        ),
        "findings": ", ".join(sorted({one.kind for one in report.findings})),
        "seconds": round(seconds),
    }


def main() -> None:
    """Compiles the kinds and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    result = "kinds_" + arguments.target.replace(":", "_")
    rows = {row["kind"]: row for row in _harness.read_rows(result)}
    missing = arguments.names or [kind for kind in KINDS if kind not in rows]
    for name in missing:
        rows[name] = measure(name, arguments.target, arguments.layers)
        write(result, arguments, rows)
    if not missing:
        write(result, arguments, rows)


def write(result: str, arguments: argparse.Namespace, rows: Mapping[str, Any]) -> None:
    """Writes what there is, each row with its reasons."""
    where = f"compiled for {arguments.target}, {arguments.layers} layers, on a CPU"
    note = (
        "A decoder of width 256, 64 × 128 tokens, bf16 products, f32 weights, full remat. Wire is "
        "what one device sends per step, a byte in a pipeline as often as its tick table sends "
        "it. What goes over two axes counts for each by its part, so an axis may show less than "
        "its minimum. Why a ratio is above 1.1 stands in two columns: what the ledger itself "
        "knows, in MiB, and what is read off its rows."
    )
    compiler = arguments.target.split(":")[0]
    ordered = [
        rows[kind] | {"and why": WHY.get(kind, {}).get(compiler, "")}
        for kind in KINDS
        if kind in rows
    ]
    _harness.write(result, "compiled", where, ordered, note)


if __name__ == "__main__":
    main()
