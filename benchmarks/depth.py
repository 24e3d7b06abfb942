"""Compile time and program size of a training step at 2, 8 and 32 layers: depth must be free.

python benchmarks/depth.py [--turns 3]
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

import _harness

DEPTHS = (2, 8, 32)


def compile_once(layers: int) -> tuple[float, float, int]:
    """Seconds of CPU and wall to declare and compile one step, and the bytes of its HLO."""
    import jax
    import numpy as np
    import optax

    import shardkit as sk
    from shardkit.lm import SIZES, Decoder, decoder_loss

    config = dataclasses.replace(SIZES["nano"], num_layers=layers)
    tokens = np.zeros((8, 128), np.int32)
    batch = {"inputs": tokens, "targets": tokens, "weights": np.ones((8, 128), np.float32)}
    model = sk.from_nnx(lambda rngs: Decoder(config, rngs), decoder_loss)
    jax.clear_caches()
    start, cpu = time.perf_counter(), time.process_time()
    step = sk.compile_step(
        model.loss_fn,
        optax.adamw(1e-3),
        init=model.init,
        batch=batch,
        mesh=sk.MeshSpec(data=2, tensor=2).build(devices=jax.devices()[:4]),
        strategy=sk.strategies.data() | sk.strategies.tensor(),
    )
    return time.process_time() - cpu, time.perf_counter() - start, len(step.hlo())


def main() -> None:
    """Compiles each depth in turn, several times, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    turns = parser.parse_args().turns
    import shardkit as sk

    sk.simulate_devices(4)
    compile_once(1)
    seen: dict[int, list[Any]] = {depth: [] for depth in DEPTHS}
    for _ in range(turns):
        for depth in DEPTHS:
            seen[depth].append(compile_once(depth))
    medians = {d: [statistics.median(c) for c in zip(*s, strict=True)] for d, s in seen.items()}
    first = medians[DEPTHS[0]]
    rows = [
        {
            "layers": depth,
            "compile CPU s": round(cpu, 2),
            "compile s": round(wall, 2),
            "HLO bytes": int(size),
            "CPU ratio": round(cpu / first[0], 2),
            "HLO ratio": round(size / first[2], 3),
        }
        for depth, (cpu, wall, size) in medians.items()
    ]
    _harness.write("depth", "measured", "CPU, data=2 × tensor=2 simulated", rows)


if __name__ == "__main__":
    main()
