"""A selective state-space block in Equinox's idiom: modules are pytrees, split by `partition`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ._third_party import UNMARKED, Model, layouts

VOCAB, EMBED, INNER, STATE = 16, 8, 16, 4


class Mamba(eqx.Module):
    in_proj: eqx.nn.Linear
    conv: eqx.nn.Conv1d
    x_proj: eqx.nn.Linear
    dt_proj: eqx.nn.Linear
    out_proj: eqx.nn.Linear
    log_a: jax.Array
    skip: jax.Array
    rank: int = eqx.field(static=True)

    def __init__(self, *, key):
        keys = jax.random.split(key, 5)
        self.rank = 2
        self.in_proj = eqx.nn.Linear(EMBED, 2 * INNER, use_bias=False, key=keys[0])
        self.conv = eqx.nn.Conv1d(INNER, INNER, 3, padding=2, groups=INNER, key=keys[1])
        self.x_proj = eqx.nn.Linear(INNER, self.rank + 2 * STATE, use_bias=False, key=keys[2])
        self.dt_proj = eqx.nn.Linear(self.rank, INNER, key=keys[3])
        self.out_proj = eqx.nn.Linear(INNER, EMBED, use_bias=False, key=keys[4])
        self.log_a = jnp.log(jnp.tile(jnp.arange(1.0, STATE + 1), (INNER, 1)))
        self.skip = jnp.ones(INNER)

    def __call__(self, x):
        length = x.shape[0]
        h, gate = jnp.split(jax.vmap(self.in_proj)(x), 2, axis=-1)
        h = jax.nn.silu(self.conv(h.T)[:, :length].T)
        dt, b, c = jnp.split(jax.vmap(self.x_proj)(h), [self.rank, self.rank + STATE], axis=-1)
        dt = jax.nn.softplus(jax.vmap(self.dt_proj)(dt))
        decay = jnp.exp(-dt[:, :, None] * jnp.exp(self.log_a))
        drive = dt[:, :, None] * b[:, None, :] * h[:, :, None]

        def scan(carry, step):
            carry = step[0] * carry + step[1]
            return carry, carry

        _, states = jax.lax.scan(scan, jnp.zeros_like(drive[0]), (decay, drive))
        y = jnp.einsum("tis,ts->ti", states, c) + self.skip * h
        return jax.vmap(self.out_proj)(y * jax.nn.silu(gate))


class Tagger(eqx.Module):
    embed: eqx.nn.Embedding
    norm: eqx.nn.RMSNorm
    block: Mamba
    head: eqx.nn.Linear

    def __init__(self, *, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(VOCAB, EMBED, key=keys[0])
        self.norm = eqx.nn.RMSNorm(EMBED)
        self.block = Mamba(key=keys[1])
        self.head = eqx.nn.Linear(EMBED, VOCAB, key=keys[2])

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens)
        return jax.vmap(self.head)(x + self.block(jax.vmap(self.norm)(x)))


def build():
    tokens = np.random.default_rng(3).integers(0, VOCAB, (16, 9)).astype(np.int32)
    _, static = eqx.partition(
        eqx.filter_eval_shape(Tagger, key=jax.random.key(0)), eqx.is_array_like
    )

    def init(key):
        return eqx.filter(Tagger(key=key), eqx.is_inexact_array)

    def mean(params, batch):
        logits = jax.vmap(eqx.combine(params, static))(batch["inputs"])
        logits = jax.nn.log_softmax(logits.astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(logits, batch["targets"][..., None], -1))

    split = {"block/in_proj/weight": P("tensor"), "block/out_proj/weight": P(None, "tensor")}
    return Model(
        init,
        lambda params, batch, key: mean(params, batch),
        {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]},
        lambda params, state, rows: (mean(params, rows), jnp.ones(()), state),
        layouts({**split, "head/weight": P("tensor"), "embed/weight": P("tensor")}),
        refused=(UNMARKED, ("accumulate", "convol")),
    )
