"""Drops and balance of a mixture of experts over a real run, by capacity factor and losses.

python benchmarks/experts.py [--steps 150] [--mesh]

Every run sees the same rows of the default corpus from the same first parameters. With `--mesh`
each is made twice, on one device and on data × expert × tensor of eight simulated ones.
"""

import argparse
import dataclasses
import functools
import math
import operator
from collections.abc import Mapping
from typing import Any

import _harness

FACTORS = (1.0, 1.25, 2.0, None)
LAST = 30
MESH = {"data": 2, "expert": 2, "tensor": 2}


def train(
    factor: float | None, balanced: bool, steps: int, text: Any, sizes: Mapping[str, int]
) -> tuple[list[dict[str, float]], float]:
    """Trains `nano-moe` once; returns the metrics of every step and the held-out loss."""
    import jax
    import optax

    import shardkit as sk
    from shardkit.lm import SIZES, Decoder, decoder_loss

    weight = SIZES["nano-moe"].balance_loss if balanced else 0.0
    config = dataclasses.replace(SIZES["nano-moe"], capacity_factor=factor, balance_loss=weight)
    model = sk.from_nnx(lambda rngs: Decoder(config, rngs), decoder_loss)
    step = sk.compile_step(
        model.loss_fn,
        optax.adamw(3e-3),
        init=model.init,
        batch=text.batch(0),
        mesh=sk.MeshSpec(**sizes).build(devices=jax.devices()[: math.prod(sizes.values())]),
        strategy=functools.reduce(operator.or_, (getattr(sk.strategies, one)() for one in sizes)),
    )
    state, seen = step.init(jax.random.key(0)), []
    for number in range(steps):
        state, metrics = step(state, text.batch(number))
        seen.append({name: float(x) for name, x in metrics.items()})
    return seen, float(step.evaluate(state, text.validation_batch(0))["loss"])


def row(factor: float | None, balanced: bool, seen: Any, held_out: float) -> dict[str, Any]:
    """Means over the first and last steps of a run."""
    from shardkit.lm import SIZES

    first, last = seen[:LAST], seen[-LAST:]
    return {
        "capacity factor": "dropless" if factor is None else factor,
        "balance loss": SIZES["nano-moe"].balance_loss if balanced else 0.0,
        "dropped, first %": round(100 * _mean(first, "dropped"), 2),
        "dropped, last %": round(100 * _mean(last, "dropped"), 2),
        "balance, first": round(_mean(first, "balance"), 3),
        "balance, last": round(_mean(last, "balance"), 3),
        "max load, last": round(_mean(last, "max_load"), 2),
        "entropy, last nats": round(_mean(last, "entropy"), 3),
        "held-out bits per byte": round(held_out / math.log(2), 3),
    }


def beside(factor: float | None, steps: int, text: Any) -> list[dict[str, Any]]:
    """Rows of one device and of the mesh, and how far their losses are apart."""
    rows, losses = [], []
    for sizes in ({"data": 1}, MESH):
        seen, held_out = train(factor, True, steps, text, sizes)
        losses.append([one["loss"] for one in seen])
        mesh = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        rows.append({"mesh": mesh, **row(factor, True, seen, held_out)})
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    rows[1]["largest difference of a loss (nats)"] = f"{apart:.1e}"
    return rows


def _mean(rows: list[Mapping[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def main() -> None:
    """Makes every run and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--mesh", action="store_true")
    arguments = parser.parse_args()
    import shardkit as sk
    from shardkit.data import DataConfig, load_text

    steps, name, where = arguments.steps, "experts", "CPU, 1 device"
    if arguments.mesh:
        sk.simulate_devices(math.prod(MESH.values()))
        name, where = "experts_mesh", "CPU, 1 and 8 simulated devices"
    text = load_text(DataConfig(seq_len=128, batch_size=8, validation_fraction=0.01))
    rows = (
        [one for factor in (1.25, None) for one in beside(factor, steps, text)]
        if arguments.mesh
        else [
            row(factor, balanced, *train(factor, balanced, steps, text, {"data": 1}))
            for factor in FACTORS
            for balanced in (True, False)
        ]
    )
    note = (
        f"nano-moe (2 layers, 2 of 8 experts), {steps} updates of 8 × 128 bytes; means over the "
        f"first and last {LAST} updates, over blocks and over tokens; balance and max load are 1 "
        "where all experts are used alike, entropy is at most 2.079. Held out: one batch."
    )
    _harness.write(name, "measured", where, rows, note)


if __name__ == "__main__":
    main()
