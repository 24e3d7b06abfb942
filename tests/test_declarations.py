"""What a strategy refuses where it is declared, by the text of its error."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.parallel._compression import compressed_sum

made = sk.strategies

WRONG = {
    "kv_heads": (lambda: made.tensor(kv_heads=2), "kv_heads=2"),
    "schedule": (lambda: made.pipeline(schedule=["x"], micro_batches=2), "schedule=['x']"),
    "stages": (
        lambda: made.pipeline(micro_batches=2, layers_per_stage=[3, -1]),
        "layers_per_stage=[3, -1]",
    ),
    "number": (
        lambda: made.pipeline(micro_batches=2, layers_per_stage=3),
        "layers_per_stage=3",
    ),
    "join": (lambda: made.fsdp() | "data", "| 'data'"),
    "axis": (lambda: made.fsdp(3), "axis=3"),
    "no axis": (lambda: made.expert(axis=""), "axis=''"),
    "stage": (lambda: made.zero(stage=True), "stage=True"),
    "size": (lambda: made.fsdp(min_size="x"), "min_size='x'"),
    "block": (lambda: sk.GradientCompression("data", block=True), "True is not a positive number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_where_it_is_declared(name):
    call, text = WRONG[name]
    with pytest.raises(sk.errors.StepError) as raised:
        call()
    assert text in str(raised.value)
    assert "Fix: " in str(raised.value)


def test_stages_may_be_any_sequence():
    lists, tuples = (
        made.pipeline(micro_batches=3, layers_per_stage=kind([3, 1, 2])) for kind in (list, tuple)
    )
    assert hash(lists.overrides) == hash(tuples.overrides)


def test_nothing_is_rounded_where_nothing_travels():
    mesh = sk.MeshSpec(data=1).build(devices=jax.devices()[:1])
    x = jnp.linspace(-1, 1, 37)
    how = sk.GradientCompression("data", block=8)
    total, left = jax.shard_map(
        lambda x, e: compressed_sum(x, e, how),
        mesh=mesh,
        in_specs=(P("data"), P("data")),
        out_specs=(P(), P("data")),
    )(x, jnp.zeros_like(x))
    np.testing.assert_array_equal(total, x)
    np.testing.assert_array_equal(left, 0)


def test_multi_steps_is_told_its_transformation():
    with pytest.raises(sk.errors.StepError, match=r"MultiSteps\(\.\.\.\)\.gradient_transformation"):
        sk.compile_step(
            lambda params, batch, key: params.sum(),
            optax.MultiSteps(optax.sgd(1.0), 2),  # pyright: ignore
            init=lambda key: jnp.ones(2),
            batch={"x": np.ones((2, 2), np.float32)},
            mesh=sk.MeshSpec(data=1).build(devices=jax.devices()[:1]),
            strategy=made.data(),
        )
