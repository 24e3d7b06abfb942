"""A residual network in linen's idiom: batch statistics in a collection, a `train` flag."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import shardkit as sk

from ._third_party import Model, layouts


class Block(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        def norm():
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)

        strides = (self.stride, self.stride)
        y = nn.Conv(self.features, (3, 3), strides, use_bias=False)(x)
        y = nn.relu(norm()(y))
        y = norm()(nn.Conv(self.features, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = norm()(nn.Conv(self.features, (1, 1), strides, use_bias=False, name="proj")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, image, train):
        x = nn.relu(nn.Conv(8, (3, 3), use_bias=False, name="stem")(image))
        x = Block(8, 1)(x, train)
        x = Block(16, 2)(x, train)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def build():
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(16, 8, 8, 3)).astype(np.float32),
        "label": rng.integers(0, 5, 16).astype(np.int32),
    }
    adapted = sk.from_linen(
        ResNet(),
        cross_entropy,
        batch,
        inputs="image",
        train={"train": True},
        evaluate={"train": False},
    )

    def plain(params, stats, rows):
        logits, after = ResNet().apply(
            {"params": params, **stats}, rows["image"], train=True, mutable=["batch_stats"]
        )
        return cross_entropy(logits, rows), jnp.ones(()), after

    split = {"Block_*/Conv_*/kernel": P(None, None, None, "tensor"), "head/kernel": P("tensor")}
    return Model(
        adapted.init,
        adapted.loss_fn,
        batch,
        plain,
        layouts(split),
        # Each micro-batch normalizes by its own statistics, over all devices.
        accumulate=sk.Accumulate(2, "every"),
        refused=(("shard_map", "state|statistics"), ("tensor", "convolution"), ("fsdp", "conv")),
    )
