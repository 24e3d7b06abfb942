"""Experts over a mesh axis: parity of one layer, what travels, mutations, errors.

The parity of the decoder with experts are rows of `_parity.py`.
"""

import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk
from shardkit.lm import Decoder, DecoderConfig, decoder_loss
from shardkit.lm._mixture import mixture
from shardkit.nn._expert_dispatch import run_locally
from shardkit.parallel.expert import _expert
from shardkit.parallel.expert._ragged import RaggedExchange, exchange, received_experts
from shardkit.testing import EXPERT_MUTATIONS, kill_matrix

from . import _parity
from ._quick import some_quick

SIZES = {
    "vocab": 32,
    "embed_dim": 8,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_dim": 8,
    "expert_mlp": 4,
    "experts": 8,
}
BOUNDED = DecoderConfig(**SIZES, capacity_factor=1.0)
DROPLESS = DecoderConfig(**SIZES, shared_experts=1)
ROWS, LENGTH = 16, 8
S = sk.strategies

CASES = {
    "data x expert": (
        DROPLESS,
        S.data() | S.expert(),
        {"data": 2, "expert": 4},
        {"accumulate": 2, "remat": "full"},
    ),
    "bf16": (BOUNDED, S.fsdp() | S.expert(), {"fsdp": 2, "expert": 2}, {"precision": "bfloat16"}),
}
COUNTED = (np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) > 11).astype(np.float32)


def layer_init(key):
    """One mixture without the decoder around it: programs of a fourth of the size."""
    number, width, inner = SIZES["experts"], SIZES["embed_dim"], SIZES["expert_mlp"]
    wide, tall = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")
    gate, up, down, router = jax.random.split(key, 4)
    return {
        "router": sk.WithAxes(jax.random.normal(router, (width, number)), ("embed", None)),
        "expert_gate": sk.WithAxes(jax.random.normal(gate, (number, width, inner)), wide),
        "expert_up": sk.WithAxes(jax.random.normal(up, (number, width, inner)), wide),
        "expert_down": sk.WithAxes(jax.random.normal(down, (number, inner, width)), tall),
    }


def layer_loss(config):
    def loss(params, batch, key):
        x = sk.nn.constrain(batch["x"], "batch", "length", "embed")
        y, sums = sk.nn.remat(lambda w, h: mixture(config, w, h, batch["weights"]))(params, x)
        counted = batch["weights"].sum()
        errors = ((y - jnp.tanh(2 * x)) ** 2).mean(-1)
        total = (batch["weights"] * errors).sum() + 0.1 * (sums["balance"] + sums["z"]).sum()
        return sk.Mean(total, counted), {"dropped": sk.Mean(sums["dropped"].sum(), counted)}

    return loss


def vectors(seed=0):
    x = np.random.default_rng(seed).standard_normal((ROWS, LENGTH, SIZES["embed_dim"]), np.float32)
    return {"x": x, "weights": COUNTED}


def layer(config, strategy, mesh, **options):
    return sk.compile_step(
        layer_loss(config),
        optax.sgd(0.1),
        init=layer_init,
        batch=vectors(),
        mesh=mesh,
        strategy=strategy,
        **options,
    )


def mesh_of(sizes):
    return sk.MeshSpec(**sizes).build(devices=jax.devices()[: math.prod(sizes.values())])


@pytest.mark.parametrize("name", some_quick(CASES, "bf16"))
def test_experts_over_a_mesh_axis_give_the_numbers_of_one_device(name):
    config, strategy, sizes, options = CASES[name]
    made = []

    def factory(mesh):
        made.append(layer(config, strategy, mesh, **options))
        return made[-1]

    sk.verify(factory, [mesh_of(sizes)], batches=[vectors(0), vectors(1)], steps=2).check()
    step = made[-1]
    assert step.shardings.params["expert_up"].spec[0] == "expert"
    metrics = step.evaluate(step.init(jax.random.key(0)), vectors())
    assert (metrics["dropped"] > 0.05) == (config.capacity_factor is not None)
    if name == "data x expert":
        check_reductions(step)


def exchanged(operand, output, here, sizes, there, arriving, *, axis_name):
    """What `jax.lax.ragged_all_to_all` documents, for compilers without it."""
    sent = jax.lax.all_gather(operand, axis_name)
    here, sizes, there = (jax.lax.all_gather(x, axis_name) for x in (here, sizes, there))
    me, at = jax.lax.axis_index(axis_name), jnp.arange(len(output))
    for sender in range(len(sent)):
        row = at - there[sender, me]
        inside = (row >= 0) & (row < sizes[sender, me])
        came = jnp.take(sent[sender], here[sender, me] + row, axis=0, mode="fill", fill_value=0)
        output = jnp.where(inside[:, None], came, output)
    wrong = jnp.nan if jnp.issubdtype(output.dtype, jnp.inexact) else 0
    return jnp.where((arriving == sizes[:, me]).all(), output, jnp.asarray(wrong, output.dtype))


UNPADDED = {
    "data x expert": CASES["data x expert"],
    "fsdp x expert x tensor": (
        DROPLESS, S.fsdp() | S.tensor() | S.expert(), {"fsdp": 2, "tensor": 2, "expert": 2}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", some_quick(UNPADDED, slow=["fsdp x expert x tensor"]))
def test_rows_that_travel_unpadded_give_the_numbers_of_one_device(name, monkeypatch):
    monkeypatch.setattr(_expert, "PLATFORMS", ("cpu",))
    stand_in = mock.Mock(side_effect=exchanged)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", stand_in)
    config, strategy, sizes, options = UNPADDED[name]
    check = sk.verify(
        lambda mesh: layer(config, strategy, mesh, **options),
        [mesh_of(sizes)],
        batches=[vectors(0), vectors(1)],
        steps=2,
    )
    check.check()
    assert stand_in.called


def test_rows_of_all_devices_in_one_place():
    counts = jnp.array([[[1, 0, 2, 0], [0, 3, 1, 1]]])
    plan = RaggedExchange.of(counts)
    x = jnp.arange(1.0, 17.0).reshape(1, 2, 8, 1)
    came = exchange(run_locally, "", 8, x, plan)
    assert came[0, :, :, 0].tolist() == [[1, 9, 10, 11, 0, 0, 0, 0], [2, 3, 12, 13, 0, 0, 0, 0]]
    experts = [[0, 1, 1, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 2, 2, 2]]
    assert received_experts(counts, 8).tolist() == [experts]
    home = exchange(run_locally, "", 8, came, plan.inverse)
    assert home[0, :, :5, 0].tolist() == [[1, 2, 3, 0, 0], [9, 10, 11, 12, 13]]
    gradient = jax.grad(lambda x: (exchange(run_locally, "", 8, x, plan) ** 2).sum())(x)
    assert gradient[0, :, :6, 0].tolist() == [[2, 4, 6, 0, 0, 0], [18, 20, 22, 24, 26, 0]]


def check_reductions(step):
    """Experts are reduced over the other axes alone, the rest over all that split rows."""
    reduced = [row for row in step.report().ledger if row.kind == "all-reduce"]
    own = 4 * 3 * (8 // 4) * SIZES["embed_dim"] * SIZES["expert_mlp"]  # 2 of 8 experts on a device
    router = 4 * SIZES["embed_dim"] * SIZES["experts"]
    over = {axis: [r for r in reduced if r.axes == (axis,)] for axis in ("data", "expert")}
    assert sum(r.payload_bytes * r.trips for r in over["data"]) in range(own + router, own + 400)
    assert max(r.payload_bytes for r in over["expert"]) in range(router, router + 100)


def decoder(config, strategy, sizes):
    model = sk.from_nnx(lambda rngs: Decoder(config, rngs), decoder_loss)
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), np.int32)
    return sk.compile_step(
        model.loss_fn,
        optax.sgd(0.1),
        init=model.init,
        batch={"inputs": ids, "targets": ids, "weights": COUNTED},
        mesh=mesh_of(sizes),
        strategy=strategy,
    )


@pytest.mark.slow
def test_two_exchanges_forward_and_two_backward_at_the_textbook_minimum():
    report = _parity.compile_case("experts").report()
    moved = [row for row in report.ledger if row.kind == "all-to-all"]
    assert sorted(row.phase for row in moved) == ["backward"] * 2 + ["forward"] * 2
    assert {row.trips for row in moved} == {2}
    assert {row.kind for row in report.ledger} == {"all-to-all", "all-reduce"}
    least = next(row for row in report.minima if row.axis == "expert")
    assert least.ratio <= 1.1
    assert report.findings == ()


@pytest.mark.slow
def test_mutations_are_killed():
    def factory(mesh):
        return layer(BOUNDED, S.expert(), mesh)

    kill_matrix(
        factory,
        mesh_of({"expert": 2}),
        batches=[vectors(0), vectors(1)],
        steps=2,
        mutations=EXPERT_MUTATIONS,
    ).check()


def test_experts_that_the_axis_does_not_divide():
    config = DecoderConfig(**{**SIZES, "experts": 6})
    with pytest.raises(sk.errors.ShardingError) as raised:
        decoder(config, S.expert(), {"expert": 4})
    message = str(raised.value)
    assert "3 leaves cannot be laid out on mesh (expert=4)" in message
    assert "params/layers/expert_down f32[2,6,4,8]" in message
    assert "dim 1 (6) is not divisible by expert=4" in message
    assert "Fix: MeshSpec(expert=2)" in message


def test_own_experts_that_the_axis_does_not_divide():
    def loss(params, batch, key):
        choice, share = sk.nn.route(batch["x"] @ params["router"], 1)
        mlp = lambda w, rows, dot: dot(rows, w)  # noqa: E731
        return sk.nn.experts(batch["x"], choice, share, params["w"], mlp, capacity=4).mean()

    with pytest.raises(sk.errors.StepError) as raised:
        sk.compile_step(
            loss,
            optax.sgd(0.1),
            init=lambda key: {"w": jnp.ones((6, 4, 4)), "router": jnp.ones((4, 6))},
            batch={"x": jax.ShapeDtypeStruct((8, 4, 4), np.float32)},
            mesh=mesh_of({"expert": 4}),
            strategy=sk.Strategy(batch=S.expert().batch, overrides=S.expert().overrides),
        )
    assert "6 experts do not divide over expert=4" in str(raised.value)
    assert "Fix: expert=2, or 8 experts" in str(raised.value)


def test_a_model_without_experts():
    dense = DecoderConfig(vocab=32, embed_dim=8, num_layers=2, num_heads=2, mlp_dim=8)
    with pytest.raises(sk.errors.StepError) as raised:
        decoder(dense, S.expert(), {"expert": 2})
    assert "needs `sk.nn.experts`, but the model never calls it" in str(raised.value)
    assert "Fix: sk.nn.experts(...) in the model" in str(raised.value)
