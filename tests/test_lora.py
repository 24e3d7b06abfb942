"""Low-rank adapters by `sk.lora`, against the same written by hand in plain JAX on one device."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.lm import Decoder, DecoderConfig, decoder_loss
from shardkit.report import count_flops
from shardkit.step import resolve_layout

from ._quick import some_quick

RNG = np.random.default_rng(0)
ROWS, WIDTH, HEADS, HIDDEN, LAYERS, RANK, ALPHA = 16, 32, 4, 64, 2, 3, 6.0
X = RNG.normal(size=(ROWS, WIDTH)).astype("f")
Y = RNG.normal(size=(ROWS, 5)).astype("f")
BATCH = {"x": X, "y": Y}
RANKS = {"blocks/*": RANK, "head": RANK}
SGD = optax.sgd(0.01, momentum=0.9)


def init(key):
    shapes = {
        "q": (LAYERS, WIDTH, HEADS, WIDTH // HEADS),
        "o": (LAYERS, HEADS, WIDTH // HEADS, WIDTH),
        "up": (LAYERS, WIDTH, HIDDEN),
        "down": (LAYERS, HIDDEN, WIDTH),
    }
    *keys, last = jax.random.split(key, len(shapes) + 1)
    blocks = {
        name: jax.random.normal(key, shape) / WIDTH**0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return {"blocks": blocks, "head": jax.random.normal(last, (WIDTH, 5)) / WIDTH**0.5}


def loss(params, batch, key=None):
    """A scan over layers under `jax.checkpoint`, with products of heads, a reshape and a cast."""

    @jax.checkpoint
    def layer(x, w):
        h = jnp.tanh(jnp.einsum("te,ehd->thd", x, w["q"]))
        x = x + jnp.einsum("thd,hde->te", h, w["o"])
        return x + jax.nn.relu(x @ w["up"].reshape(WIDTH, HIDDEN)) @ w["down"], None

    x, _ = jax.lax.scan(layer, batch["x"].astype(params["head"].dtype), params["blocks"])
    return jnp.mean((x @ params["head"] - batch["y"]).astype(jnp.float32) ** 2)


def loss_by_hand(params, batch):
    """The same loss as PEFT would write it, one layer after another."""
    scale, adapters = ALPHA / RANK, params["lora"]
    x = batch["x"].astype(params["head"].dtype)

    def product(x, w, ab):
        flat = w.reshape(x.shape[-1], -1)
        a, b = ab["a"].reshape(x.shape[-1], RANK), ab["b"].reshape(RANK, -1)
        return x @ flat + (x @ a) * jnp.asarray(scale, x.dtype) @ b

    for index in range(LAYERS):
        w, ab = jax.tree.map(lambda x: x[index], (params["blocks"], adapters["blocks"]))  # noqa: B023
        x = x + product(jnp.tanh(product(x, w["q"], ab["q"])), w["o"], ab["o"])
        x = x + product(jax.nn.relu(product(x, w["up"], ab["up"])), w["down"], ab["down"])
    out = product(x, params["head"], adapters["head"])
    return jnp.mean((out - batch["y"]).astype(jnp.float32) ** 2)


DIMS = {"blocks/q": "sioo", "blocks/o": "siio", "blocks/up": "sio", "blocks/down": "sio"}
ADAPTED = sk.lora(init, loss, RANKS, alpha=ALPHA, batch=BATCH)


def randomized(model=ADAPTED, key=7):
    """Parameters whose B is not zero, so that A has a gradient."""
    params = jax.tree.map(
        lambda x: x.value if isinstance(x, sk.WithAxes) else x,
        model.init(jax.random.key(0)),
        is_leaf=lambda x: isinstance(x, sk.WithAxes),
    )
    leaves, structure = jax.tree.flatten(params["lora"])
    keys = jax.random.split(jax.random.key(key), len(leaves))
    drawn = [jax.random.normal(k, x.shape, x.dtype) / 16 for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.map(np.asarray, {**params, "lora": structure.unflatten(drawn)})


def by_hand(loss, params, dtype=None, steps=3):
    """Losses, the first gradient and the adapters after some steps, on one device."""
    lora, state, losses, first = params["lora"], SGD.init(params["lora"]), [], None

    def cast(tree):
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)

    run = jax.jit(jax.value_and_grad(lambda p: loss(cast({**params, "lora": p}), BATCH)))
    for _ in range(steps):
        value, gradient = run(lora)
        first = gradient if first is None else first
        updates, state = SGD.update(gradient, state, lora)
        lora = optax.apply_updates(lora, updates)
        losses.append(float(value))
    return losses, first, lora


RULES = {
    "fsdp": {
        "blocks/q": P(None, "fsdp"),
        "blocks/o": P(None, None, None, "fsdp"),
        "blocks/*": P(None, None, "fsdp"),
        "head": P("fsdp"),
    },
    "tensor": {
        "blocks/q": P(None, None, "tensor"),
        "blocks/o": P(None, "tensor"),
        "blocks/up": P(None, None, "tensor"),
        "blocks/down": P(None, "tensor"),
    },
}
MESHES = {"data": {"data": 8}, "fsdp": {"data": 2, "fsdp": 4}, "tensor": {"data": 2, "tensor": 4}}


def make_spec(sizes, model=ADAPTED, tables=None, **options):
    tables = [RULES[axis] for axis in tables or sizes if axis in RULES]
    rules = sk.PathRules({**(tables[0] if tables else {}), "**": sk.REPLICATED})
    rows = tuple(axis for axis in sizes if axis in ("data", "fsdp"))
    options = {"strategy": sk.Strategy(params=rules, batch=P(rows)), "optimizer": SGD, **options}
    return sk.StepSpec(loss_fn=model.loss_fn, init=model.init, batch=BATCH, **options)


def make_step(sizes, **options):
    return make_spec(sizes, **options).compile(sk.MeshSpec(**sizes).build())


def start(step, params):
    state = step.init(jax.random.key(0))
    placed = jax.tree.map(jax.device_put, params, step.shardings.params)
    return dataclasses.replace(state, params=placed)


def check_equal(step, params, expected, rtol=1e-5, atol=1e-6):
    losses, first, after = expected
    state = start(step, params)
    _, gradients = step.gradients(state, BATCH)
    found = []
    for _ in losses:
        state, metrics = step(state, BATCH)
        found.append(float(metrics["loss"]))
    assert found == pytest.approx(losses, rel=rtol)
    for mine, other in ((gradients["lora"], first), (state.params["lora"], after)):
        scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(other))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=10 * atol * scale),  # noqa: B023
            mine,
            other,
        )
    return state


OPTIONS = {
    "plain": {},
    "accumulate": {"accumulate": 2},
    "remat": {"remat": "full"},
    "shard_map": {"mode": "shard_map"},
    "shard_map, accumulate": {"mode": "shard_map", "accumulate": 2},
}


def table_of_steps(*fast):
    """Every mesh with every option; some are quick, and of the others every second one is slow."""
    cells = [
        (mesh, options)
        for mesh in MESHES
        for options in OPTIONS
        if mesh != "tensor" or not options.startswith("shard_map")
    ]
    return some_quick(cells, *fast, slow=cells[::2])


@pytest.mark.parametrize(("mesh", "options"), table_of_steps(("tensor", "plain")))
def test_steps_equal_those_written_by_hand(mesh, options):
    step, params = make_step(MESHES[mesh], **OPTIONS[options]), randomized()
    state = check_equal(step, params, by_hand(loss_by_hand, params))
    for name in ("blocks", "head"):
        jax.tree.map(np.testing.assert_array_equal, state.params[name], params[name])
    trained = {x.shape for x in jax.tree.leaves(params["lora"])}
    assert {x.shape for x in jax.tree.leaves(state.opt_state)} == trained
    assert reduced_shapes(step)
    assert not reduced_shapes(step) & FROZEN
    if mesh == "fsdp":
        least = {minimum.axis: minimum.bytes for minimum in step.report().minima}
        assert least["fsdp"] == pytest.approx(fsdp_minimum(step), rel=1e-6)


def fsdp_minimum(step, n=4):
    """What is split is gathered twice, but gradients are those of the adapters alone."""

    def size(tree, split):
        shardings = step.shardings.params
        of = shardings["lora"] if tree is params["lora"] else shardings
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(of), strict=True)
        return sum(4 * x.size for x, s in pairs if ("fsdp" in str(s.spec)) == split)

    params = randomized()
    gathered, scattered = size(params, True), size(params["lora"], True)
    return (n - 1) / n * (2 * gathered + scattered + 2 * size(params["lora"], False))


# Shapes of a weight's gradient: of one layer or all, whole or a device's part under `fsdp`.
_OF_LAYER = [(32, 4, 8), (8, 4, 8), (4, 8, 32), (4, 8, 8), (32, 64), (32, 16), (64, 32), (64, 8)]
FROZEN = {shape for one in _OF_LAYER for shape in (one, (1, *one), (LAYERS, *one))}


def reduced_shapes(step):
    """Shapes of the operands that a step reduces over devices after its forward pass."""
    return {
        tuple(int(n) for n in operand.split("[")[1][:-1].split(",") if n)
        for row in step.report().ledger
        if row.kind in ("all-reduce", "reduce-scatter") and row.phase != "forward"
        for operand in row.operands
    }


def test_a_factor_is_split_like_the_dims_of_its_weight():
    """The rules are those of the model: none names an adapter."""
    spec = make_spec({"data": 2, "fsdp": 2, "tensor": 2}, tables=("tensor",))
    layout = resolve_layout(spec, sk.MeshSpec(data=2, fsdp=2, tensor=2).build())
    found = {
        name: (pair["a"].spec, pair["b"].spec)
        for name, pair in layout.shardings.params["lora"]["blocks"].items()
    }
    assert found == {
        "q": (P(), P(None, None, "tensor")),
        "o": (P(None, "tensor"), P()),
        "up": (P(), P(None, None, "tensor")),
        "down": (P(None, "tensor"), P()),
    }
    assert layout.shardings.opt_state[0].trace["lora"]["blocks"]["o"]["a"].spec == P(None, "tensor")
    whole = resolve_layout(make_spec({"data": 8}), sk.MeshSpec(data=8).build())
    assert {s.spec for s in jax.tree.leaves(whole.shardings.params)} == {P()}


def test_the_first_loss_is_that_of_the_model_and_its_dims_are_found():
    params = jax.tree.map(np.asarray, ADAPTED.init(jax.random.key(0)))
    key = jax.random.key(1)
    mine, base = jax.jit(ADAPTED.loss_fn)(params, BATCH, key), jax.jit(loss)(params, BATCH, key)
    assert float(mine) == float(base)
    jax.tree.map(np.testing.assert_array_equal, ADAPTED.base(params), init(jax.random.key(0)))
    assert {one.leaf.path: one.dims for one in ADAPTED.adapted} == {**DIMS, "head": "io"}
    bound = 1 / np.sqrt(HIDDEN)
    a = params["lora"]["blocks"]["down"]["a"]
    assert 0.9 * bound < np.abs(a).max() <= bound


def test_merged_weights_are_plain_ones_on_their_mesh():
    params, mesh = randomized(), sk.MeshSpec(fsdp=4, tensor=2).build()
    spec = {"q": P(None, "fsdp", "tensor"), "o": P(None, "tensor"), "up": P(None, "fsdp")}
    placed = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(
            x, jax.sharding.NamedSharding(mesh, spec.get(path[-1].key, P()))
        ),
        params,
    )
    merged = ADAPTED.merge(placed)
    assert set(merged) == {"blocks", "head"}
    for name, w in params["blocks"].items():
        a, b = (params["lora"]["blocks"][name][k].astype("f8") for k in "ab")
        flat = w.reshape(LAYERS, -1, int(np.prod(b.shape[2:])))
        delta = a.reshape(LAYERS, -1, RANK) @ b.reshape(LAYERS, RANK, -1)
        expected = (flat + ALPHA / RANK * delta).reshape(w.shape)
        np.testing.assert_allclose(merged["blocks"][name], expected, rtol=1e-6, atol=1e-6)
        assert merged["blocks"][name].sharding == placed["blocks"][name].sharding
    traced = jax.jit(ADAPTED.merge)(params)
    np.testing.assert_allclose(loss(traced, BATCH), loss_by_hand(params, BATCH), rtol=1e-5)


def test_a_step_has_two_thirds_of_the_flops_of_full_training():
    width, hidden, rank, rows = 256, 512, 2, 16
    shapes = {"up": (LAYERS, width, hidden), "down": (LAYERS, hidden, width)}

    def wide_loss(params, batch, key=None):
        def layer(x, w):
            return x + jax.nn.relu(x @ w["up"]) @ w["down"], None

        return jnp.mean(jax.lax.scan(layer, batch, params)[0] ** 2)

    wide = jax.ShapeDtypeStruct((rows, width), "float32")
    adapted = sk.lora(
        lambda key: {n: jnp.ones(s) for n, s in shapes.items()}, wide_loss, {"*": rank}, batch=wide
    )
    step = sk.StepSpec(
        loss_fn=adapted.loss_fn, init=adapted.init, batch=wide, optimizer=SGD
    ).compile(sk.MeshSpec(data=1).build(devices=jax.devices()[:1]))
    base = 2 * rows * LAYERS * 2 * width * hidden
    low_rank = 2 * rows * LAYERS * 2 * rank * (width + hidden)
    flops = step.report().flops
    assert flops.model == 2 * base + 3 * low_rank  # forward and input gradients; A and B as ever
    plain = {name: jnp.ones(shape) for name, shape in shapes.items()}
    full = count_flops(jax.make_jaxpr(jax.value_and_grad(wide_loss))(plain, jnp.ones(wide.shape)))
    assert full.model == 3 * base
    assert flops.model <= 0.70 * full.model


def test_dropout_drops_inputs_in_training_alone():
    rate, x = 0.25, jnp.arange(1.0, 1025.0).reshape(128, 8)

    def probe_loss(params, batch, key=None):
        _, y = jax.lax.scan(lambda _, w: (None, batch["x"] @ w), None, params)
        return jnp.sum(batch["probe"] * y)

    layers = sk.lora(lambda key: jnp.zeros((2, 8, 8)), probe_loss, {"**": (8, "sio")}, dropout=rate)
    eye = jnp.stack([jnp.eye(8)] * 2)
    params = {"base": jnp.zeros((2, 8, 8)), "lora": {"a": eye, "b": eye}}

    def outputs(form, seed):
        """(x A) B of both layers, as each may drop it: [2, 128, 8]."""
        run = jax.grad(lambda p: form(params, {"x": x, "probe": p}, jax.random.key(seed)))
        return np.asarray(run(jnp.zeros((2, 128, 8))))

    np.testing.assert_array_equal(outputs(layers.loss_fn.evaluate, 0), np.stack([x, x]))
    first, second = (outputs(layers.loss_fn.train, seed) for seed in (0, 1))
    for y in (first, second):
        kept = y != 0
        np.testing.assert_allclose(y[kept], np.stack([x, x])[kept] / (1 - rate), rtol=1e-6)
        assert abs(kept.mean() - (1 - rate)) < 0.04
    assert np.any((first != 0) != (second != 0))
    assert np.any((first[0] != 0) != (first[1] != 0))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", pytest.param("shard_map", marks=pytest.mark.exhaustive)])
def test_it_is_verified_with_dropout_and_accumulation_checked_and_saved(mode, tmp_path):
    model = sk.lora(init, loss, RANKS, alpha=ALPHA, dropout=0.2, batch=BATCH)
    step = make_step(MESHES["fsdp"], model=model, accumulate=2, mode=mode)
    sk.verify(step.spec, [step.mesh], batches=[BATCH], steps=1).check()
    # Where B is zero; elsewhere this loss bends too much for difference quotients.
    state = step.init(jax.random.key(0))
    assert "ok" in str(step.self_check(state, BATCH)).splitlines()[-1]
    assert not step.report().findings
    with sk.Checkpointer(tmp_path) as saver:
        saver.save(1, state)
    with sk.Checkpointer(tmp_path) as saver:
        again = saver.restore(step.abstract_state, shardings=step.shardings).state
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)


@pytest.mark.slow
def test_bfloat16_is_as_near_to_float32_as_that_written_by_hand():
    step, params = make_step(MESHES["fsdp"], precision="bfloat16"), randomized()
    state = start(step, params)
    metrics, mine = step.gradients(state, BATCH)
    losses, by_hand_bf16, _ = by_hand(loss_by_hand, params, "bfloat16", steps=1)
    _, exact, _ = by_hand(loss_by_hand, params, steps=1)
    assert float(metrics["loss"]) == pytest.approx(losses[0], rel=5e-3)

    def distance(gradients):
        distances = jax.tree.map(lambda x, y: np.linalg.norm(x - y), gradients, exact)
        return max(jax.tree.leaves(distances)) / max(map(np.linalg.norm, jax.tree.leaves(exact)))

    assert distance(mine["lora"]) < 1.5 * distance(by_hand_bf16) < 0.05
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parent.parent / "docs" / "lora.md"
    block, *_ = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
    names = {}
    exec(compile(block, str(page), "exec"), names)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert set(names["weights"]) == {"up", "down"}


def token_batch(seed):
    draw = np.random.default_rng(seed).integers
    tokens = {name: draw(0, 40, (8, 8)).astype("i4") for name in ("inputs", "targets")}
    return {**tokens, "weights": np.ones((8, 8), "f")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "sizes", "options"),
    [
        ("fsdp | tensor", {"fsdp": 2, "tensor": 2}, {}),
        ("fsdp | tensor", {"fsdp": 2, "tensor": 2}, {"mode": "shard_map", "remat": "full"}),
        ("pipeline", {"pipe": 2, "data": 2}, {}),
        ("pipeline", {"pipe": 2, "data": 2}, {"dropout": 0.2}),
        ("pipeline", {"pipe": 2, "data": 2}, {"fold": True}),
    ],
)
def test_the_reference_decoder_is_adapted_under_every_strategy(strategy, sizes, options):
    config = DecoderConfig(vocab=40, embed_dim=16, num_layers=2, num_heads=4, mlp_dim=32)
    model = sk.from_nnx(lambda rngs: Decoder(config, rngs), decoder_loss)
    ranks = {"layers/query": (2, "sioo"), "layers/out": (2, "siio"), "layers/down": 2}
    own = {name: options[name] for name in ("dropout", "fold") if name in options}
    lora = sk.lora(model.init, model.loss_fn, ranks, **own)
    strategies = {
        "fsdp | tensor": sk.strategies.fsdp() | sk.strategies.tensor(),
        "pipeline": sk.strategies.pipeline(micro_batches=2) | sk.strategies.data(),
    }
    spec = sk.StepSpec(
        loss_fn=lora.loss_fn,
        init=lora.init,
        batch=token_batch(0),
        optimizer=SGD,
        strategy=strategies[strategy],
        **{name: value for name, value in options.items() if name not in own},
    )
    mesh = sk.MeshSpec(**sizes).build(devices=jax.devices()[: np.prod([*sizes.values()])])
    sk.verify(spec, [mesh], batches=[token_batch(0)], steps=1).check()
