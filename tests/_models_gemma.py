"""A Gemma-like model in nnx's idiom: tied and scaled embeddings, grouped heads, soft caps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import shardkit as sk

from ._third_party import UNMARKED, Model, named_layouts

VOCAB, EMBED, HEADS, KV_HEADS, DIM, MLP = 32, 16, 4, 2, 4, 24


def weight(rngs, shape, names):
    values = jax.random.normal(rngs.params(), shape) * 0.3
    return nnx.Param(values, out_sharding=names)


class RMSNorm(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.zeros(EMBED), out_sharding=("norm",))

    def __call__(self, x):
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)
        return (normed * (1 + self.scale[...])).astype(x.dtype)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.query = weight(rngs, (EMBED, HEADS, DIM), ("embed", "heads", "head_dim"))
        self.key = weight(rngs, (EMBED, KV_HEADS, DIM), ("embed", "kv_heads", "head_dim"))
        self.value = weight(rngs, (EMBED, KV_HEADS, DIM), ("embed", "kv_heads", "head_dim"))
        self.out = weight(rngs, (HEADS, DIM, EMBED), ("heads", "head_dim", "embed"))
        self.gate = weight(rngs, (EMBED, MLP), ("embed", "mlp"))
        self.up = weight(rngs, (EMBED, MLP), ("embed", "mlp"))
        self.down = weight(rngs, (MLP, EMBED), ("mlp", "embed"))
        self.before, self.after = RMSNorm(), RMSNorm()

    def __call__(self, x):
        h, length = self.before(x), x.shape[1]
        q = jnp.einsum("btd,dhk->bthk", h, self.query[...]) * DIM**-0.5
        k = jnp.einsum("btd,dhk->bthk", h, self.key[...])
        v = jnp.einsum("btd,dhk->bthk", h, self.value[...])
        q = q.reshape(*q.shape[:2], KV_HEADS, HEADS // KV_HEADS, DIM)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k)
        scores = 10.0 * jnp.tanh(scores / 10.0)
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -2.3e38)
        weights = jax.nn.softmax(scores.astype(jnp.float32), -1).astype(x.dtype)
        h = jnp.einsum("bkgts,bskd->btkgd", weights, v)
        h = h.reshape(*h.shape[:2], HEADS, DIM)
        x = x + jnp.einsum("bthk,hkd->btd", h, self.out[...])
        h = self.after(x)
        return x + (jax.nn.gelu(h @ self.gate[...]) * (h @ self.up[...])) @ self.down[...]


class Gemma(nnx.Module):
    def __init__(self, rngs):
        self.embedder = weight(rngs, (VOCAB, EMBED), ("vocab", "embed"))
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.norm = RMSNorm()

    def __call__(self, tokens):
        x = self.embedder[...][tokens] * jnp.sqrt(float(EMBED)).astype(self.embedder[...].dtype)
        for layer in self.layers:
            x = layer(x)
        logits = self.norm(x) @ self.embedder[...].T
        return 30.0 * jnp.tanh(logits.astype(jnp.float32) / 30.0)


def loss(model, batch):
    logits = model(batch["inputs"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def build():
    tokens = np.random.default_rng(2).integers(0, VOCAB, (16, 9)).astype(np.int32)
    adapted = sk.from_nnx(Gemma, loss)

    def plain(params, state, rows):
        with nnx.use_eager_sharding(False):  # names, of which plain JAX makes nothing
            graph, variables = nnx.split(nnx.eval_shape(lambda: Gemma(nnx.Rngs(0))))
        nnx.replace_by_pure_dict(variables, nest_lists(params))
        return loss(nnx.merge(graph, variables), rows), jnp.ones(()), state

    return Model(
        adapted.init,
        adapted.loss_fn,
        {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]},
        plain,
        named_layouts(),
        refused=(UNMARKED,),
    )


def nest_lists(tree):
    """The integer keys of lists, which the adapter spells as text."""
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: nest_lists(x) for k, x in tree.items()}
