"""A U-Net that predicts noise, in linen's idiom, with an average of its parameters (EMA)."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import shardkit as sk

from ._third_party import SGD, UNMARKED, Model, layouts


class Down(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, time):
        h = nn.Conv(self.features, (3, 3))(nn.swish(nn.GroupNorm(2)(x)))
        h = h + nn.Dense(self.features)(nn.swish(time))[:, None, None]
        h = nn.Conv(self.features, (3, 3))(nn.swish(nn.GroupNorm(2)(h)))
        return h + nn.Conv(self.features, (1, 1), name="skip")(x)


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x, t):
        angles = t[:, None] * jnp.exp(-jnp.arange(4.0))
        time = nn.Dense(16)(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1))
        x = nn.Conv(8, (3, 3), name="stem")(x)
        high = Down(8, name="high")(x, time)
        low = nn.Conv(16, (3, 3), (2, 2), name="pool")(high)
        low = Down(16, name="low")(low, time)
        up = jax.image.resize(low, (*high.shape[:-1], 16), "nearest")
        both = jnp.concatenate([nn.Conv(8, (3, 3), name="up")(up), high], -1)
        return nn.Conv(2, (3, 3), name="out")(Down(8, name="mix")(both, time))


class Average(NamedTuple):
    ema: Any


def with_ema(optimizer, decay=0.9):
    """The optimizer, with an average of the parameters it makes as the last part of its state."""

    def update(updates, state, params=None):
        after = optax.apply_updates(params, updates)
        return updates, Average(optax.incremental_update(after, state.ema, 1 - decay))

    return optax.chain(optimizer, optax.GradientTransformation(lambda p: Average(p), update))


def squared_error(noise, batch):
    return jnp.mean((noise - batch["noise"]) ** 2)


def build():
    rng = np.random.default_rng(6)
    batch = {
        "x": rng.normal(size=(16, 8, 8, 2)).astype(np.float32),
        "noise": rng.normal(size=(16, 8, 8, 2)).astype(np.float32),
        "t": rng.uniform(0, 1, 16).astype(np.float32),
    }
    adapted = sk.from_linen(UNet(), squared_error, batch, inputs=("x", "t"))

    def plain(params, state, rows):
        noise = UNet().apply({"params": params}, rows["x"], rows["t"])
        return squared_error(noise, rows), jnp.ones(()), state

    split = {
        "low/Conv_*/kernel": P(None, None, None, "tensor"),
        "up/kernel": P(None, None, "tensor"),
    }
    return Model(
        adapted.init,
        adapted.loss_fn,
        batch,
        plain,
        layouts(split),
        refused=(
            ("accumulate", "convolution"),
            ("tensor", "convolution"),
            ("fsdp", "convolution"),
            UNMARKED,
        ),
        optimizer=with_ema(SGD),
        extra=lambda opt_state: (opt_state[0][0], opt_state[1].ema),
    )
