"""A graph network in jraph's idiom: one large graph, of nodes and edges of other numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import shardkit as sk

from ._third_party import UNMARKED, Model, layouts

NODES, EDGES, WIDTH = 16, 40, 8


def init(key):
    keys = iter(jax.random.split(key, 8))

    def mlp(inputs, outputs):
        return {
            "in": jax.random.normal(next(keys), (inputs, 16)) / inputs**0.5,
            "out": jax.random.normal(next(keys), (16, outputs)) / 4,
        }

    return {
        "edges": mlp(2 * WIDTH + 3, WIDTH),
        "nodes": mlp(2 * WIDTH, WIDTH),
        "read": mlp(WIDTH, 1),
    }


def apply(weights, x):
    return jax.nn.relu(x @ weights["in"]) @ weights["out"]


def predict(params, graph):
    nodes, edges = graph["nodes"], graph["edges"]
    senders, receivers = graph["senders"], graph["receivers"]
    for _ in range(2):
        messages = apply(
            params["edges"], jnp.concatenate([nodes[senders], nodes[receivers], edges], -1)
        )
        gathered = jax.ops.segment_sum(messages, receivers, num_segments=NODES)
        nodes = nodes + apply(params["nodes"], jnp.concatenate([nodes, gathered], -1))
    return apply(params["read"], nodes)[:, 0]


def loss(params, graph, key=None):
    return jnp.mean((predict(params, graph) - graph["labels"]) ** 2)


def build():
    rng = np.random.default_rng(7)
    graph = {
        "nodes": rng.normal(size=(NODES, WIDTH)).astype(np.float32),
        "edges": rng.normal(size=(EDGES, 3)).astype(np.float32),
        "senders": rng.integers(0, NODES, EDGES).astype(np.int32),
        "receivers": rng.integers(0, NODES, EDGES).astype(np.int32),
        "labels": rng.normal(size=NODES).astype(np.float32),
    }
    split = {"*/in": P(None, "tensor"), "*/out": P("tensor")}
    strategy = sk.Strategy(params=sk.PathRules(split), batch=P())
    whole = "rows|first dim|dim 0"
    return Model(
        init,
        loss,
        graph,
        lambda params, state, rows: (loss(params, rows), jnp.ones(()), state),
        # One graph is not split by rows: with `tensor` it is declared replicated.
        {**layouts({}), "tensor": (strategy, {"tensor": 4})},
        refused=(
            ("data", whole),
            ("fsdp", whole),
            ("accumulate", whole),
            ("tensor", whole),
            UNMARKED,
        ),
        has_rows=False,
    )
