"""Drops and balance of a mixture of experts over a real run, by capacity factor and losses.

python benchmarks/experts.py [--steps 150]

Every run sees the same rows of the default corpus from the same first parameters.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import _harness

FACTORS = (1.0, 1.25, 2.0, None)
LAST = 30


def run(factor: float | None, balanced: bool, steps: int, text: Any) -> dict[str, Any]:
    """Trains `nano-moe` once and returns a row of means over the first and last steps."""
    import jax
    import optax

    import shardkit as sk
    from shardkit.models import SIZES, Decoder, decoder_loss

    weight = SIZES["nano-moe"].balance_loss if balanced else 0.0
    config = dataclasses.replace(SIZES["nano-moe"], capacity_factor=factor, balance_loss=weight)
    model = sk.from_nnx(lambda rngs: Decoder(config, rngs), decoder_loss)
    step = sk.compile_step(
        model.loss_fn,
        optax.adamw(3e-3),
        init=model.init,
        batch=text.batch(0),
        mesh=sk.MeshSpec(data=1).build(devices=jax.devices()[:1]),
        strategy=sk.strategies.data(),
    )
    state, seen = step.init(jax.random.key(0)), []
    for number in range(steps):
        state, metrics = step(state, text.batch(number))
        seen.append({name: float(x) for name, x in metrics.items()})
    held_out = float(step.evaluate(state, text.held_out_batch(0))["loss"])
    first, last = seen[:LAST], seen[-LAST:]
    return {
        "capacity factor": "dropless" if factor is None else factor,
        "balance loss": weight,
        "dropped, first %": round(100 * _mean(first, "dropped"), 2),
        "dropped, last %": round(100 * _mean(last, "dropped"), 2),
        "balance, first": round(_mean(first, "balance"), 3),
        "balance, last": round(_mean(last, "balance"), 3),
        "max load, last": round(_mean(last, "max_load"), 2),
        "entropy, last nats": round(_mean(last, "entropy"), 3),
        "held-out bits per byte": round(held_out / math.log(2), 3),
    }


def _mean(rows: list[Mapping[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def main() -> None:
    """Makes every run and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    from shardkit.data import DataConfig, load_text

    text = load_text(DataConfig(length=128, batch=8, held_out=0.01))
    rows = [run(factor, balanced, steps, text) for factor in FACTORS for balanced in (True, False)]
    note = (
        f"nano-moe (2 layers, 2 of 8 experts), {steps} updates of 8 × 128 bytes; means over the "
        f"first and last {LAST} updates, over blocks and over tokens; balance and max load are 1 "
        "where all experts are used alike, entropy is at most 2.079. Held out: one batch."
    )
    _harness.write("experts", "measured", "CPU, 1 device", rows, note)


if __name__ == "__main__":
    main()
