"""Watched numbers: spikes, copies that differ, and where something stops being finite."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.report import read_ledger
from shardkit.run.guards import ReplicaComparison, SpikeDetector, check_replicas, first_nonfinite

from . import _checkpoints as ck

# --- spikes


def spikes(curve):
    watch = SpikeDetector()
    return [step for step, value in enumerate(curve) if watch.update(value)]


def noisy(curve, noise=0.02, seed=0):
    rng = np.random.default_rng(seed)
    return [value * (1 + noise * rng.standard_normal()) for value in curve]


FALLING = {
    "power law": [10 * (step + 1) ** -0.5 for step in range(400)],
    "cliff": [5.5] * 40 + [5.5 * 0.9**step for step in range(60)] + [0.01] * 100,
    "exact": [2.0] * 200,
    "warm-up of the norm": [0.1 + step * 0.01 for step in range(100)],
}


@pytest.mark.parametrize("curve", FALLING)
def test_a_loss_that_falls_or_creeps_never_spikes(curve):
    assert not spikes(FALLING[curve])
    for seed in range(20):
        assert not spikes(noisy(FALLING[curve], seed=seed))


@pytest.mark.parametrize("seed", range(5))
def test_a_jump_is_told_once_and_what_is_expected_with_it(seed):
    curve = noisy(FALLING["power law"], seed=seed)
    for step in (100, 101, 102, 250):
        curve[step] *= 3
    assert spikes(curve) == [100, 250]
    watch = SpikeDetector()
    found = [spike for value in curve if (spike := watch.update(value))]
    assert found[0].value == curve[100]
    assert found[0].expected == pytest.approx(np.median(curve[36:100]))
    assert found[0].expected < found[0].limit < found[0].value


def test_a_new_level_is_learned_and_the_next_jump_from_it_told():
    curve = [1.0] * 50 + [2.0] * 60 + [4.0] * 5
    assert spikes(curve) == [50, 110]


# --- replicas


def flipped(x, device, bit=12):
    """The array with one bit of one device's copy changed."""
    shards = []
    for shard in x.addressable_shards:
        data = np.array(shard.data)
        if shard.device == device:
            data.reshape(-1).view(np.uint32)[3] ^= 1 << bit
        shards.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)


@pytest.fixture(scope="module")
def placed():
    mesh = sk.MeshSpec(data=4, tensor=2).build()
    specs = {"w": P(None, "tensor"), "split": P(("data", "tensor")), "b": P()}
    made = {"w": jnp.ones((8, 6)), "split": jnp.ones((8, 4)), "b": jnp.arange(5.0)}
    state = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in made.items()}
    return {**state, "key": jax.device_put(jax.random.key(0), NamedSharding(mesh, P()))}


def test_equal_copies_are_equal_and_only_copies_are_compared(placed):
    assert check_replicas(placed) == ()
    assert set(ReplicaComparison(placed).leaves) == {"w", "b", "key"}


def test_a_flipped_bit_is_found_and_named_by_leaf_device_and_both_checksums(placed):
    device = placed["w"].sharding.mesh.devices[2, 1]
    bad = {**placed, "w": flipped(placed["w"], device)}
    (found,) = check_replicas(bad)
    assert (found.leaf, found.device, found.copies) == ("w f32[8,6]", device, 4)
    assert found.place == {"data": 2, "tensor": 1}
    assert found.checksum != found.expected
    text = f"{found.problem.subject} {found.problem.why}"
    assert f"state/w f32[8,6] on {device} at (data=2, tensor=1) has checksum" in text
    assert f"{found.checksum}; most of 4 copies have {found.expected}" in text
    every = check_replicas({**bad, "b": flipped(placed["b"], jax.devices()[0])})
    assert [(one.leaf, one.device.id) for one in every] == [("b f32[5]", 0), ("w f32[8,6]", 5)]


def test_nothing_but_checksums_travels(placed):
    replicas = ReplicaComparison(placed)
    program = replicas._checksums.lower([placed[name] for name in replicas.leaves]).compile()
    ledger = read_ledger(program.as_text(), [("data", 4), ("tensor", 2)])
    assert ledger.complete
    # u32[2] for each of 3 leaves on 8 devices
    assert sum(row.payload_bytes for row in ledger) <= 3 * 8 * 8


# --- where


def scanned(params, x):
    def layer(h, w):
        with jax.named_scope("mlp"):
            return jnp.log(jnp.tanh(h @ w)), None

    with jax.named_scope("layers"):
        h, _ = jax.lax.scan(jax.checkpoint(layer), x, params)
    return jnp.where(h > 0, h, 0).sum()


@pytest.mark.parametrize("differentiated", [False, True])
def test_the_first_operation_and_its_layer_are_named(differentiated):
    run = jax.value_and_grad(scanned) if differentiated else scanned
    weights = np.stack([np.eye(4), np.eye(4), np.eye(4)]).astype(np.float32)
    x = np.full((2, 4), 30.0, np.float32)
    closed = jax.make_jaxpr(run)(weights, x)
    # tanh(30) is 1, whose log is 0, whose log is not finite.
    origin = first_nonfinite(closed, (weights, x))
    assert (origin.operation, origin.scope, origin.iterations) == ("log", "layers/mlp", (1,))
    assert origin.source.startswith(__file__)
    assert f"log in layers/mlp, iteration 1 ({__file__}:" in str(origin)


def test_a_gradient_that_stops_being_finite_alone_is_found_in_the_backward_pass():
    def root(w):
        with jax.named_scope("norm"):
            return jnp.sqrt(jnp.square(w).sum())

    w = np.zeros(3, np.float32)
    assert math.isfinite(root(w))
    origin = first_nonfinite(jax.make_jaxpr(jax.grad(root))(w), (w,))
    assert (origin.operation, origin.scope) == ("div", "norm")


def test_what_is_finite_or_bad_from_the_start_has_no_origin():
    closed = jax.make_jaxpr(lambda x: jnp.where(x > 0, x, -jnp.inf).max())(1.0)
    assert first_nonfinite(closed, (jnp.float32(1),)) is None
    assert first_nonfinite(closed, (jnp.float32(jnp.nan),)) is None


def test_bits_of_a_flip_are_what_the_test_says(placed):
    before, after = ck.bits(placed["w"]), ck.bits(flipped(placed["w"], jax.devices()[0]))
    (one,), (other,) = before.values(), after.values()
    assert sum((a ^ b).bit_count() for a, b in zip(one, other, strict=True)) == 1
