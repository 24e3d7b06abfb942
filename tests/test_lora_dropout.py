"""Adapters whose inputs are dropped drop the same elements on every mesh.

The loss, its masks and their keys are written by hand, on one device and without `sk`.
"""

import dataclasses
import itertools
import zlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk
from shardkit.lm import DecoderConfig, decoder_model
from shardkit.parallel.expert import _expert

from ._quick import some_quick
from .test_expert_parallel import exchanged
from .test_lora_parts import (
    BATCH,
    CAPACITY,
    CHOICES,
    EXPERTS,
    LAYERS,
    PIPE,
    SCALE,
    SGD,
    WIDTH,
    S,
    make_model,
    pipeline,
    start_at,
)

RATE = 0.3
LORA, FUNCTION = 0x10AB, 0x10AC  # folded into the step's key, and into those of functions


def next_key(key, name):
    """The key of the first product, or part, of a name."""
    for number in (zlib.crc32(name.encode()), 0):
        key = jax.random.fold_in(key, number)
    return key


def drop(x, key):
    return jnp.where(jax.random.bernoulli(key, 1 - RATE, x.shape), x / (1 - RATE), 0)


def drop_rows(x, keys, name):
    """x [*rows, width] with a key for each row."""
    run = lambda x, key: drop(x, next_key(jax.random.fold_in(key, FUNCTION), name))  # noqa: E731
    for _ in keys.shape:
        run = jax.vmap(run)
    return run(x, keys)


def loss_by_hand(params, batch, key, capacity):
    """Every expert computes every choice of every token, dropped as its own key says."""
    lora, x = params["lora"], batch["x"]

    def adapt(x, dropped, w, ab):
        return x @ w + SCALE * (dropped @ ab["a"]) @ ab["b"]

    stack = key  # which the model gives to its layer stack
    for index, key in enumerate(jax.random.split(stack, LAYERS)):
        key = jax.random.fold_in(key, FUNCTION)
        w, ab = jax.tree.map(lambda v: v[index], (params["layers"], lora["layers"]))  # noqa: B023
        h = x + jnp.arange(WIDTH) / WIDTH
        x = x + jnp.tanh(adapt(h, drop(h, next_key(key, "layers/mix")), w["mix"], ab["mix"]))
        p = jax.nn.softmax(jax.lax.stop_gradient(x) @ w["router"])
        best, chosen = jax.lax.top_k(p, CHOICES)
        one_hot = jax.nn.one_hot(chosen, EXPERTS)  # [row, token, choice, expert]
        share = best / best.sum(-1, keepdims=True)
        if capacity is not None:
            flat = one_hot.reshape(len(x), -1, EXPERTS)
            one_hot = ((jnp.cumsum(flat, 1) - flat < capacity) * flat).reshape(one_hot.shape)
        words = jax.random.bits(next_key(key, "experts"), (*chosen.shape, 2), jnp.uint32)
        keys = jax.random.wrap_key_data(words)
        rows = jnp.broadcast_to(x[:, :, None], (*chosen.shape, WIDTH))
        y = 0
        for e in range(EXPERTS):
            up, down = ((w[n][e], jax.tree.map(lambda v: v[e], ab[n])) for n in ("up", "down"))  # noqa: B023
            h = jnp.tanh(adapt(rows, drop_rows(rows, keys, "layers/up"), *up))
            out = adapt(h, drop_rows(h, keys, "layers/down"), *down)
            y += jnp.einsum("btk,btko->bto", one_hot[..., e] * share, out)
        x = x + y
    key = next_key(jax.random.fold_in(jax.random.fold_in(stack, LAYERS + 1), FUNCTION), "head")
    return jnp.mean((adapt(x, drop(x, key), params["head"], lora["head"]) - batch["y"]) ** 2)


def by_hand(params, key, capacity, micro_batches, steps=2):
    """Losses, and the adapters after some steps.

    Micro-batch i of n has rows i, i+n, i+2n, …, and draws from its own key.
    """

    @jax.jit
    def run(lora, key):
        total = 0.0
        for i in range(micro_batches):
            rows = jax.tree.map(lambda x: x[i::micro_batches], BATCH)  # noqa: B023
            own = jax.random.fold_in(key, i) if micro_batches > 1 else key
            total += loss_by_hand({**params, "lora": lora}, rows, own, capacity)
        return total / micro_batches

    lora, state, losses = params["lora"], SGD.init(params["lora"]), []
    for step in range(steps):
        value, gradient = jax.value_and_grad(run)(lora, jax.random.fold_in(key, step))
        updates, state = SGD.update(gradient, state, lora)
        lora = optax.apply_updates(lora, updates)
        losses.append(float(value))
    return losses, lora


def experts():
    return S.data() | S.expert()


SPLIT = {"data": 2, "expert": 2}
ALL = {"pipe": 2, "data": 2, "expert": 2}
EVERY = sk.Accumulate(2, reduce="every")
# name: (strategy, mesh, options of the step, of the model)
CELLS = {
    "one device": (S.data, {"data": 1}, {}, {}),
    "pipeline": (lambda: pipeline() | S.data(), PIPE, {}, {}),
    "zero bubble": (lambda: pipeline(schedule="zero_bubble") | S.data(), PIPE, {}, {}),
    "interleaved": (
        lambda: pipeline(schedule="interleaved", virtual_stages=2, layers_per_stage=(1, 0, 0, 1)),
        {"pipe": 2},
        {"remat": "full"},
        {},
    ),
    "pipeline in turns": (lambda: pipeline() | S.data(), PIPE, {"accumulate": EVERY}, {}),
    "codes, pipeline of experts": (lambda: pipeline() | experts(), ALL, {}, {"codes": True}),
    "experts": (experts, SPLIT, {}, {}),
    "experts, accumulated": (experts, SPLIT, {"accumulate": 2}, {}),
    "capacity": (experts, SPLIT, {}, {"capacity": CAPACITY}),
    "capacity, accumulated": (experts, SPLIT, {"accumulate": 2}, {"capacity": CAPACITY}),
    "shard_map": (lambda: S.fsdp(min_size=0), {"fsdp": 2}, {"mode": "shard_map"}, {}),
    "shard_map, accumulated": (
        lambda: S.fsdp(min_size=0),
        {"fsdp": 2},
        {"mode": "shard_map", "accumulate": 2},
        {"capacity": CAPACITY},
    ),
}


def test_stages_without_a_key_drop_what_one_device_drops():
    """A layer closes over an array: inside a `shard_map` JAX adds an operation before its product.

    The model gives its layer stack no key, so that of the adapters is given in its place.
    """
    axes = {"layers": ("layers", None, None), "head": (None, None)}
    shapes = {"layers": (LAYERS, WIDTH, WIDTH), "head": (WIDTH, 5)}
    draw = np.random.default_rng(2).normal
    values = {name: draw(size=shape).astype("f") / 4 for name, shape in shapes.items()}

    def loss(params, batch, key):
        ramp = jnp.arange(WIDTH) / WIDTH
        first = lambda outer, batch, key: batch["x"]  # noqa: E731
        layer = lambda w, x, batch, key: x + jnp.tanh((x + ramp) @ w)  # noqa: E731
        last = lambda outer, x, batch: jnp.mean((x @ outer["head"] - batch["y"]) ** 2)  # noqa: E731
        outer = {"head": params["head"]}
        return sk.nn.layer_stack(first, layer, last, outer, params["layers"], batch)

    def init(key):
        return {name: sk.WithAxes(jnp.asarray(x), axes[name]) for name, x in values.items()}

    lora = sk.lora(init, loss, {"layers": (2, "sio"), "head": 2}, dropout=RATE)
    mesh = sk.MeshSpec(**PIPE).build(devices=jax.devices()[:4])
    options = {"batch": BATCH, "optimizer": SGD, "strategy": pipeline() | S.data()}
    step = sk.StepSpec(loss_fn=lora.loss_fn, init=lora.init, **options).compile(mesh)
    state = step.init(jax.random.key(0))
    factors = jax.tree.map(lambda x: draw(size=x.shape).astype("f"), state.params["lora"])
    placed = jax.tree.map(jax.device_put, factors, step.shardings.params["lora"])
    state = dataclasses.replace(state, params={**state.params, "lora": placed})
    key = jax.random.fold_in(jax.random.wrap_key_data(jax.random.key_data(state.key)), 0)
    _, metrics = step(state, BATCH)

    stack = next_key(jax.random.fold_in(key, LORA), "layer_stack")
    x = jnp.asarray(BATCH["x"])
    for index, own in enumerate(jax.random.split(stack, LAYERS)):
        h, ab = x + jnp.arange(WIDTH) / WIDTH, factors["layers"]
        dropped = drop(h, next_key(jax.random.fold_in(own, FUNCTION), "layers"))
        x += jnp.tanh(h @ values["layers"][index] + dropped @ ab["a"][index] @ ab["b"][index])
    own = next_key(jax.random.fold_in(jax.random.fold_in(stack, LAYERS + 1), FUNCTION), "head")
    y = x @ values["head"] + drop(x, own) @ factors["head"]["a"] @ factors["head"]["b"]
    want = jnp.mean((y - BATCH["y"]) ** 2)
    assert float(metrics["loss"]) == pytest.approx(float(want), rel=1e-5)


# Each kind with what it is most often used with; the others are parts of these.
TOGETHER = (
    *("pipeline in turns", "interleaved", "experts, accumulated", "shard_map, accumulated"),
    *("capacity, accumulated", "codes, pipeline of experts"),
)


@pytest.mark.parametrize("cell", some_quick(CELLS, slow=TOGETHER))
def test_steps_equal_those_written_by_hand(cell):
    check_steps(*CELLS[cell])


@pytest.mark.slow
def test_keys_of_rows_that_travel_unpadded_travel_with_them(monkeypatch):
    monkeypatch.setattr(_expert, "PLATFORMS", ("cpu",))
    stand_in = mock.Mock(side_effect=exchanged)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", stand_in)
    check_steps(experts, SPLIT, {"accumulate": 2}, {})
    assert stand_in.called


def check_steps(strategy, sizes, options, of_model):
    model, params, floats = make_model(dropout=RATE, **of_model)
    step, state = start_at(params, model, strategy, sizes, **options)
    key = jax.random.wrap_key_data(jax.random.key_data(state.key))
    accumulate = options.get("accumulate", 1)
    micro_batches = accumulate if isinstance(accumulate, int) else accumulate.micro_batches
    losses, after = by_hand(floats, key, of_model.get("capacity"), micro_batches)
    seen = []
    for _ in losses:
        state, metrics = step(state, BATCH)
        seen.append(float(metrics["loss"]))
    assert seen == pytest.approx(losses, rel=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(after))
    for x, y in zip(*map(jax.tree.leaves, (state.params["lora"], after)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * largest)


def test_products_with_other_rows_than_those_of_an_expert_are_refused():
    """There no row has a key that moves with it."""

    def loss(params, batch, key):
        def mlp(w, rows, dot):
            return dot(rows, w) + rows.sum() * jnp.ones((1, 4)) @ w[0]

        choice = jnp.zeros((2, 3, 1), jnp.int32)
        return jnp.mean(sk.nn.experts(batch, choice, jnp.ones((2, 3, 1)), params["w"], mlp))

    weights = {"w": jnp.ones((1, 4, 4))}
    lora = sk.lora(lambda key: weights, loss, {"w": (2, "sio")}, dropout=RATE)
    with pytest.raises(sk.errors.StepError, match=r"w f32\[1,4,4\] .*with other rows than"):
        lora.loss_fn(lora.init(jax.random.key(0)), jnp.ones((2, 3, 4)), jax.random.key(1))


# The dims of a weight whose inputs are heads: in its products as they are, joined, and divided.
HEADS = {
    "kept": ((4, 8, 16), ("heads", "head_dim", "embed")),
    "joined": ((4, 8, 16), ("heads", "head_dim", "embed")),
    "divided": ((32, 16), ("heads", "embed")),
}


def heads_gradients(form, named, strategy, **options):
    """Gradients of the adapters of a weight [heads, head_dim, embed], with or without names."""
    shape, axes = HEADS[form]
    shapes = {"up": (16, 4, 8), "out": shape}
    names = {"up": ("embed", "heads", "head_dim"), "out": axes}

    def init(key):
        arrays = {n: jnp.sin(jnp.arange(512.0)).reshape(size) for n, size in shapes.items()}
        return {n: sk.WithAxes(x, names[n]) for n, x in arrays.items()} if named else arrays

    def loss(params, batch, key):
        x = sk.nn.constrain(batch, "batch", "embed", into=("heads",))
        h = jnp.einsum("be,ehk->bhk", x, sk.nn.use_param(params["up"], *names["up"]))
        w = sk.nn.use_param(params["out"], *axes)
        if form == "joined":
            y = h.reshape(h.shape[0], -1) @ w.reshape(-1, 16)
        else:
            y = jnp.einsum("bhk,hke->be", h, w.reshape(-1, 8, 16))
        return jnp.mean(sk.nn.constrain(y, "batch", "embed", partial=("heads",)) ** 2)

    batch = np.random.default_rng(0).normal(size=(8, 16)).astype("f")
    letters = "io" if form == "divided" else "iio"
    tuned = sk.lora(init, loss, {"out": (2, letters)}, dropout=RATE)
    mesh_axes = [kind.axis for kind in strategy.kinds]
    step = sk.compile_step(
        tuned.loss_fn,
        SGD,
        init=tuned.init,
        batch=batch,
        mesh=sk.MeshSpec(**dict.fromkeys(mesh_axes, 2)).build(
            devices=jax.devices()[: 2 ** len(mesh_axes)]
        ),
        strategy=strategy,
        **options,
    )
    return jax.device_get(step.gradients(step.init(jax.random.key(0)), batch)[1]["lora"]["out"])


@pytest.mark.parametrize(
    ("form", "named"),
    some_quick(itertools.product(HEADS, (True, False)), ("divided", True), ("joined", False)),
)
def test_inputs_that_a_reshape_takes_from_their_places(form, named):
    """Of a weight that is split in its products they are refused: which ones are on a device?"""
    strategy = S.data() | S.tensor() if named else S.fsdp(min_size=1)
    if named and form != "kept":
        with pytest.raises(sk.errors.StepError, match=r"out f32\[.*is split over devices") as error:
            heads_gradients(form, named, strategy, mode="shard_map")
        assert 'Fix: mode="auto", or sk.lora(..., dropout=0)' in str(error.value)
        return
    want = heads_gradients(form, named, S.data())
    found = heads_gradients(form, named, strategy, mode="shard_map")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, want)


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True])
def test_devices_with_parts_of_a_weight_drop_what_one_device_drops(sequence):
    """Of products split by outputs all have the whole input, of those by inputs a part of it."""
    sizes = {"vocab": 16, "embed_dim": 8, "num_layers": 1, "num_heads": 4, "mlp_dim": 16}
    model = decoder_model(DecoderConfig(**sizes))
    tokens = np.random.default_rng(0).integers(0, 16, (4, 8)).astype("i4")
    batch = {"inputs": tokens, "targets": tokens[:, ::-1], "weights": np.ones((4, 8), "f")}
    ranks = {f"layers/{name}": 2 for name in ("query", "out", "up", "down")}
    tuned = sk.lora(model.init, model.loss_fn, ranks, batch=batch, dropout=RATE)

    def run(strategy, sizes, **options):
        mesh = sk.MeshSpec(**sizes).build(devices=jax.devices()[: np.prod([*sizes.values()])])
        spec = sk.StepSpec(
            loss_fn=tuned.loss_fn,
            init=tuned.init,
            optimizer=SGD,
            batch=batch,
            strategy=strategy,
            **options,
        )
        step, draw = spec.compile(mesh), np.random.default_rng(1).normal
        state = step.init(jax.random.key(0))
        lora = jax.tree.map(
            lambda x: jax.device_put(draw(size=x.shape).astype("f") / 4, x.sharding),
            state.params["lora"],
        )
        state = dataclasses.replace(state, params={**state.params, "lora": lora})
        metrics, gradients = step.gradients(state, batch)
        return float(metrics["loss"]), gradients["lora"]

    loss, want = run(S.data(), {"data": 1})
    strategy = S.data() | S.tensor(sequence=sequence)
    found, gradients = run(strategy, {"data": 2, "tensor": 2}, mode="shard_map")
    assert found == pytest.approx(loss, rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * abs(b).max()),
        gradients,
        jax.device_get(want),
    )
