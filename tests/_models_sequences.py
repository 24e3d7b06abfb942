"""Sequence models as their authors write them: Equinox, Haiku, and flax in Hugging Face's form."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import shardkit as sk

from ._third_party import UNMARKED, Model, layouts

VOCAB, WIDTH, HEADS, LENGTH, ROWS = 16, 8, 2, 6, 16


def tokens_and_lengths():
    rng = np.random.default_rng(5)
    return {
        "tokens": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        "lengths": rng.integers(1, LENGTH + 1, ROWS).astype(np.int32),
        "labels": rng.integers(0, 4, ROWS).astype(np.int32),
    }


def plain_of(mean):
    """`(params, state, rows) → (total, weight, state)` of a loss, in plain JAX."""

    def plain(params, state, rows):
        loss = mean(params, rows)
        weighted = isinstance(loss, sk.Mean)
        return (*((loss.total, loss.weight) if weighted else (loss, jnp.ones(()))), state)

    return plain


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norms: list[eqx.nn.LayerNorm]

    def __init__(self, key):
        keys = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 16, 1, activation=jax.nn.gelu, key=keys[1])
        self.norms = [eqx.nn.LayerNorm(WIDTH) for _ in range(2)]

    def __call__(self, x, mask):
        h = jax.vmap(self.norms[0])(x)
        x = x + self.attention(h, h, h, mask=mask)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))


class EqxEncoder(eqx.Module):
    """Layers made by `filter_vmap` and scanned, each one checkpointed."""

    embed: eqx.nn.Embedding
    layers: Block
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(VOCAB, WIDTH, key=keys[0])
        self.layers = eqx.filter_vmap(Block)(jax.random.split(keys[1], 2))
        self.head = eqx.nn.Linear(WIDTH, VOCAB, key=keys[2])

    def __call__(self, tokens, length):
        valid = jnp.arange(tokens.shape[0]) < length
        mask = valid[None, :] & jnp.tril(jnp.ones((len(tokens), len(tokens)), bool))
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        @eqx.filter_checkpoint
        def layer(x, arrays):
            return eqx.combine(arrays, static)(x, mask)

        x = jax.vmap(self.embed)(tokens)
        x, _ = jax.lax.scan(lambda x, arrays: (layer(x, arrays), None), x, arrays)
        return jax.vmap(self.head)(x), valid


def of_equinox(make, mean, tensor):
    shapes = eqx.filter_eval_shape(make, jax.random.key(0))
    _, static = eqx.partition(shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def loss(params, batch):
        return mean(eqx.combine(params, static), batch)

    return Model(
        lambda key: eqx.filter(make(key), eqx.is_inexact_array),
        lambda params, batch, key: loss(params, batch),
        tokens_and_lengths(),
        plain_of(loss),
        layouts(tensor),
        refused=(UNMARKED,),
    )


def build_equinox():
    @eqx.filter_jit
    def mean(model, batch):
        logits, valid = jax.vmap(model)(batch["tokens"], batch["lengths"])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1].astype(jnp.float32), batch["tokens"][:, 1:]
        )
        return sk.Mean(jnp.sum(losses * valid[:, 1:]), jnp.sum(valid[:, 1:]))

    return of_equinox(EqxEncoder, mean, {"embed/weight": P("tensor"), "head/weight": P("tensor")})


class EqxGru(eqx.Module):
    embed: eqx.nn.Embedding
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(VOCAB, WIDTH, key=keys[0])
        self.cell = eqx.nn.GRUCell(WIDTH, WIDTH, key=keys[1])
        self.head = eqx.nn.Linear(WIDTH, 4, key=keys[2])

    def __call__(self, tokens, length):
        def turn(h, token):
            h = self.cell(self.embed(token), h)
            return h, h

        start = jnp.zeros(WIDTH, self.embed.weight.dtype)
        _, states = jax.lax.scan(turn, start, tokens)
        return self.head(states[length - 1])


def build_gru():
    def mean(model, batch):
        logits = jax.vmap(model)(batch["tokens"], batch["lengths"]).astype(jnp.float32)
        labels = optax.smooth_labels(jax.nn.one_hot(batch["labels"], 4), 0.1)
        return optax.softmax_cross_entropy(logits, labels).sum() / len(logits)

    return of_equinox(EqxGru, mean, {"embed/weight": P("tensor"), "head/weight": P(None, "tensor")})


def build_ensemble():
    """Members made and called by `filter_vmap`; the loss is summed by a literal."""

    def make(key):
        return eqx.filter_vmap(lambda k: eqx.nn.MLP(LENGTH, 4, 16, 2, key=k))(
            jax.random.split(key, 4)
        )

    def mean(model, batch):
        x = batch["tokens"] / VOCAB - 0.5

        @eqx.filter_vmap(in_axes=(eqx.if_array(0), None))
        def call(member, x):
            return jax.vmap(member)(x)

        logits = call(model, x).astype(jnp.float32)
        labels = jnp.broadcast_to(batch["labels"], logits.shape[:2])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(losses.mean(0)) / batch["labels"].shape[0]

    return of_equinox(make, mean, {"layers/0/weight": P("tensor")})


def haiku_loss(batch):
    x = hk.Embed(VOCAB, WIDTH)(batch["tokens"])
    valid = jnp.arange(LENGTH) < batch["lengths"][:, None]
    x = x + hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=hk.initializers.TruncatedNormal())(
        x, x, x, mask=valid[:, None, None, :]
    )
    core = hk.GRU(WIDTH)
    outs, _ = hk.dynamic_unroll(
        core, hk.LayerNorm(-1, True, True)(x), core.initial_state(len(x)), time_major=False
    )
    logits = hk.Linear(4)(hk.remat(jnp.tanh)(outs)[jnp.arange(len(x)), batch["lengths"] - 1])
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), batch["labels"]
    ).mean()


def build_haiku():
    transformed = hk.without_apply_rng(hk.transform(haiku_loss))
    batch = tokens_and_lengths()
    return Model(
        lambda key: transformed.init(key, batch),
        lambda params, batch, key: transformed.apply(params, batch),
        batch,
        plain_of(transformed.apply),
        layouts({"embed/embeddings": P("tensor"), "linear/w": P("tensor")}),
        refused=(UNMARKED,),
    )


class HfAttention(nn.Module):
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.c_attn = nn.Dense(3 * WIDTH, dtype=self.dtype)
        self.c_proj = nn.Dense(WIDTH, dtype=self.dtype)
        self.causal_mask = nn.make_causal_mask(jnp.ones((1, LENGTH), bool), dtype=bool)

    def __call__(self, x, attention_mask):
        heads = (*x.shape[:2], HEADS, WIDTH // HEADS)
        query, key, value = (a.reshape(heads) for a in jnp.split(self.c_attn(x), 3, axis=2))
        causal = jnp.broadcast_to(self.causal_mask, (len(x), *self.causal_mask.shape[1:]))
        attention_mask = jnp.broadcast_to(attention_mask[:, None, None, :], causal.shape)
        attention_mask = nn.combine_masks(attention_mask, causal)
        # As in the original, for fast decoding.
        if self.has_variable("cache", "cached_key"):
            raise NotImplementedError
        bias = jax.lax.select(
            attention_mask > 0,
            jnp.full(attention_mask.shape, 0.0).astype(self.dtype),
            jnp.full(attention_mask.shape, jnp.finfo(self.dtype).min).astype(self.dtype),
        )
        weights = nn.dot_product_attention_weights(query, key, bias=bias, dtype=self.dtype)
        out = jnp.einsum("...hqk,...khd->...qhd", weights, value)
        return self.c_proj(out.reshape(x.shape))


class HfModel(nn.Module):
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.wte = nn.Embed(VOCAB, WIDTH, dtype=self.dtype)
        self.wpe = nn.Embed(LENGTH, WIDTH, dtype=self.dtype)
        self.attn = [HfAttention(dtype=self.dtype) for _ in range(2)]
        self.ln = [nn.LayerNorm(epsilon=1e-5, dtype=self.dtype) for _ in range(3)]

    def __call__(self, input_ids, attention_mask):
        positions = jnp.broadcast_to(jnp.arange(input_ids.shape[-1]), input_ids.shape)
        x = self.wte(input_ids) + self.wpe(positions)
        for attn, ln in zip(self.attn, self.ln[:2], strict=True):
            x = x + attn(ln(x), attention_mask)
        return self.wte.attend(self.ln[2](x))


def build_hf(dtype=jnp.float32):
    module, batch = HfModel(dtype=dtype), tokens_and_lengths()
    mask = (np.arange(LENGTH) < batch["lengths"][:, None]).astype(np.int32)
    batch = {"input_ids": batch["tokens"], "attention_mask": mask}

    def mean(params, batch):
        logits = module.apply({"params": params}, **batch)
        shift_logits, shift_labels = logits[..., :-1, :], batch["input_ids"][..., 1:]
        losses = optax.softmax_cross_entropy(
            shift_logits.astype(jnp.float32), jax.nn.one_hot(shift_labels, VOCAB)
        )
        valid = batch["attention_mask"][..., 1:]
        return sk.Mean((losses * valid).sum(), valid.sum())

    return Model(
        lambda key: module.init(key, **jax.tree.map(lambda x: x[:1], batch))["params"],
        lambda params, batch, key: mean(params, batch),
        batch,
        plain_of(mean),
        layouts({"attn_*/c_attn/kernel": P(None, "tensor"), "attn_*/c_proj/kernel": P("tensor")}),
        refused=(UNMARKED,),
    )
