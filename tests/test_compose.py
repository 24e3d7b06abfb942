"""Compositions that make no sense: one error each, by its text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.parallel import check_axes_used, check_composition
from shardkit.testing import simulated_devices

from . import _staged

data, fsdp, tensor, zero = (getattr(sk.strategies, n) for n in ("data", "fsdp", "tensor", "zero"))


def text_of(strategy, used=(), **sizes):
    def check():
        check_composition(strategy, sizes)
        check_axes_used(strategy, sizes, used)

    with pytest.raises(sk.errors.ShardingError) as caught:
        check()
    return str(caught.value)


def test_two_strategies_for_one_axis():
    text = text_of(fsdp("data") | tensor("data", sequence=True), data=8)
    assert "The strategies do not fit together on mesh (data=8)." in text
    assert "mesh axis 'data'" in text
    assert "is taken by fsdp and by tensor+sequence; each needs an axis of its own" in text
    assert "strategies.tensor(axis) with another axis of the mesh, or only one" in text
    assert "is taken by data and by zero" in text_of(data() | zero(), data=8)


def test_an_axis_that_the_mesh_lacks():
    text = text_of(data("dat") | tensor(), data=2, tensr=4)
    assert "mesh axis 'dat'" in text
    assert "is used by data; mesh has data=2, tensr=4. Did you mean 'data'?" in text
    assert "is used by tensor; mesh has data=2, tensr=4. Did you mean 'tensr'?" in text
    assert "MeshSpec(..., tensor=2), tensor=1 to split nothing over it, or strategies." in text
    assert "strategies.tensor(axis) with one of 'data', 'tensr'" in text


def test_a_mesh_axis_that_no_strategy_uses():
    text = text_of(data() | tensor(), data=2, tensor=2, fsdp=2)
    assert "1 axis of mesh (data=2, tensor=2, fsdp=2) would be idle." in text
    assert "mesh axis 'fsdp'" in text
    assert "no strategy uses it: its 2 devices would repeat the same work" in text
    assert "(strategies are on 'data', 'tensor')" in text
    assert "| strategies.data('fsdp'), leave 'fsdp' out of the MeshSpec" in text
    assert "| strategies.own('fsdp')" in text


def test_what_is_no_idle_axis():
    check_axes_used(data(), {"data": 2, "spare": 1}, ())
    check_axes_used(data(), {"data": 2, "width": 2}, ("width",))
    check_axes_used(data().with_names(activations={"mlp": "width"}), {"data": 2, "width": 2}, ())
    check_axes_used(data() | sk.strategies.own("ring"), {"data": 2, "ring": 2}, ())
    check_axes_used(sk.Strategy(batch=P("data")), {"data": 2, "ring": 2}, ())


def test_zero_over_an_axis_that_splits_no_rows():
    own = dataclasses.replace(zero(), batch=P("fsdp"))
    text = text_of(own, data=2, fsdp=4)
    assert "splits the update over 'data', which splits no rows of the batch" in text
    assert "rows are over 'fsdp'" in text
    assert "batch=P(('fsdp', 'data'))" in text
    assert "no rows are split" in text_of(dataclasses.replace(zero(), batch=P()), data=2)


def test_a_step_refuses_them_before_it_looks_at_leaves():
    def compiled(strategy, **sizes):
        return sk.compile_step(
            lambda params, batch, key: jnp.mean(batch @ params),
            optax.sgd(0.1),
            init=lambda key: jnp.ones((4, 4)),
            batch=np.ones((8, 4), np.float32),
            mesh=sk.MeshSpec(**sizes).build(devices=jax.devices()[:4]),
            strategy=strategy,
        )

    with pytest.raises(sk.errors.ShardingError, match="do not fit together"):
        compiled(data() | zero(), data=4)
    with pytest.raises(sk.errors.ShardingError, match="would be idle"):
        compiled(data(), data=2, ring=2)


def test_micro_batches_lanes_and_zero_fit_together():
    for reduce in ("end", "every"):
        both = zero(stage=2) | sk.Strategy(accumulate=sk.Accumulate(2, reduce))
        check_composition(both, {"data": 4})


@pytest.mark.slow
def test_four_axes_at_once_equal_one_device():
    sizes = {"data": 2, "fsdp": 2, "pipe": 2, "tensor": 2}
    all_four = data() | fsdp() | sk.strategies.pipeline(micro_batches=2) | tensor()
    certificate = simulated_devices(16, _staged.verified, sizes, all_four)
    assert certificate.ok
    assert {row.mesh for row in certificate.rows} == {"(data=2, fsdp=2, pipe=2, tensor=2)"}
