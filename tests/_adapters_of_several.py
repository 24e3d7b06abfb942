"""The program of each process in tests/test_lora_files.py: python FILE FOLDER."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.lm import decoder_model

LAYERS, WIDTH, INNER = 2, 16, 32


def init(key):
    up, down = jax.random.split(key)
    return {
        "up": jax.random.normal(up, (LAYERS, WIDTH, INNER)) / WIDTH**0.5,
        "down": jax.random.normal(down, (LAYERS, INNER, WIDTH)) / INNER**0.5,
    }


def loss_fn(params, batch, key):
    def layer(x, w):
        return x + jax.nn.relu(x @ w["up"]) @ w["down"], None

    return jnp.mean(jax.lax.scan(layer, batch["x"], params)[0] ** 2)


BATCH = {"x": np.random.default_rng(0).normal(size=(8, WIDTH)).astype("f")}
LORA = sk.lora(init, loss_fn, {"up": (3, "sio"), "down": (2, "sio")}, alpha=6, batch=BATCH)


def trained():
    """Parameters after a step, split over two axes, one of which spans the processes."""
    split = {"up": P(None, "fsdp", "tensor"), "down": P(None, "tensor", "fsdp")}
    step = sk.compile_step(
        LORA.loss_fn,
        optax.sgd(0.5),
        init=LORA.init,
        batch=BATCH,
        mesh=sk.MeshSpec(fsdp=4, tensor=2).build("cpu:8"),
        strategy=sk.Strategy(params=sk.PathRules(split), batch=P("fsdp")),
    )
    state, _ = step(step.init(jax.random.key(0)), step.shard_batch(step_rows(step)))
    return state.params


def step_rows(step):
    """The rows of the batch that this process loads."""
    return {name: x[step.local_rows] for name, x in BATCH.items()}


def refusal(run):
    """What a call raises."""
    try:
        run()
    except sk.errors.CheckpointError as error:
        return str(error)
    return "nothing"


def main(folder: Path) -> None:
    """Saves and loads adapters; then makes calls that fail in one process."""
    with sk.distributed(step_timeout=120) as process_group:
        own = process_group.index
        params = trained()
        LORA.save(folder / "adapter", params)
        back = LORA.load(folder / "adapter", jax.tree.map(lambda x: x, params))
        equal = [
            a.sharding == b.sharding
            and all(
                np.array_equal(x.data, y.data)
                for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True)
            )
            for a, b in zip(*map(jax.tree.leaves, (params["lora"], back["lora"])), strict=True)
        ]
        (folder / "file").touch()
        # Only the first process finds what it looks for.
        place = folder / ("adapter" if own == 0 else "none")
        weights = Path(__file__).parent / "data" / "hf" / ("llama" if own == 0 else "none")
        model = decoder_model(sk.hf.decoder_config(weights.parent / "llama"))
        spec = sk.StepSpec(
            loss_fn=model.loss_fn,
            init=model.init,
            optimizer=optax.sgd(1.0),
            batch={"inputs": jax.ShapeDtypeStruct((8, 8), "int32")},
            strategy=sk.strategies.fsdp() | sk.strategies.tensor(),
        )
        said = {
            "equal": equal,
            "again": refusal(lambda: LORA.save(folder / "adapter", params)),
            "unwritable": refusal(lambda: LORA.save(folder / "file" / "adapter", params)),
            "unreadable": refusal(lambda: LORA.load(place, params)),
            "no weights": refusal(lambda: sk.hf.load(weights, spec, params["up"].sharding.mesh)),
            "no model": refusal(lambda: sk.hf.save(folder / "out", params, like=weights)),
        }
        (folder / f"said-{own}.json").write_text(json.dumps(said))
        whole = multihost_utils.process_allgather(params["lora"], tiled=True)
        if own == 0:
            leaves = {f"{p}.{n}": x for p, pair in whole.items() for n, x in pair.items()}
            np.savez(folder / "whole.npz", **leaves)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
