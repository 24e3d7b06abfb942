"""Losses of batches whose leaves do not all count rows, each with its declarations.

As a program, one of several processes: prints two losses of "both", of its own rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import shardkit as sk

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def gru_loss(p, b, key):
    """Time-major: `x[length, rows, features]`, `y[rows]`."""

    def cell(h, x):
        gate = jax.nn.sigmoid(x @ p["gate"])
        return gate * h + (1 - gate) * jnp.tanh(x @ p["new"] + h @ p["old"]), None

    h, _ = jax.lax.scan(cell, jnp.zeros_like(b["x"][0] @ p["new"]), b["x"])
    return jnp.mean((h.sum(-1) - b["y"]) ** 2)


def weighted_loss(p, b, key):
    weights = b["class_weights"][b["y"]]
    total = jnp.sum(weights * cross_entropy(b["x"] @ p["w"], b["y"]))
    right = (b["x"] @ p["w"]).argmax(-1) == b["y"]
    return sk.Mean(total, weights.sum()), {"right": jnp.mean(right.astype(jnp.float32))}


def both_loss(p, b, key):
    """Time-major features, and weights of classes."""
    y = b["class_weights"].shape[0] * jax.nn.sigmoid(b["y"])
    weights = b["class_weights"][y.astype(int)]
    return sk.Mean(jnp.sum(weights * jnp.tanh(b["x"] @ p["w"]).sum((0, 2))), weights.sum())


def distilled_loss(p, b, key):
    return jnp.mean((jnp.tanh(b["x"] @ p["w"]) - jnp.tanh(b["x"] @ b["teacher"]["w"])) ** 2)


def graph_loss(p, b, key):
    """Labelled nodes are rows; the nodes and edges that they are part of are not."""
    sent = jax.ops.segment_sum((b["nodes"] @ p["w"])[b["sources"]], b["targets"], 16)
    return cross_entropy(sent[b["labelled"]], b["y"]).mean()


LABELS = RNG.integers(0, 4, 8)
CASES = {
    "time-major": (
        gru_loss,
        {"gate": (3, 4), "new": (3, 4), "old": (4, 4)},
        {"x": normal(6, 8, 3), "y": normal(8)},
        {"x": 1, "y": 0},
        {"x": P(None, "data"), "y": P("data")},
    ),
    "class weights": (
        weighted_loss,
        {"w": (5, 4)},
        {"x": normal(8, 5), "y": LABELS, "class_weights": np.float32([1, 2, 0.5, 3])},
        {"class_weights": None, "**": 0},
        {"class_weights": sk.REPLICATED, "**": P("data")},
    ),
    "both": (
        both_loss,
        {"w": (3, 4)},
        {"x": normal(6, 8, 3), "y": normal(8), "class_weights": np.float32([1, 2, 0.5, 3])},
        {"x": 1, "class_weights": None, "**": 0},
        {"x": P(None, "data"), "class_weights": sk.REPLICATED, "**": P("data")},
    ),
    "teacher": (
        distilled_loss,
        {"w": (5, 4)},
        {"x": normal(8, 5), "teacher": {"w": normal(5, 4)}},
        {"teacher/**": None, "**": 0},
        {"teacher/**": sk.REPLICATED, "**": P("data")},
    ),
    "graph": (
        graph_loss,
        {"w": (3, 4)},
        {
            "nodes": normal(16, 3),
            "sources": RNG.integers(0, 16, 40),
            "targets": RNG.integers(0, 16, 40),
            "labelled": RNG.integers(0, 16, 8),
            "y": LABELS,
        },
        {"labelled": 0, "y": 0, "**": None},
        {"labelled": P("data"), "y": P("data"), "**": sk.REPLICATED},
    ),
}


def compiled(name, *, rule=False, sizes=None, **options):
    loss, shapes, batch, row_dims, specs = CASES[name]

    def init(key):
        keys = jax.random.split(key, len(shapes))
        pairs = zip(keys, shapes.items(), strict=True)
        return {path: jax.random.normal(k, shape) for k, (path, shape) in pairs}

    sizes = {"data": 4} if sizes is None else sizes
    mesh = sk.MeshSpec(**sizes).build(devices=jax.devices()[: sum(sizes.values())])
    if rule:
        options["strategy"] = sk.Strategy(batch=sk.PathRules(specs))
    else:
        options = {"strategy": sk.strategies.data(), "row_dims": row_dims, **options}
    return sk.compile_step(loss, optax.sgd(1.0), init=init, batch=batch, mesh=mesh, **options)


def plain_mean(loss, params, batch):
    value = loss(params, batch, None)
    value = value[0] if isinstance(value, tuple) else value
    return value.total / value.weight if isinstance(value, sk.Mean) else value


def assert_close(got, want, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, rtol), got, want)


def own_rows(step, batch):
    """What this process passes to a step of "both"."""
    rows = step.local_rows
    return {**batch, "x": batch["x"][:, rows], "y": batch["y"][rows]}


def main():
    with sk.distributed(step_timeout=120) as process_group:
        step, batch = compiled("both", accumulate=2), CASES["both"][2]
        state, first = step(step.init(jax.random.key(0)), own_rows(step, batch))
        _, second = step(state, step.shard_batch(own_rows(step, batch)))
        print("losses", process_group.index, float(first["loss"]), float(second["loss"]))


if __name__ == "__main__":
    main()
