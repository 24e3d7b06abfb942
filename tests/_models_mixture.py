"""A decoder whose names are its authors' own, dense or a mixture of experts, in linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import shardkit as sk

from ._third_party import Model

VOCAB, WIDTH, HIDDEN, EXPERTS = 32, 16, 24, 4


class Layer(nn.Module):
    experts: int

    def weight(self, name, *dims):
        sizes = {"d_model": WIDTH, "d_head": WIDTH, "ffn": HIDDEN, "gate": EXPERTS}
        shape = tuple(sizes.get(dim, self.experts) for dim in dims)
        return self.param(name, nn.with_partitioning(nn.initializers.normal(0.3), dims), shape)

    @nn.compact
    def __call__(self, x):
        q, k, v = (x @ self.weight(name, "d_model", "d_head") for name in "qkv")
        scores = jnp.einsum("btd,bsd->bts", q, k) / WIDTH**0.5
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), -1)
        x = x + (weights @ v) @ self.weight("out", "d_head", "d_model")
        if not self.experts:
            up, down = self.weight("up", "d_model", "ffn"), self.weight("down", "ffn", "d_model")
            return x + nn.gelu(x @ up) @ down
        gates = jax.nn.softmax(x @ self.weight("router", "d_model", "gate"))
        shares = jnp.where(gates == gates.max(-1, keepdims=True), gates, 0.0)
        hidden = jnp.einsum("btd,edf->btef", x, self.weight("up", "expert", "d_model", "ffn"))
        down = self.weight("down", "expert", "ffn", "d_model")
        return x + jnp.einsum("btef,efd,bte->btd", nn.gelu(hidden), down, shares)


class Decoder(nn.Module):
    experts: int = 0

    @nn.compact
    def __call__(self, tokens):
        boxed = nn.with_partitioning(nn.initializers.normal(0.3), ("tokens", "d_model"))
        table = self.param("table", boxed, (VOCAB, WIDTH))
        x = table[tokens]
        for i in range(2):
            x = Layer(self.experts, name=f"layer_{i}")(x)
        head = nn.with_partitioning(nn.initializers.normal(0.3), ("d_model", "tokens"))
        return x @ self.param("head", head, (WIDTH, VOCAB))


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def build(experts=0):
    tokens = np.random.default_rng(1).integers(0, VOCAB, (16, 9)).astype(np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    model = Decoder(experts)
    adapted = sk.from_linen(model, cross_entropy, batch, inputs="inputs")

    def plain(params, state, rows):
        logits = model.apply({"params": params}, rows["inputs"])
        return cross_entropy(logits, rows), jnp.ones(()), state

    names = dict.fromkeys(("tokens", "d_model", "d_head", "ffn"))
    names |= dict.fromkeys(("gate", "expert") if experts else ())
    layouts = {
        "data": (sk.Strategy(params=sk.AxisRules(names), batch=P("data")), {"data": 4}),
        "fsdp": (
            sk.Strategy(params=sk.AxisRules({**names, "d_model": "fsdp"}), batch=P("fsdp")),
            {"fsdp": 4},
        ),
    }
    return Model(adapted.init, adapted.loss_fn, batch, plain, layouts)


def build_mixture():
    return build(EXPERTS)
