"""`step.evaluate` of fewer rows than declared: that of these rows, by the program that is there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk
from shardkit.step._partial_batch import fill_batches

from ._uneven_batches import CASES, assert_close, compiled, normal


def partial(batch, row_dims, rows):
    """The first rows of every leaf that has any."""
    dims = {name: row_dims.get(name, row_dims.get("**")) for name in batch}
    return {k: x if dims[k] is None else np.take(x, range(rows), dims[k]) for k, x in batch.items()}


@pytest.mark.parametrize("mode", ["auto", "shard_map"])
def test_an_evaluation_of_fewer_rows_is_that_of_these_rows(mode):
    loss, _, batch, row_dims, _ = CASES["class weights"]
    step = compiled("class weights", mode=mode)
    state = step.init(jax.random.key(0))
    params = jax.device_get(state.params)
    for rows in (1, 3, 4, 7, 8):
        given = partial(batch, row_dims, rows)
        mean, metrics = loss(params, given, None)
        wanted = {"loss": mean.total / mean.weight, **metrics}
        assert_close(step.evaluate(state, given), wanted)
        assert_close(step.evaluate(state, jax.tree.map(jnp.asarray, given)), wanted)


def test_an_evaluation_of_fewer_time_major_rows():
    loss, _, batch, row_dims, _ = CASES["time-major"]
    step = compiled("time-major", accumulate=2)
    state = step.init(jax.random.key(0))
    given = partial(batch, row_dims, 5)
    assert_close(step.evaluate(state, given)["loss"], loss(jax.device_get(state.params), given, 0))


X = normal(8, 4)


def squares(p, b, key):
    return jnp.mean((b["x"] @ p["w"]) ** 2), {"largest": jnp.mean(jnp.abs(b["x"]).max(1))}


def spread(p, b, key):
    y = b["x"] @ p["w"]
    return jnp.mean((y - jnp.mean(y, 0)) ** 2)


def noisy(p, b, key):
    return jnp.mean((b["x"] @ p["w"]) ** 2 * jax.random.uniform(key, (len(b["x"]), 1)))


def step_of(loss, **options):
    return sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=lambda key: {"w": jax.random.normal(key, (4, 2))},
        batch={"x": X},
        mesh=sk.MeshSpec(data=4).build(devices=jax.devices()[:4]),
        strategy=sk.strategies.data(),
        **options,
    )


def test_means_of_rows_and_their_metrics():
    step = step_of(squares)
    state = step.init(jax.random.key(0))
    params = jax.device_get(state.params)
    for rows in (1, 2, 5, 6):
        loss, metrics = squares(params, {"x": X[:rows]}, None)
        assert_close(step.evaluate(state, {"x": X[:rows]}), {"loss": loss, **metrics})


def sums(p, b, key):
    y, count = jnp.sum((b["x"] @ p["w"]) ** 2, 1), len(b["x"])
    right = y > 1
    share = sk.Mean(right.sum(), count)
    return y.sum(), {"right": right.sum(), "rows": jnp.float32(count), "share": share}


@pytest.mark.parametrize("mode", ["auto", "shard_map"])
def test_sums_and_counts_of_fewer_rows(mode):
    step = step_of(sums, mode=mode)
    state = step.init(jax.random.key(0))
    params = jax.device_get(state.params)
    for rows in (1, 5, 8):
        loss, wanted = sums(params, {"x": X[:rows]}, None)
        wanted["share"] = wanted["share"].total / rows
        assert_close(step.evaluate(state, {"x": X[:rows]}), {"loss": loss, **wanted})


@pytest.mark.parametrize("total", [1, 6, 7, 8, 48])
def test_parts_hold_every_row_once(total):
    for given in range(1, total + 1):
        parts = list(fill_batches(np.arange(given), (0,), given, total))
        assert all(len(filled) == total for _, filled in parts)
        weights = np.zeros(given)
        for size, filled in parts:
            np.add.at(weights, filled, size / total)
        np.testing.assert_allclose(weights, 1)


@pytest.mark.parametrize(("rows", "expected"), [(9, "has 9 rows"), (0, "has 0 rows")])
def test_more_rows_and_none(rows, expected):
    step = step_of(squares)
    with pytest.raises(sk.errors.BatchError, match=expected) as told:
        step.evaluate(step.init(jax.random.key(0)), {"x": np.zeros((rows, 4), np.float32)})
    assert "the step was compiled for 8" in str(told.value)
    assert "parts of 1 to 8 rows each" in str(told.value)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (
            spread,
            ["step.evaluate of fewer rows", "test_partial_batch.py", "a full batch of 8 rows"],
        ),
        (noisy, ["draws random numbers in evaluation", "sk.Loss(train=..., evaluate=...)"]),
    ],
)
def test_what_depends_on_all_rows_is_its_own_program_or_refused(loss, expected):
    step = step_of(loss)
    state = step.init(jax.random.key(0))
    with pytest.raises(sk.errors.BatchError) as told:
        step.evaluate(state, {"x": X[:3]})  # 4 devices
    assert all(part in str(told.value) for part in expected), told.value
    with pytest.warns(sk.RetraceWarning, match=r"is f32\[4,4\]"):
        metrics = step.evaluate(state, {"x": X[:4]})
    if loss is spread:
        assert_close(metrics["loss"], loss(jax.device_get(state.params), {"x": X[:4]}, None))


def test_an_evaluation_without_draws_beside_a_training_with_them():
    step = step_of(sk.Loss(noisy, squares))
    state = step.init(jax.random.key(0))
    wanted, _ = squares(jax.device_get(state.params), {"x": X[:3]}, None)
    assert_close(step.evaluate(state, {"x": X[:3]})["loss"], wanted)
