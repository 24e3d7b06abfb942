"""A vision transformer in nnx's idiom: `nnx.Conv` patches, `nnx.MultiHeadAttention`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardkit as sk

from ._models_gemma import nest_lists
from ._third_party import UNMARKED, Model, layouts

EMBED = 16


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.norm1 = nnx.LayerNorm(EMBED, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, EMBED, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(EMBED, rngs=rngs)
        self.up = nnx.Linear(EMBED, 32, rngs=rngs)
        self.down = nnx.Linear(32, EMBED, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class ViT(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(3, EMBED, (4, 4), (4, 4), padding="VALID", rngs=rngs)
        self.cls = nnx.Param(jax.random.normal(rngs.params(), (1, 1, EMBED)))
        self.positions = nnx.Param(0.1 * jax.random.normal(rngs.params(), (1, 5, EMBED)))
        self.layers = nnx.List([Encoder(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(EMBED, rngs=rngs)
        self.head = nnx.Linear(EMBED, 6, rngs=rngs)

    def __call__(self, image):
        x = self.patches(image).reshape(len(image), -1, EMBED)
        cls = jnp.broadcast_to(self.cls[...], (len(image), 1, EMBED))
        x = jnp.concatenate([cls, x], axis=1) + self.positions[...]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


def loss(model, batch):
    logits = model(batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def build():
    rng = np.random.default_rng(5)
    adapted = sk.from_nnx(ViT, loss)

    def plain(params, state, rows):
        graph, variables, streams = nnx.split(ViT(nnx.Rngs(0)), nnx.Param, ...)
        nnx.replace_by_pure_dict(variables, nest_lists(params))
        return loss(nnx.merge(graph, variables, streams), rows), jnp.ones(()), state

    split = {"layers/*/up/kernel": P(None, "tensor"), "layers/*/down/kernel": P("tensor")}
    return Model(
        adapted.init,
        adapted.loss_fn,
        {
            "image": rng.normal(size=(16, 8, 8, 3)).astype(np.float32),
            "label": rng.integers(0, 6, 16).astype(np.int32),
        },
        plain,
        layouts({**split, "patches/kernel": P(None, None, None, "tensor")}),
        refused=(
            UNMARKED,
            ("accumulate", "convolution"),
        ),
    )
