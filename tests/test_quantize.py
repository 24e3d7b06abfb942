"""Frozen weights in 8 and 4 bits, against the same by hand in plain JAX on one device."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit._core.tracing import equations
from shardkit.errors import StateError

from ._quick import some_quick
from .test_lora import (
    ALPHA,
    BATCH,
    MESHES,
    OPTIONS,
    RANKS,
    WIDTH,
    by_hand,
    check_equal,
    init,
    loss,
    loss_by_hand,
    make_spec,
    randomized,
    start,
    table_of_steps,
)

KINDS = {"blocks/up": ("nf4", 8), "blocks/*": ("int8", 8)}
TUNED = sk.lora(init, loss, RANKS, alpha=ALPHA, batch=BATCH)
SMALL = sk.quantize(TUNED.init, TUNED.loss_fn, KINDS)

# The table of bitsandbytes, create_normal_map; the second half is not the first one mirrored.
NF4 = """-1 -.6961928009986877 -.5250730514526367 -.39491748809814453 -.28444138169288635
    -.18477343022823334 -.09105003625154495 0 .07958029955625534 .16093020141124725
    .24611230194568634 .33791524171829224 .44070982933044434 .5626170039176941
    .7229568362236023 1"""
LEVELS = {"nf4": np.array(NF4.split(), "f8"), "int8": np.arange(-127, 128) / 127}


def quantized_by_hand(weight, kind, block):
    """The nearest level of each element, in blocks, as floats."""
    blocks = np.asarray(weight, "f8").reshape(-1, block)
    scales = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs(blocks[..., None] / scales[..., None] - LEVELS[kind]).argmin(-1)
    return (LEVELS[kind][nearest] * scales).reshape(weight.shape).astype("f")


def params_by_hand(params):
    blocks = {
        name: quantized_by_hand(w, *(("nf4", 8) if name == "up" else ("int8", 8)))
        for name, w in params["blocks"].items()
    }
    return {**params, "blocks": blocks}


def plain_params():
    """Weights none of which is as near to one level as to another, but for rounding."""
    return {**randomized(TUNED), **jax.device_get(init(jax.random.key(1)))}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_stand_for_the_nearest_levels(kind, dtype):
    weight = jax.random.normal(jax.random.key(0), (3, 4, 128), dtype).at[0, 0].set(0)
    model = sk.quantize(lambda key: {"w": weight}, lambda p, b, k: jnp.mean(p["w"]), {"w": kind})
    params = model.quantize({"w": weight})
    again = model.dequantize(params)["w"]
    assert again.dtype == weight.dtype
    assert not again[0, 0].any()
    expected = quantized_by_hand(np.where(weight == 0, 1e-30, weight), kind, 64)
    # Two levels can be equally near.
    far, least = (np.abs(np.asarray(x, "f8") - np.asarray(weight, "f8")) for x in (again, expected))
    tolerance = {"float32": 1e-6, "bfloat16": 2**-8}[dtype] * float(jnp.abs(weight).max())
    np.testing.assert_allclose(far, least, rtol=0, atol=tolerance)
    elements = {"int8": 1, "nf4": 0.5}[kind] + 4 / 64
    assert sum(x.nbytes for x in jax.tree.leaves(params)) == elements * weight.size


@pytest.mark.parametrize(
    ("mesh", "options"),
    table_of_steps(("fsdp", "shard_map")),
)
def test_a_step_of_adapters_equals_one_written_by_hand(mesh, options):
    spec = make_spec(MESHES[mesh], SMALL, **OPTIONS[options])
    step = spec.compile(sk.MeshSpec(**MESHES[mesh]).build())
    plain = plain_params()
    state = check_equal(
        step, SMALL.quantize(plain), by_hand(loss_by_hand, params_by_hand(plain)), 2e-5, 2e-6
    )
    assert state.params["blocks"]["q"].dtype == jnp.int8
    assert state.params["blocks"]["up"].dtype == jnp.uint8
    for path in ("q", "up"):
        codes, scales = state.params["blocks"][path], state.params["scales"]["blocks"][path]
        assert codes.sharding.spec == scales.sharding.spec
    trained = {x.shape for x in jax.tree.leaves(state.params["lora"])}
    assert trained == {x.shape for x in jax.tree.leaves(state.opt_state)}


def layers_after_a_scale(params, batch, key):
    """A scan without `jax.checkpoint`, whose products are differentiated by what they multiply."""
    x = batch["x"] * params["scale"]
    x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["w"])
    return jnp.mean(x**2)


@pytest.mark.parametrize("cast", [lambda w: w, lambda w: w.astype("bfloat16")], ids=["f32", "cast"])
def test_no_stack_of_layers_is_held_in_floats(cast):
    model = sk.quantize(
        lambda key: {"w": jax.random.normal(key, (5, WIDTH, WIDTH)), "scale": jnp.ones(WIDTH)},
        lambda params, *rest: layers_after_a_scale({**params, "w": cast(params["w"])}, *rest),
        {"w": ("int8", 32)},
    )
    text = make_spec({"data": 8}, model).compile(sk.MeshSpec(data=8).build()).hlo()
    assert f"s8[5,{WIDTH},{WIDTH}]" in text
    # Neither before the loop nor for the backward pass.
    assert not re.findall(rf"f\w+\[5,{WIDTH},{WIDTH}\]", text)


def named_layers(key):
    w = jax.random.normal(key, (5, 64, 64)) / 8
    return {"w": sk.WithAxes(w, ("layers", "embed", "mlp")), "scale": jnp.ones(64)}


def loss_of_marked_layers(params, batch, key):
    @sk.nn.remat
    def layer(x, w):
        return x + jnp.tanh(x @ sk.nn.use_param(w, "embed", "mlp")), None

    x, _ = jax.lax.scan(layer, batch["x"] * params["scale"], params["w"])
    return jnp.mean(x**2)


# Bits of a weight, and how many times fewer bytes than of f32.
FEWER = {"int8": 4 / (1 + 4 / 64), "nf4": 4 / (0.5 + 4 / 64)}


@pytest.mark.parametrize(
    ("kind", "mode"),
    some_quick(
        itertools.product(FEWER, ("auto", "shard_map")), ("int8", "shard_map"), ("nf4", "auto")
    ),
)
def test_codes_are_what_is_gathered(kind, mode):
    """A weight that is dequantized where it lies is gathered in floats: 4 or 7 times the bytes."""
    model = sk.quantize(named_layers, loss_of_marked_layers, {"w": kind})
    strategy = dataclasses.replace(sk.strategies.fsdp(min_size=0), params=sk.first_match(
        sk.AxisRules({"layers": None, "embed": "fsdp", "mlp": None}), sk.REPLICATED))  # fmt: skip
    batch = {"x": jax.random.normal(jax.random.key(1), (16, 64))}
    options = {"batch": batch, "strategy": strategy, "optimizer": optax.sgd(0.1), "mode": mode}
    mesh = sk.MeshSpec(fsdp=8).build()
    step = sk.StepSpec(loss_fn=model.loss_fn, init=model.init, **options).compile(mesh)
    floats = sk.StepSpec(
        loss_fn=loss_of_marked_layers, init=named_layers, trainable=["scale"], **options
    ).compile(mesh)

    report = step.report()
    sent, before = (r.ledger.total("fsdp", "all-gather") for r in (report, floats.report()))
    assert before / sent == pytest.approx(FEWER[kind], rel=0.02)
    # Forward and backward, of codes and scales.
    size = 5 * 64 * 64 * 4 / FEWER[kind]
    assert sent == pytest.approx(2 * size * 7 / 8, rel=0.02)
    (minimum,) = report.minima
    assert sent <= minimum.bytes <= 1.05 * sent
    assert {f.kind for f in report.findings} <= {"replicated"}
    # Neither between forward and backward, where the policy of the layers saves nearly everything.
    assert not re.findall(r"f32\[5,(64|8),64\]", step.hlo())

    state = step.init(jax.random.key(0))
    plain = model.dequantize(jax.device_get(state.params))
    _, gradients = step.gradients(state, batch)
    expected = jax.grad(lambda scale: loss_of_marked_layers({**plain, "scale": scale}, batch, None))
    np.testing.assert_allclose(gradients["scale"], expected(plain["scale"]), 1e-5, 1e-6)


@pytest.mark.slow
def test_dequantized_weights_have_the_dtype_of_the_precision():
    mesh, plain = sk.MeshSpec(data=8).build(), plain_params()
    losses = []
    for precision in ("float32", "bfloat16"):
        step = make_spec({"data": 8}, SMALL, precision=precision).compile(mesh)
        state = start(step, SMALL.quantize(plain))
        losses.append(float(step.evaluate(state, BATCH)["loss"]))
    products = [e for e in equations(step.program.jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    assert {v.aval.dtype.name for e in products for v in e.invars} == {"bfloat16"}
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.slow
def test_weights_of_ones_own_are_quantized_on_their_devices():
    mesh = sk.MeshSpec(data=2, fsdp=4).build()
    plain = jax.device_put(plain_params())
    place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, P(None, None, "fsdp")))  # noqa: E731
    plain["blocks"] = {**plain["blocks"], "down": place(plain["blocks"]["down"])}
    params = SMALL.quantize(plain)
    assert params["blocks"]["down"].sharding.spec == P(None, None, "fsdp")
    step = make_spec(MESHES["fsdp"], SMALL).compile(mesh)
    state = step.init(jax.random.key(0), params=params)
    metrics = step.evaluate(state, BATCH)
    expected = loss_by_hand(params_by_hand(plain_params()), BATCH)
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
    merged = TUNED.merge(SMALL.dequantize(state.params))
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(
        jnp.shape, jax.eval_shape(init, jax.random.key(0))
    )
    with pytest.raises(StateError, match="blocks/down"):
        step.init(jax.random.key(0), params=plain)


def test_a_model_without_adapters_trains_what_is_not_quantized():
    model = sk.quantize(init, loss, {"blocks/*": ("int8", 8)})
    step = make_spec({"data": 8}, model).compile(sk.MeshSpec(data=8).build())
    state = step.init(jax.random.key(0))
    before = jax.device_get(state.params)
    state, _ = step(state, BATCH)
    jax.tree.map(np.testing.assert_array_equal, state.params["blocks"], before["blocks"])
    assert np.abs(state.params["head"] - before["head"]).max() > 0
    assert sk.verify(make_spec({"data": 8}, model), meshes=[sk.MeshSpec(data=8).build()]).ok


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ({"blocks/query": "nf4"}, "matches none of the .* parameters"),
        ({"**": "nf4"}, r"head f32\[32,5\].*5, which 64 does not divide"),
        ({"blocks/*": "int4"}, 'is not "int8", "nf4"'),
        ({"blocks/*": ("nf4", 3)}, "even block"),
        ({"blocks/*": ("nf4", True)}, "even block"),
        ({"blocks/q": ("nf4", 64)}, r'\("nf4", 8\)'),
        ({"blocks/q": None}, "chooses no parameter"),
        ([("blocks/q", "nf4")], "kinds +is of type list"),
    ],
)
def test_wrong_declarations_name_every_weight(kinds, said):
    with pytest.raises(sk.errors.StepError, match=said):
        sk.quantize(init, loss, kinds)


def test_a_shard_that_cuts_a_block_is_refused_before_tracing():
    model = sk.quantize(init, loss, {"blocks/up": "nf4"})
    spec = make_spec({"data": 2, "fsdp": 4}, model)
    with pytest.raises(sk.errors.ShardingError, match=r"scales/blocks/up f32\[2,32,1\]") as caught:
        spec.compile(sk.MeshSpec(data=2, fsdp=4).build())
    fix = 'sk.quantize(..., {"blocks/up": ("nf4", 16)}), or a rule that leaves the last dim of '
    assert f"Fix: {fix}blocks/up whole" in str(caught.value)
    placed = jax.device_put(
        init(jax.random.key(0))["blocks"]["up"],
        jax.NamedSharding(sk.MeshSpec(fsdp=8).build(), P(None, None, "fsdp")),
    )
    with pytest.raises(sk.errors.StepError, match="shards of 8 along its last dim"):
        model.quantize({"blocks": {"up": placed}})


def test_a_checkpoint_brings_codes_back(tmp_path):
    step = make_spec({"data": 8}, SMALL, optimizer=optax.adam(1e-3)).compile(
        sk.MeshSpec(data=8).build()
    )
    config = sk.TrainConfig(steps=2, check="off")
    first = sk.Trainer(step, lambda i: BATCH, tmp_path, config).run()
    codes = np.asarray(first.params["blocks"]["up"])
    again = sk.Trainer(step, lambda i: BATCH, tmp_path, dataclasses.replace(config, steps=3)).run()
    np.testing.assert_array_equal(again.params["blocks"]["up"], codes)
