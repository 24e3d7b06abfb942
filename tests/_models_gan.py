"""A GAN: two steps on the parameters of both networks, each training one of them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ._third_party import UNMARKED, Model, layouts


def init(key):
    keys = iter(jax.random.split(key, 4))

    def mlp(inputs, outputs):
        return {
            "in": jax.random.normal(next(keys), (inputs, 32)) / inputs**0.5,
            "out": jax.random.normal(next(keys), (32, outputs)) / 32**0.5,
        }

    return {"generator": mlp(4, 6), "critic": mlp(6, 1)}


def apply(weights, x):
    return jax.nn.leaky_relu(x @ weights["in"], 0.2) @ weights["out"]


def generator_loss(params, batch, key=None):
    critic = jax.lax.stop_gradient(params["critic"])
    scores = apply(critic, apply(params["generator"], batch["z"]))
    return jnp.mean(jax.nn.softplus(-scores))


def critic_loss(params, batch, key=None):
    fake = jax.lax.stop_gradient(apply(params["generator"], batch["z"]))
    real, made = apply(params["critic"], batch["x"]), apply(params["critic"], fake)
    return jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(made))


def build(loss=generator_loss):
    rng = np.random.default_rng(10)
    return Model(
        init,
        loss,
        {
            "x": rng.normal(size=(16, 6)).astype(np.float32),
            "z": rng.normal(size=(16, 4)).astype(np.float32),
        },
        lambda params, state, rows: (loss(params, rows), jnp.ones(()), state),
        layouts({"*/in": P(None, "tensor"), "*/out": P("tensor")}),
        refused=(UNMARKED,),
    )


def build_critic():
    """The step of the critic."""
    return build(critic_loss)
