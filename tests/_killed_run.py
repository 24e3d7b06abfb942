"""A run that tests/test_kills.py starts and kills: python -m tests._killed_run FOLDER."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shardkit as sk

STEPS = 60
CONFIG = sk.TrainConfig(steps=STEPS, eval_every=0, checkpoint_every=5, log_every=1)
ROWS = sk.data.Arrays({"x": np.random.default_rng(0).normal(size=(40, 8)).astype("f")}, rows=8)


def loss_fn(params, batch, key):
    x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    return jnp.mean((jnp.tanh(x @ params["w"]) - 0.5) ** 2)


def run(folder: Path) -> None:
    """Trains to the end, resuming from the checkpoints in the folder."""
    step = sk.compile_step(
        loss_fn,
        optax.sgd(0.5, momentum=0.9),
        init=lambda key: {"w": jax.random.normal(key, (8, 4))},
        batch=ROWS.batch(0),
        mesh=sk.MeshSpec(data=4, tensor=2).build("cpu:8"),
        strategy=sk.Strategy(
            params=sk.PathRules({"w": jax.P(None, "tensor")}), batch=jax.P("data")
        ),
    )
    sk.Trainer(step, sk.data.Loader(ROWS, step.batch_shardings), folder, CONFIG).run()


if __name__ == "__main__":
    sk.simulate_devices(8)
    run(Path(sys.argv[1]))
