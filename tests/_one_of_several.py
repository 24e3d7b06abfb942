"""The program of each process in tests/test_several_processes.py: python FILE FOLDER."""

import dataclasses
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
from shardkit.data import Corpus, DataConfig, Text

DATA = DataConfig(seq_len=16, batch_size=8)
TEXT = Text(Corpus("a test", bytes(range(97, 123)) * 60, bytes(range(1, 101)), 1, 1), DATA)
WIDTH, INNER = 16, 32
STEPS, HALF = 4, 2
# Its parameters as tensors: `down` is stored transposed.
TABLE = {
    "table": ("embed.weight", "v e -> v e"),
    "up": ("up.weight", "e m -> e m"),
    "down": ("down.weight", "m e -> e m"),
    "scale": ("norm.weight", "e -> e"),
}


def init(key):
    table, up, down = jax.random.split(key, 3)
    return {
        "table": jax.random.normal(table, (256, WIDTH)),
        "up": jax.random.normal(up, (WIDTH, INNER)) / WIDTH**0.5,
        "down": jax.random.normal(down, (INNER, WIDTH)) / INNER**0.5,
        "scale": jnp.ones(WIDTH),
    }


def loss_fn(params, batch, key):
    x = params["table"][batch["inputs"]]
    x = params["scale"] * (x + jax.nn.relu(x @ params["up"]) @ params["down"])
    x = x + 0.1 * jax.random.normal(key, x.shape)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        x @ params["table"].T / WIDTH, batch["targets"]
    )
    return sk.Mean((losses * batch["weights"]).sum(), batch["weights"].sum())


def compiled():
    """A step with parameters split over two axes, one of which spans the processes."""
    mesh = sk.MeshSpec(fsdp=4, tensor=2).build("cpu:8")
    split = {"table": P("fsdp"), "up": P("fsdp", "tensor"), "down": P("tensor", "fsdp")}
    return sk.compile_step(
        loss_fn,
        optax.sgd(0.5, momentum=0.9),
        init=init,
        batch=TEXT.batch(0),
        mesh=mesh,
        strategy=sk.Strategy(
            params=sk.PathRules({**split, "scale": sk.REPLICATED}), batch=P("fsdp")
        ),
    )


@dataclasses.dataclass
class Read:
    """The text, which records the rows of each batch that were read."""

    asked: list[tuple[int, list[int]]] = dataclasses.field(default_factory=list)
    rows = TEXT.rows
    state = TEXT.state

    def batch(self, step, rows=slice(None)):
        if len(held := np.arange(self.rows)[rows]):
            self.asked.append((step, held.tolist()))
        return TEXT.batch(step, rows)


def fed(step, batch):
    """The rows of a batch that this process loads."""
    return {name: x[step.local_rows] for name, x in batch.items()}


def train(step, state, start, stop, text=TEXT):
    """Trains, and returns the last state and the losses."""
    losses = []
    with sk.data.Loader(text, step.batch_shardings, start=start, stop=stop) as batches:
        for batch in batches:
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return state, losses


def refused(step):
    """The error of a process that passes other rows than its own."""
    try:
        step.shard_batch({name: x[:3] for name, x in TEXT.batch(0).items()})
    except sk.errors.BatchError as error:
        return str(error)
    return "nothing"


def whole(state):
    """Every leaf as one host array, gathered from all processes."""
    bare = jax.tree.map(
        lambda x: (
            jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ),
        state,
    )
    leaves = jax.tree_util.tree_leaves_with_path(bare)
    return {
        jax.tree_util.keystr(path): np.asarray(multihost_utils.process_allgather(x, tiled=True))
        for path, x in leaves
    }


def main(folder: Path) -> None:
    """Trains from the start, then from a state that one process saved; saves for one process."""
    with sk.distributed(step_timeout=120) as process_group:
        step = compiled()
        process_group.agree("step", program=step.program.digest)
        read = Read()
        state, losses = train(step, step.init(jax.random.key(0)), 0, STEPS, read)
        gradients = whole(step.gradients(state, fed(step, TEXT.batch(0)))[1])
        score = step.evaluate(state, step.shard_batch(fed(step, TEXT.validation_batch(0))))["loss"]
        told = {
            "losses": losses,
            "read": read.asked,
            "evaluated": float(score),
            "report": step.report().ledger.total(),
            "refused": refused(step),
        }
        back = sk.Checkpointer(folder / "by one").restore(step.abstract_state, step.shardings)
        state, told["resumed"] = train(step, back.state, HALF, STEPS)
        with sk.Checkpointer(folder / "by several") as checkpoints:
            checkpoints.save(STEPS, state)
        (folder / "like").mkdir(exist_ok=True)
        sk.hf.save(folder / "tensors", state.params, like=folder / "like", table=TABLE)
        final = whole(state)
        if process_group.index == 0:
            np.savez(folder / "final.npz", **final)
            np.savez(folder / "gradients.npz", **gradients)
        said = folder / f"said-{process_group.index}.json"
        said.write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
