"""Bubbles, live activations and compiled memory of each schedule, at 4 … 32 micro-batches.

    python benchmarks/pipeline.py

Bubbles and live activations are counted in the tick tables and stand beside the papers' formulae.
Temporary memory is that of a compiled training step on 4 simulated devices: micro-batches of 4
rows whose activation, 32 KiB, is large beside weights of 4 KiB a layer. It is compiled, not run.
"""

import fractions
import os

os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import optax
from _harness import write

import shardkit as sk
from shardkit.parallel import PipelineSchedule, schedule

STAGES, ROWS, LENGTH, WIDTH, LAYERS = 4, 4, 64, 32, 8
ACTIVATION = ROWS * LENGTH * WIDTH * 4
KINDS = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1))


def loss(params, batch, key):
    """A residual stack whose activations are made from a few bytes of batch."""
    return sk.nn.layer_stack(
        lambda ends, batch, key: batch["x"][:, None, None] * ends,
        lambda w, x, batch, key: x + jnp.tanh(x @ w),
        lambda ends, x, batch: (x**2).mean(),
        params["start"],
        params["w"],
        batch,
    )


def init(key):
    """Weights of `LAYERS` layers."""
    return {
        "start": sk.WithAxes(jnp.ones((LENGTH, WIDTH)), (None, "embed")),
        "w": sk.WithAxes(jnp.ones((LAYERS, WIDTH, WIDTH)) / WIDTH, ("layers", "embed", "mlp")),
    }


def temporary(name, micro_batches, virtual_stages):
    """KiB of temporaries of the compiled training step."""
    declared = {"micro_batches": micro_batches, "virtual_stages": virtual_stages}
    step = sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=init,
        batch={"x": jax.ShapeDtypeStruct((ROWS * micro_batches,), jnp.float32)},
        mesh=sk.MeshSpec(pipe=STAGES).build("cpu:4"),
        strategy=sk.strategies.pipeline(schedule=name, **declared),
    )
    return step.report().memory.temp / 1024


def formulae(table: PipelineSchedule) -> tuple[fractions.Fraction, int]:
    """Bubble and activations of the first stage, as the papers have them."""
    p, m, v = table.stages, table.micro_batches, table.virtual_stages
    return {
        "gpipe": (fractions.Fraction(p - 1, m + p - 1), m),
        "1f1b": (fractions.Fraction(p - 1, m + p - 1), min(m, p)),
        "interleaved": (fractions.Fraction(p - 1, m * v + p - 1), min(m * v, p * v + p - 1)),
        "zero_bubble": (fractions.Fraction(p - 1, 3 * m + p - 1), min(m, p)),
    }[table.name]


def row(name, micro_batches, virtual_stages):
    """One line of the result."""
    sizes = {"micro_batches": micro_batches, "virtual_stages": virtual_stages}
    table = schedule(name, stages=STAGES, **sizes)
    bubble, live = formulae(table)
    return {
        "schedule": name,
        "micro-batches": micro_batches,
        "virtual stages": virtual_stages,
        "ticks": len(table.ticks),
        "bubble, counted": f"{float(table.bubble):.4f}",
        "bubble, formula": f"{float(bubble):.4f}",
        "live parts, counted": max(table.live()),
        "live parts, formula": live,
        "temporary KiB, compiled": round(temporary(name, micro_batches, virtual_stages)),
    }


def main():
    """Compiles every schedule at every number of micro-batches."""
    sk.simulate_devices(STAGES)
    rows = [row(name, m, v) for name, v in KINDS for m in (4, 8, 16, 32)]
    note = (
        "4 stages. One activation of one micro-batch is 32 KiB. Bubble and live activations are "
        "counted in the tick tables (a part is a layer run of one virtual stage: with two virtual "
        "stages it is half a stage's work but a whole activation). A table at four micro-batches "
        "on four stages with interleaving goes forward before it goes back, as Megatron-LM does."
    )
    write("pipeline", "compiled", "4 simulated CPU devices", rows, note)


if __name__ == "__main__":
    main()
