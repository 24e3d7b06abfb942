"""Loss curves with gradients in f32 and in 8 bits with error feedback, on one seed and one text.

`python benchmarks/compression.py [--steps 200]` trains a small byte-level decoder on the standard
library's source, on eight simulated devices: data=8, and two slices of fsdp=4 with data between
them. Writes `benchmarks/results/compression.{json,md}`.
"""

import argparse
import dataclasses
import functools
import operator
from typing import Any

import _harness

ROWS, LENGTH = 16, 64
# Mesh, as arguments of `MeshSpec`, by strategy.
MESHES: dict[str, dict[str, Any]] = {
    "data": {"data": 8},
    "data|fsdp": {"data": 1, "fsdp": 4, "dcn": {"data": 2}},
}


def step_of(kinds: str, compression: Any) -> Any:
    """A compiled step, its gradients compressed over `data` or not."""
    import jax
    import numpy as np
    import optax

    import shardkit as sk
    from shardkit.lm import Decoder, DecoderConfig, decoder_loss

    config = DecoderConfig(vocab=256, embed_dim=32, num_layers=2, num_heads=4, mlp_dim=96)
    model = sk.from_nnx(lambda rngs: Decoder(config, rngs), decoder_loss)
    tokens = np.zeros((ROWS, LENGTH), np.int32)
    made = (getattr(sk.strategies, kind)() for kind in kinds.split("|"))
    strategy = functools.reduce(operator.or_, made)
    return sk.compile_step(
        model.loss_fn,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3)),
        init=model.init,
        batch={"inputs": tokens, "targets": tokens, "weights": np.ones((ROWS, LENGTH), np.float32)},
        mesh=sk.MeshSpec(**MESHES[kinds]).build(devices=jax.devices()),
        strategy=dataclasses.replace(strategy, compression=compression),
        mode="shard_map",
    )


def batches(steps: int) -> list[Any]:
    """The first batches of the default corpus."""
    from shardkit.data import DataConfig, load_text

    text = load_text(DataConfig(seq_len=LENGTH, batch_size=ROWS))
    return [text.batch(step) for step in range(steps)]


def curve(step: Any, given: list[Any]) -> list[float]:
    """The loss of every step."""
    import jax

    state, losses = step.init(jax.random.key(0)), []
    for batch in given:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


def compared(kinds: str, steps: int, given: list[Any]) -> tuple[list[dict[str, Any]], str]:
    """Trains both on one mesh; returns the means of each tenth of the run, and a sentence."""
    import shardkit as sk

    made = [step_of(kinds, how) for how in (None, sk.GradientCompression("data"))]
    sent = [step.report().ledger.total("data") for step in made]
    curves = [curve(step, given) for step in made]
    name = kinds.replace("|", " × ")
    part = max(1, steps // 10)
    rows = [
        {
            "kinds": name,
            "steps": f"{start + 1}–{start + part}",
            "loss, f32": round(sum(f32) / part, 4),
            "loss, int8": round(sum(int8) / part, 4),
            "difference": round((sum(int8) - sum(f32)) / part, 4),
        }
        for start in range(0, part * 10, part)
        for f32, int8 in [[c[start : start + part] for c in curves]]
    ]
    worst = max(abs(a - b) for a, b in zip(*curves, strict=True))
    return rows, (
        f"{name} on {sk.MeshSpec(**MESHES[kinds])}: {sent[0]} wire bytes over `data` per device "
        f"and step in f32, {sent[1]} with int8 gradients ({sent[0] / sent[1]:.2f} times fewer); "
        f"largest difference of one step's loss {worst:.4f} nats. "
    )


def main() -> None:
    """Trains with and without compression on every mesh and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    import shardkit as sk

    sk.simulate_devices(8)
    given, rows, note = batches(steps), [], ""
    for kinds in MESHES:
        more, sentence = compared(kinds, steps, given)
        rows, note = rows + more, note + sentence
    note += "Rounding to the nearest of 255 levels, blocks of 256."
    _harness.write("compression", "measured", "CPU, 8 simulated devices", rows, note)


if __name__ == "__main__":
    main()
