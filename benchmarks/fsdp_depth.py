"""fsdp gathers layer by layer: what one more layer adds to the compiled memory of a step.

python benchmarks/fsdp_depth.py TARGET …

Each target is compiled at 4 and 16 layers, resharding weights after the forward pass or keeping
them. A program that gathered the whole stack at once would add a layer's gathered weights for each.
"""

import argparse
from typing import Any

import _harness
from kinds import SIZES, TARGETS

DEPTHS = (4, 16)
VARIANTS = {"resharded": "fsdp", "kept": "fsdp(reshard_after_forward=False)"}
# Elements of one layer's products in `kinds.SIZES`.
LAYER = 4 * 256 * 256 + 3 * 256 * 768


def measure(target: str, name: str) -> dict[str, Any]:
    """Compiles both depths of one variant and returns its row."""
    from shardkit.targets import StepSource, compile_for

    def temp(layers: int) -> int:
        mesh = f"fsdp={TARGETS[target]}"
        overrides = (
            f"strategy={VARIANTS[name]}",
            f"mesh={mesh}",
            *SIZES,
            f"model.num_layers={layers}",
        )
        return compile_for(StepSource("", overrides), target, timeout=1800).memory.temp or 0

    shallow, deep = map(temp, DEPTHS)
    added = (deep - shallow) / (DEPTHS[1] - DEPTHS[0])
    mib = 2**20
    return {
        "target": target,
        "weights": name,
        **{
            f"temp, {n} layers (MiB)": round(t / mib, 2)
            for n, t in zip(DEPTHS, (shallow, deep), strict=True)
        },
        "added per layer (MiB)": round(added / mib, 3),
        "gathered layer, bf16 (MiB)": round(LAYER * 2 / mib, 3),
    }


def main() -> None:
    """Compiles every variant for each target and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="+", choices=TARGETS)
    targets = parser.parse_args().targets
    rows = []
    for target in targets:
        for name in VARIANTS:
            rows.append(measure(target, name))
            note = (
                "Width 256, 64 × 128 tokens over fsdp, bf16 products, full remat. On CPUs XLA "
                "computes, and so gathers, bf16 as f32: a gathered layer is twice as large."
            )
            where = f"compiled for {', '.join(targets)}, on a CPU"
            _harness.write("fsdp_depth", "compiled", where, rows, note)


if __name__ == "__main__":
    main()
