"""Losses that sum over the batch by a name, as `BatchNorm(axis_name="batch")` does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardkit as sk

RNG = np.random.default_rng(0)
BATCH = {"x": RNG.normal(size=(16, 6)).astype(np.float32)}
OPTIMIZER = optax.trace(0.0)


class Net(nn.Module):
    """A layer of flax's ImageNet example; `mixes` adds a statistic of one device's rows."""

    axis: str | None = "batch"
    mixes: bool = False

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(4)(x)
        x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis, momentum=0.9)(x)
        return x / jnp.max(x) if self.mixes else x


def cubed(y, batch):
    return jnp.mean((y - 1) ** 3)


def linen_model(**options):
    modes = {"train": {"train": True}, "evaluate": {"train": False}}
    return sk.from_linen(Net(**options), cubed, BATCH, **modes)


def compiled(model, mode, **options):
    return sk.compile_step(
        model.loss_fn,
        OPTIMIZER,
        init=model.init,
        batch=BATCH,
        mesh=sk.MeshSpec(data=8).build(),
        strategy=sk.Strategy(params=sk.REPLICATED, batch=jax.sharding.PartitionSpec("data")),
        mode=mode,
        **options,
    )


def by_hand(params, x):
    """Loss, mean and variance of the whole batch."""
    h = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    mean, var = h.mean(0), h.var(0)
    norm = params["BatchNorm_0"]
    h = (h - mean) / jnp.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
    return jnp.mean((h - 1) ** 3), (mean, var)


@pytest.mark.parametrize("mode", ["auto", "shard_map"])
def test_batch_norm_has_the_statistics_of_the_whole_batch(mode):
    step = compiled(linen_model(), mode)
    state = step.init(jax.random.key(0))
    params = jax.tree.map(np.asarray, state.params)
    (loss, stats), gradients = jax.value_and_grad(by_hand, has_aux=True)(params, BATCH["x"])
    state, metrics = step(state, BATCH)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(state.opt_state.trace), jax.tree.leaves(gradients), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    running = state.model_state["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(running["mean"], 0.1 * stats[0], atol=1e-6)
    np.testing.assert_allclose(running["var"], 0.9 + 0.1 * stats[1], atol=1e-6)


def refusal(model, **options):
    with pytest.raises(sk.errors.StepError) as raised:
        compiled(model, "shard_map", **options)
    return str(raised.value)


def test_statistics_of_one_device_are_refused_on_shards():
    text = refusal(linen_model(axis=None))
    assert "model_state/batch_stats/BatchNorm_0/mean  is a mean of rows" in text
    assert "test_batch_axes.py:" in text
    assert 'nn.BatchNorm(..., axis_name="batch")' in text
    text = refusal(linen_model(mixes=True))
    assert "reduce_max reduces over rows, but not by a sum (test_batch_axes.py:" in text
    assert "batch_stats" not in text


def test_a_sum_that_counts_devices_is_refused_on_shards():
    """`psum` of a mean grows with the devices; `pmean` does not."""

    def compiled_with(reduce):
        def loss(params, batch, key):
            return reduce(jnp.mean((batch["x"] @ params) ** 2), "batch")

        return sk.compile_step(
            loss,
            OPTIMIZER,
            init=lambda key: jnp.ones((6, 2)),
            batch=BATCH,
            mesh=sk.MeshSpec(data=8).build(),
            strategy=sk.strategies.data(),
            mode="shard_map",
        )

    with pytest.raises(sk.errors.StepError, match="a number that depends on how many rows"):
        compiled_with(jax.lax.psum)
    step = compiled_with(jax.lax.pmean)
    _, metrics = step(step.init(jax.random.key(0)), BATCH)
    np.testing.assert_allclose(metrics["loss"], np.mean((BATCH["x"].sum(1)) ** 2), rtol=1e-5)


@pytest.mark.slow
def test_nnx_batch_norm_by_name():
    class NnxNet(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(6, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, axis_name="batch", rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    model = sk.from_nnx(NnxNet, lambda module, batch: cubed(module(batch["x"]), batch))
    losses = []
    for mode in ("auto", "shard_map"):
        step = compiled(model, mode)
        state = step.init(jax.random.key(0))
        params = jax.tree.map(np.asarray, state.params)
        losses.append(step(state, BATCH)[1]["loss"])
    h = BATCH["x"] @ params["dense"]["kernel"]
    h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
    np.testing.assert_allclose(losses, [np.mean((h - 1) ** 3)] * 2, rtol=1e-5)


def exchanged(h):
    return jax.lax.ppermute(h, "batch", [(i, (i + 1) % 8) for i in range(8)])


# Collectives that take an axis of some sizes alone, or have no derivative.
UNFIT = {
    "ppermute": (exchanged, "auto", "doesn't match the axis size.*psum or pmean"),
    "psum_scatter": (
        lambda h: jax.lax.psum_scatter(h.sum(0), "data", tiled=True),
        "shard_map",
        "psum_scatter.*must be divisible.*psum or pmean",
    ),
    "all_to_all": (
        lambda h: jax.lax.all_to_all(h, "batch", 1, 0, tiled=True),
        "shard_map",
        "all_to_all.*has to be divisible.*psum or pmean",
    ),
    "all_gather": (
        lambda h: h @ jax.lax.all_gather(h, "batch", tiled=True).T,
        "shard_map",
        "all_gather.*psum or pmean of sums over rows",
    ),
    "pmax": (
        lambda h: h / jax.lax.stop_gradient(jax.lax.pmax(h.max(), "batch")),
        "auto",
        "Differentiation rule for 'pmax'.*stop_gradient of what it takes",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_collective_that_cannot_be_traced_is_named_with_its_line(name):
    collective, mode, told = UNFIT[name]

    def loss(params, batch, key):
        return jnp.mean(collective(batch["x"] @ params) ** 2)

    with pytest.raises(sk.errors.StepError, match=f"(?s){told}") as refused:
        sk.compile_step(
            loss,
            OPTIMIZER,
            init=lambda key: jnp.ones((6, 2)),
            batch=BATCH,
            mesh=sk.MeshSpec(data=8).build(),
            strategy=sk.strategies.data(),
            mode=mode,
        )
    assert "test_batch_axes.py:" in str(refused.value)
