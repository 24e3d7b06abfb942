"""Two towers with a contrastive loss, which compares each row with all others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from ._third_party import Model, layouts


def init(key):
    keys = iter(jax.random.split(key, 4))

    def tower(inputs):
        return {
            "in": jax.random.normal(next(keys), (inputs, 32)) / inputs**0.5,
            "out": jax.random.normal(next(keys), (32, 8)) / 32**0.5,
        }

    return {"image": tower(12), "text": tower(20), "log_scale": jnp.asarray(1.0)}


def embed(weights, x):
    h = jax.nn.gelu(x @ weights["in"]) @ weights["out"]
    return h / jnp.linalg.norm(h, axis=-1, keepdims=True)


def contrastive(params, batch, key=None):
    image, text = (embed(params[name], batch[name]) for name in ("image", "text"))
    logits = jnp.exp(params["log_scale"]) * image @ text.T
    labels = jnp.arange(len(logits))
    across = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    down = optax.softmax_cross_entropy_with_integer_labels(logits.T, labels)
    return (across + down).mean() / 2


def build():
    rng = np.random.default_rng(9)
    return Model(
        init,
        contrastive,
        {
            "image": rng.normal(size=(16, 12)).astype(np.float32),
            "text": rng.normal(size=(16, 20)).astype(np.float32),
        },
        lambda params, state, rows: (contrastive(params, rows), jnp.ones(()), state),
        layouts({"*/in": P(None, "tensor"), "*/out": P("tensor")}),
        refused=(("accumulate", "rows"), ("shard_map", "rows")),
    )
