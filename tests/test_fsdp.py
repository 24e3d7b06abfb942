"""fsdp gathers layer by layer, and keeps what it gathered only where it is told to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk
from shardkit.lm import Decoder, DecoderConfig, decoder_loss

from ._quick import some_quick

fsdp = sk.strategies.fsdp
KEPT = fsdp(reshard_after_forward=False)
SIZES = DecoderConfig(vocab=32, embed_dim=32, num_layers=4, num_heads=2, mlp_dim=64)
TOKENS = np.zeros((4, 8), np.int32)
BATCH = {"inputs": TOKENS, "targets": TOKENS, "weights": np.ones((4, 8), np.float32)}
# Elements of one layer's products: query, key, value, out; gate, up, down.
LAYER = 4 * 32 * 32 + 3 * 32 * 64


@functools.cache
def report(strategy, layers=4, remat="none"):
    config = dataclasses.replace(SIZES, num_layers=layers)
    model = sk.from_nnx(lambda rngs: Decoder(config, rngs), decoder_loss)
    return sk.compile_step(
        model.loss_fn,
        optax.sgd(0.1),
        init=model.init,
        batch=BATCH,
        mesh=sk.MeshSpec(fsdp=4).build(devices=jax.devices()[:4]),
        strategy=strategy,
        remat=remat,
    ).report()


def gathers(of):
    """Number of gathers of a layer's weights, by phase, and their wire bytes."""
    rows = [row for row in of.ledger.where(kind="all-gather") if "layers" in row.scope]
    count = {phase: 0 for phase in ("forward", "backward", "recompute")}
    for row in rows:
        count[row.phase] += row.trips
    return count, sum(row.wire_bytes for row in rows)


def test_weights_are_gathered_for_forward_and_again_for_backward():
    count, wire = gathers(report(fsdp()))
    assert (count["forward"], count["backward"] + count["recompute"]) == (7 * 4, 7 * 4)
    assert wire == 2 * 4 * LAYER * 4 * 3 // 4


@pytest.mark.parametrize("remat", some_quick(["none", "full"], "full"))
def test_kept_weights_are_gathered_once_whatever_is_rematerialized(remat):
    count, wire = gathers(report(KEPT, remat=remat))
    assert count == {"forward": 7 * 4, "backward": 0, "recompute": 0}
    assert wire == 4 * LAYER * 4 * 3 // 4


def test_kept_weights_take_their_memory_and_are_held_to_one_gather():
    kept, dropped = report(KEPT, remat="full"), report(fsdp(), remat="full")
    more = kept.memory.temp - dropped.memory.temp
    assert more >= 0.9 * 4 * LAYER * 4
    (least,), (most,) = kept.minima, dropped.minima
    weights = (SIZES.vocab * 32 * 2 + 4 * LAYER) * 4
    assert most.bytes - least.bytes == pytest.approx(weights * 3 / 4)


@pytest.mark.slow
def test_depth_adds_less_than_a_layer_of_gathered_weights():
    shallow, deep = (report(fsdp(), layers=n, remat="full").memory.temp for n in (4, 16))
    # What a layer does add: its input for the backward pass, and the gradient of its own shard.
    assert (deep - shallow) / 12 < 0.75 * LAYER * 4
    kept = [report(KEPT, layers=n, remat="full").memory.temp for n in (4, 16)]
    assert (kept[1] - kept[0]) / 12 > LAYER * 4, "the test would not see a stack that is gathered"


def own_model(marked):
    """A model of the user's own: two scanned layers over a dict of stacked arrays."""

    def init(key):
        return {
            "w": sk.WithAxes(jax.random.normal(key, (2, 32, 32)) / 6, ("layers", "embed", None))
        }

    def loss(params, batch, key):
        def layer(x, w):
            w = sk.nn.use_param(w, "embed", None) if marked else w
            return jnp.tanh(sk.nn.constrain(x @ w, "batch", "embed")), None

        x, _ = jax.lax.scan(sk.nn.remat(layer, scanned=True), batch, params["w"])
        return (x**2).mean()

    return loss, init


def own_step(strategy, marked=True):
    loss, init = own_model(marked)
    return sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=init,
        batch=np.ones((8, 32), np.float32),
        mesh=sk.MeshSpec(fsdp=4).build(devices=jax.devices()[:4]),
        strategy=strategy,
    )


def test_a_model_of_ones_own_marks_its_weights():
    kept, dropped = own_step(KEPT), own_step(fsdp())
    trips = [
        sum(row.trips for row in s.report().ledger.where(kind="all-gather"))
        for s in (kept, dropped)
    ]
    assert trips == [2, 4]
    batch = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    made = [s.gradients(s.init(jax.random.key(0)), batch)[1]["w"] for s in (kept, dropped)]
    np.testing.assert_allclose(*made, rtol=1e-5, atol=1e-8)


def test_a_model_without_marks_cannot_keep_them():
    with pytest.raises(sk.errors.StepError, match=r"needs `sk\.nn\.use_param`, but"):
        own_step(KEPT, marked=False)


def frozen_step(trained, scanned, **options):
    """Four frozen layers between two trained matrices, of which some are trained."""

    def init(key):
        named = {"below": 1, "above": 1, **({"layers": 4} if scanned else dict.fromkeys("0123", 1))}
        sizes = {name: (n, 32, 32) if name == "layers" else (32, 32) for name, n in named.items()}
        return {
            name: sk.WithAxes(
                jax.random.normal(key, size) / 6, ("layers", "embed", None)[3 - len(size) :]
            )
            for name, size in sizes.items()
        }

    def loss(params, batch, key):
        def layer(x, w):
            w = sk.nn.use_param(w, "embed", None)
            return jnp.tanh(sk.nn.constrain(x @ w, "batch", None)), None

        x, _ = sk.nn.remat(layer)(batch, params["below"])
        if scanned:
            x, _ = jax.lax.scan(sk.nn.remat(layer, scanned=True), x, params["layers"])
        for name in () if scanned else "0123":
            x, _ = sk.nn.remat(layer)(x, params[name])
        x, _ = sk.nn.remat(layer)(x, params["above"])
        return (x**2).mean()

    return sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=init,
        batch=np.ones((8, 32), np.float32),
        mesh=sk.MeshSpec(fsdp=4).build(devices=jax.devices()[:4]),
        trainable=trained,
        **options,
    )


FROZEN = {  # trained, in a loop: weights that the backward pass needs
    ("above", True): 1,
    ("below", True): 6,
    ("above", False): 1,
    ("below", False): 6,
    ("2", False): 3,
}


@pytest.mark.parametrize("mode", ["auto", "shard_map"])
@pytest.mark.parametrize("remat", some_quick(["none", "full"], "full"))
@pytest.mark.parametrize(("trained", "scanned"), some_quick(FROZEN, ("above", True), ("2", False)))
def test_frozen_weights_are_gathered_again_only_if_a_gradient_passes(trained, scanned, remat, mode):
    made = frozen_step(trained, scanned, mode=mode, remat=remat, strategy=fsdp()).report()
    one, again = 32 * 32 * 4 * 3 / 4, FROZEN[trained, scanned]
    (least,) = made.minima
    assert least.bytes == one * (6 + again + 1)
    if scanned:  # of layers without a loop XLA may keep gathered weights
        (trips,) = {sum(row.trips for row in made.ledger.where(kind="all-gather") if row.trips > 1)}
        assert trips == 4 * (1 + (trained == "below"))
    frozen = {f"f32[{size}]" for size in ("4,32,32", "4,8,32")}
    reduced = [row for row in made.ledger if row.kind in ("all-reduce", "reduce-scatter")]
    assert not frozen & {operand for row in reduced for operand in row.operands}
