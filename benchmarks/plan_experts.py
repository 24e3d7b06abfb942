"""What a plan says of experts over a mesh axis, beside the target's own compiler.

    python benchmarks/plan_experts.py

A small decoder with eight bounded experts on a v5p 2x2x2, where `jax[tpu]` is installed: five
layouts that join `expert` with other axes, each compiled in a child process.
"""

from collections.abc import Mapping
from typing import Any

from _harness import write

from shardkit.planner import Candidate, compile_layout, plan
from shardkit.targets import StepSource

TARGET = "tpu:v5p:2x2x2"
SOURCE = StepSource(
    "",
    (
        "model.vocab=1024",
        "model.embed_dim=256",
        "model.num_heads=4",
        "model.kv_heads=4",
        "model.mlp_dim=768",
        "model.num_layers=4",
        "model.experts=8",
        "model.expert_mlp=384",
        "model.capacity_factor=1.0",
        "data.seq_len=128",
        "data.batch_size=64",
        "optimizer.name=adamw",
    ),
)
# Sizes, ZeRO stage, remat.
LAYOUTS: tuple[tuple[dict[str, int], int, str], ...] = (
    ({"data": 4, "expert": 2}, 0, "full"),
    ({"data": 2, "expert": 4}, 2, "full"),
    ({"fsdp": 2, "expert": 4}, 0, "none"),
    ({"data": 2, "expert": 2, "tensor": 2}, 0, "none"),
    ({"fsdp": 2, "expert": 2, "tensor": 2}, 0, "full"),
)
NOTE = """Bytes of one device and step, of the plan and of the compiler. An axis counts with all
that goes over it, alone or with others. Seconds are far too low, as what finds the slots of
tokens (sorts, sums of one-hot rows, gathers) is counted as traffic alone. Temporaries are too
large, without remat two to three times: a part is what the compiler puts into a core's own
memory, which its figure leaves out; the rest is not explained. Of ZeRO-2 beside experts the
compiler moves more over `expert` than gradients need."""


def over(wire: Mapping[str, float], axis: str) -> float:
    """MiB over an axis."""
    return sum(n for axes, n in wire.items() if axis in axes.split(", ")) / 2**20


def row(one: Candidate) -> dict[str, Any]:
    """One compile beside its estimate."""
    report = compile_layout(one.declaration, SOURCE, TARGET, precision="bfloat16")
    memory, timeline = report.memory, report.timeline
    assert memory.total is not None
    assert timeline is not None
    state = memory.params + memory.opt_state + memory.model_state + memory.rest
    temp = memory.total - state - memory.batch
    wire = {", ".join(axes): float(n) for axes, n in report.ledger.by_axes().items()}
    pairs = {
        axis: (over(one.wire, axis), over(wire, axis)) for axis, n in one.mesh.items() if n > 1
    }
    return {
        "layout": one.layout,
        "state, MiB": f"{one.state / 2**20:.1f} of {state / 2**20:.1f}",
        "temporaries, MiB": f"{one.temp / 2**20:.1f} of {temp / 2**20:.1f}",
        "wire, MiB": ", ".join(f"{a} {mine:.2f} of {its:.2f}" for a, (mine, its) in pairs.items()),
        "ms": f"{one.seconds * 1e3:.2f} of {timeline.high * 1e3:.2f}",
    }


def main() -> None:
    """Plans, compiles and writes the result."""
    spec, _ = SOURCE.load()
    made = plan(spec.replace(precision="bfloat16"), TARGET)
    chosen = [
        next(
            c
            for c in made.rows
            if {axis: n for axis, n in c.mesh.items() if n > 1} == sizes
            and (c.zero, c.remat, c.accumulate.micro_batches) == (zero, remat, 1)
        )
        for sizes, zero, remat in LAYOUTS
    ]
    where = f"{TARGET}, by its own compiler"
    write("plan_experts", "modelled", where, [row(one) for one in chosen], " ".join(NOTE.split()))


if __name__ == "__main__":
    main()
