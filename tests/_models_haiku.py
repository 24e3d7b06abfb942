"""A transformer in Haiku's idiom: `hk.transform`, and a loss over valid tokens."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import shardkit as sk

from ._third_party import UNMARKED, Model, layouts

VOCAB, EMBED = 16, 16


def forward(tokens):
    x = hk.Embed(VOCAB, EMBED)(tokens)
    x = x + hk.get_parameter("positions", (tokens.shape[1], EMBED), x.dtype, jnp.zeros)
    mask = jnp.tril(jnp.ones((1, 1, tokens.shape[1], tokens.shape[1])))
    init = hk.initializers.VarianceScaling(1.0)
    for _ in range(2):
        h = hk.LayerNorm(-1, True, True)(x)
        x = x + hk.MultiHeadAttention(4, 4, w_init=init)(h, h, h, mask=mask)
        h = hk.LayerNorm(-1, True, True)(x)
        x = x + hk.Linear(EMBED)(jax.nn.gelu(hk.Linear(2 * EMBED, name="up")(h)))
    return hk.Linear(VOCAB, name="logits")(x)


NETWORK = hk.without_apply_rng(hk.transform(forward))


def sums(params, batch):
    """Summed loss of the valid tokens, and their number."""
    logits = NETWORK.apply(params, batch["inputs"]).astype(jnp.float32)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)
    mask = (batch["targets"] > 0).astype(jnp.float32)
    return -jnp.sum(picked[..., 0] * mask), jnp.sum(mask)


def ratio(params, batch, key):
    total, weight = sums(params, batch)
    return total / weight


def build(loss_fn=ratio):
    rng = np.random.default_rng(4)
    tokens = rng.integers(1, VOCAB, (16, 9)).astype(np.int32)
    tokens *= np.arange(9) < rng.integers(3, 10, (16, 1))  # 0 pads, unevenly
    split = {"**/up/w": P(None, "tensor"), "**/logits/w": P(None, "tensor")}
    by_hand = (("accumulate", "sk.Mean"), ("shard_map", "sk.Mean"))
    return Model(
        lambda key: NETWORK.init(key, jnp.zeros((2, 8), jnp.int32)),
        loss_fn,
        {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]},
        lambda params, state, rows: (*sums(params, rows), state),
        layouts(split),
        refused=(
            *(by_hand if loss_fn is ratio else ()),
            UNMARKED,
        ),
    )


def build_mean():
    """The same, the sums given to shardkit undivided."""
    return build(lambda params, batch, key: sk.Mean(*sums(params, batch)))
