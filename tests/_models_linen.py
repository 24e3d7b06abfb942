"""A transformer in linen's idiom: boxed parameters with logical names, logical constraints."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import shardkit as sk

from ._third_party import UNMARKED, Model, named_layouts

VOCAB, EMBED, HEADS, DIM, MLP = 32, 16, 4, 4, 32


def named(*names):
    return nn.with_logical_partitioning(nn.initializers.normal(0.3), names)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        def project(name):
            kernel = named("embed", "heads", "head_dim")
            return nn.DenseGeneral((HEADS, DIM), use_bias=False, kernel_init=kernel, name=name)

        h = nn.LayerNorm(scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
                         use_bias=False)(x)  # fmt: skip
        q, k, v = (project(name)(h) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / DIM**0.5
        mask = nn.make_causal_mask(x[..., 0])
        weights = jax.nn.softmax(jnp.where(mask > 0, scores, -1e9), -1)
        h = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        h = nn.with_logical_constraint(h, ("batch", "length", "heads", "head_dim"))
        out = named("heads", "head_dim", "embed")
        x = x + nn.DenseGeneral(EMBED, (-2, -1), use_bias=False, kernel_init=out, name="out")(h)
        h = nn.Dense(MLP, use_bias=False, kernel_init=named("embed", "mlp"), name="up")(x)
        h = nn.with_logical_constraint(nn.gelu(h), ("batch", "length", "mlp"))
        x = x + nn.Dense(EMBED, use_bias=False, kernel_init=named("mlp", "embed"), name="down")(h)
        return nn.with_logical_constraint(x, ("batch", "length", "embed"))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, EMBED, embedding_init=named("vocab", "embed"), name="embed")
        x = embed(tokens)
        for i in range(2):
            x = Layer(name=f"layer_{i}")(x)
        return embed.attend(x)


def cross_entropy(logits, batch):
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def build():
    tokens = np.random.default_rng(1).integers(0, VOCAB, (16, 9)).astype(np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    adapted = sk.from_linen(Transformer(), cross_entropy, batch, inputs="inputs")

    def plain(params, state, rows):
        logits = Transformer().apply({"params": params}, rows["inputs"])
        return cross_entropy(logits, rows), jnp.ones(()), state

    return Model(
        adapted.init,
        adapted.loss_fn,
        batch,
        plain,
        named_layouts(),
        refused=(
            UNMARKED,
            # Its names are constraints of its own, of whole arrays.
            ("shard_map", "means nothing where the loss sees one device's shard"),
        ),
    )
