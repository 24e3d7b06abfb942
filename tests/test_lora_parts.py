"""Adapters and codes inside of what a strategy computes in its own way: pipelines and experts.

Every cell is held to the same written by hand, on one device and without `sk.nn`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk

from ._quick import some_quick

RNG = np.random.default_rng(0)
LAYERS, EXPERTS, CHOICES, WIDTH, HIDDEN, RANK, SCALE = 2, 4, 2, 16, 32, 3, 2.0
BATCH = {
    "x": RNG.normal(size=(8, 4, WIDTH)).astype("f"),
    "y": RNG.normal(size=(8, 4, 5)).astype("f"),
}
SGD = optax.sgd(0.05, momentum=0.9)
CAPACITY = 3


def init(key):
    names = {
        "mix": ("layers", "embed", "mlp"),
        "router": ("layers", "embed", None),
        "up": ("layers", "experts", "embed", "expert_mlp"),
        "down": ("layers", "experts", "expert_mlp", "embed"),
    }
    sizes = {"layers": LAYERS, "experts": EXPERTS, "embed": WIDTH, "mlp": WIDTH}
    sizes |= {"expert_mlp": HIDDEN, None: EXPERTS}
    *keys, last = jax.random.split(key, len(names) + 1)
    layers = {
        name: sk.WithAxes(jax.random.normal(k, [sizes[a] for a in axes]) / 4, axes)
        for k, (name, axes) in zip(keys, names.items(), strict=True)
    }
    head = jax.random.normal(last, (WIDTH, 5)) / 4
    return {"layers": layers, "head": sk.WithAxes(head, ("embed", None))}


def make_loss(capacity=None):
    def loss(params, batch, key):
        ramp = jnp.arange(WIDTH) / WIDTH  # layers close over an array of the trace

        def mlp(w, rows, dot):
            return dot(jnp.tanh(dot(rows, w["up"].astype(rows.dtype))), w["down"])

        def layer(w, x, batch, key):
            x = x + jnp.tanh((x + ramp) @ w["mix"])
            choice, share = sk.nn.route(jax.lax.stop_gradient(x) @ w["router"], CHOICES)
            own = {name: w[name] for name in ("up", "down")}
            return x + sk.nn.experts(x, choice, share, own, mlp, capacity=capacity)

        def last(outer, x, batch):
            return jnp.mean((x @ outer["head"] - batch["y"]) ** 2)

        outer = {"head": params["head"]}
        first = lambda outer, batch, key: batch["x"]  # noqa: E731
        return sk.nn.layer_stack(first, layer, last, outer, params["layers"], batch, key)

    return loss


def loss_by_hand(params, capacity):
    """Every expert computes every token, and those that did not choose it count nothing."""

    def weight(w, ab):
        return w if ab is None else w + SCALE * jnp.einsum("...ir,...ro->...io", ab["a"], ab["b"])

    lora, x = params["lora"], jnp.asarray(BATCH["x"])
    for index in range(LAYERS):
        layer, own = jax.tree.map(lambda v: v[index], (params["layers"], lora["layers"]))  # noqa: B023
        w = {name: weight(v, own.get(name)) for name, v in layer.items()}
        x = x + jnp.tanh((x + jnp.arange(WIDTH) / WIDTH) @ w["mix"])
        p = jax.nn.softmax(jax.lax.stop_gradient(x) @ w["router"])
        best, chosen = jax.lax.top_k(p, CHOICES)
        one_hot = jax.nn.one_hot(chosen, EXPERTS)  # [row, token, choice, expert]
        if capacity is not None:
            flat = one_hot.reshape(len(x), -1, EXPERTS)
            kept = (jnp.cumsum(flat, 1) - flat < capacity) * flat
            one_hot = kept.reshape(one_hot.shape)
        share = jnp.einsum("btkx,btk->btx", one_hot, best / best.sum(-1, keepdims=True))
        y = jnp.einsum("bte,xef->btxf", x, w["up"])
        x = x + jnp.einsum("btx,btxf,xfe->bte", share, jnp.tanh(y), w["down"])
    return jnp.mean((x @ weight(params["head"], lora["head"]) - BATCH["y"]) ** 2)


def by_hand(params, capacity, steps=3):
    """Losses, the first gradient and the adapters after some steps."""
    run = jax.jit(jax.value_and_grad(lambda p: loss_by_hand({**params, "lora": p}, capacity)))
    lora, state, losses, first = params["lora"], SGD.init(params["lora"]), [], None
    for _ in range(steps):
        value, gradient = run(lora)
        first = gradient if first is None else first
        updates, state = SGD.update(gradient, state, lora)
        lora = optax.apply_updates(lora, updates)
        losses.append(float(value))
    return losses, first, lora


RANKS = {"layers/router": None, "layers/*": RANK, "head": RANK}
KINDS = {"layers/router": None, "layers/down": ("int8", 8), "layers/*": ("nf4", 8)}


def make_model(codes=False, capacity=None, **options):
    """The model, parameters whose B is not zero, and those that the hand-written loss gets."""
    tuned = sk.lora(init, make_loss(capacity), RANKS, alpha=SCALE * RANK, batch=BATCH, **options)
    params = jax.tree.map(
        lambda x: getattr(x, "value", x),
        tuned.init(jax.random.key(0)),
        is_leaf=lambda x: isinstance(x, sk.WithAxes),
    )
    draw = np.random.default_rng(1).normal
    params["lora"] = jax.tree.map(lambda x: draw(size=x.shape).astype("f") / 8, params["lora"])
    if not codes:
        return tuned, params, params
    small = sk.quantize(tuned.init, tuned.loss_fn, KINDS)
    stored = small.quantize(params)
    return small, stored, small.dequantize(stored)


S = sk.strategies
PIPE = {"pipe": 2, "data": 2}
# name: (strategy, mesh, options of the step, of the model)
CELLS = {
    "pipeline": (lambda: pipeline() | S.data(), PIPE, {}, {}),
    "experts": (lambda: S.data() | S.expert(), {"data": 2, "expert": 2}, {"accumulate": 2}, {}),
    "codes, pipeline of experts": (
        lambda: pipeline() | S.data() | S.expert(),
        {"pipe": 2, "data": 2, "expert": 2},
        {},
        {"codes": True},
    ),
    "codes, gathered": (
        lambda: pipeline() | S.fsdp(min_size=0),
        {"pipe": 2, "fsdp": 2},
        {},
        {"codes": True},
    ),
    "zero bubble": (lambda: pipeline(schedule="zero_bubble") | S.data(), PIPE, {}, {}),
    "interleaved": (
        lambda: pipeline(schedule="interleaved", virtual_stages=2, layers_per_stage=(1, 0, 0, 1)),
        {"pipe": 2},
        {},
        {},
    ),
    "pipeline, remat": (lambda: pipeline() | S.data(), PIPE, {"remat": "full"}, {}),
    "pipeline in turns": (
        lambda: pipeline() | S.data(),
        PIPE,
        {"accumulate": sk.Accumulate(2, reduce="every")},
        {"codes": True},
    ),
    "dropless, shard_map": (lambda: S.fsdp(min_size=0), {"fsdp": 2}, {"mode": "shard_map"}, {}),
    "codes, shard_map": (
        lambda: S.fsdp(min_size=0),
        {"fsdp": 2},
        {"mode": "shard_map"},
        {"codes": True},
    ),
    "capacity": (lambda: S.data(), {"data": 2}, {}, {"capacity": CAPACITY}),
    "capacity, experts": (
        lambda: S.data() | S.expert(),
        {"data": 2, "expert": 2},
        {},
        {"capacity": CAPACITY, "codes": True},
    ),
}
# The other cells are parts of these.
TOGETHER = (
    *("codes, pipeline of experts", "codes, gathered", "interleaved", "dropless, shard_map"),
    *("pipeline, remat", "capacity"),
)


def pipeline(**options):
    micro = 2
    return S.pipeline(micro_batches=micro, **options)


def start_at(params, model, strategy, sizes, **options):
    """A compiled step and its first state, with these parameters."""
    mesh = sk.MeshSpec(**sizes).build(devices=jax.devices()[: np.prod([*sizes.values()])])
    step = sk.StepSpec(
        loss_fn=model.loss_fn,
        init=model.init,
        batch=BATCH,
        optimizer=SGD,
        strategy=strategy(),
        **options,
    ).compile(mesh)
    state = step.init(jax.random.key(0))
    placed = jax.tree.map(jax.device_put, jax.device_get(params), step.shardings.params)
    state = dataclasses.replace(state, params=placed)
    return step, state


@pytest.mark.parametrize("cell", some_quick(CELLS, "experts", slow=TOGETHER))
def test_steps_equal_those_written_by_hand(cell):
    strategy, sizes, options, of_model = CELLS[cell]
    model, params, floats = make_model(**of_model)
    losses, first, after = by_hand(floats, of_model.get("capacity"))
    step, state = start_at(params, model, strategy, sizes, **options)
    _, gradients = step.gradients(state, BATCH)
    seen = [float(step.evaluate(state, BATCH)["loss"])]
    for _ in losses:
        state, metrics = step(state, BATCH)
        seen.append(float(metrics["loss"]))
    assert seen == pytest.approx([losses[0], *losses], rel=1e-5)
    for mine, other in ((gradients["lora"], first), (state.params["lora"], after)):
        largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(other))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * largest),  # noqa: B023
            mine,
            other,
        )
    check_ledger(step, of_model.get("codes", False))


def check_ledger(step, codes):
    """Frozen weights have no gradient; codes are gathered as codes."""
    sent: dict[str, set[int]] = {}
    for row in step.report().ledger:
        for operand in row.operands:
            dtype, shape = operand.rstrip("]").split("[")
            size = int(np.prod([int(n) for n in shape.split(",") if n]))
            sent.setdefault(f"{row.kind} {dtype}", set()).add(size)
    # Of the experts of all layers, one layer or one device.
    weights = {LAYERS * EXPERTS * WIDTH * HIDDEN // n for n in (1, 2, 4, 8)}
    for kind in ("all-reduce", "reduce-scatter", *(("all-gather",) if codes else ())):
        assert not sent.get(f"{kind} f32", set()) & weights
    if codes and "fsdp" in step.mesh.axis_names:
        assert sent["all-gather s8"] & weights  # and nf4, two codes a byte
        assert {2 * size for size in sent["all-gather u8"]} & weights


def test_a_derivative_and_a_vmap_of_ones_own_are_around_a_part_as_ever():
    """There the part is called as it was traced, with what its functions close over."""
    weights = {"w": jnp.ones((2, 4, 4)) / 3, "gain": jnp.ones((4, 4))}

    def loss(params, batch, key):
        def energy(x, shift):
            def mlp(w, rows, dot):
                return dot(rows + shift, w)

            choice = jnp.zeros((1, 3, 1), jnp.int32)
            y = sk.nn.experts(x[None], choice, jnp.ones((1, 3, 1)), params["w"], mlp, capacity=3)
            return jnp.sum(y**2)

        shifts = jnp.arange(2.0)
        slopes = jax.vmap(jax.grad(energy), (None, 0))(batch @ params["gain"], shifts)
        return jnp.mean(slopes)

    def plain(params, batch):
        w, x = params["w"][0], batch @ params["gain"]
        energy = lambda x, shift: jnp.sum(((x + shift) @ w) ** 2)  # noqa: E731
        return jnp.mean(jax.vmap(jax.grad(energy), (None, 0))(x, jnp.arange(2.0)))

    x = jnp.asarray(BATCH["x"][0, :3, :4])
    model = sk.lora(lambda key: weights, loss, {"gain": 2}, batch=x)
    params = model.init(jax.random.key(0))
    found = jax.value_and_grad(lambda p: model.loss_fn({**params, **p}, x, None))(weights)
    want = jax.value_and_grad(lambda p: plain(p, x))(weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, want)


def test_adapters_of_weights_that_stay_gathered_from_forward_to_backward():
    def loss(params, batch, key):
        w = sk.nn.use_param(params["w"], "embed", "mlp")
        return jnp.mean((jnp.tanh(batch["x"] @ w) @ jnp.ones((HIDDEN, 5)) - batch["y"]) ** 2)

    start = jax.random.normal(jax.random.key(0), (WIDTH, HIDDEN)) / 4
    tuned = sk.lora(
        lambda key: {"w": sk.WithAxes(start, ("embed", "mlp"))}, loss, {"w": RANK}, batch=BATCH
    )
    strategy = lambda: S.fsdp(min_size=0, reshard_after_forward=False)  # noqa: E731
    params = {"w": start, "lora": {"w": {"a": start[:, :RANK], "b": start[:RANK]}}}
    step, state = start_at(params, tuned, strategy, {"fsdp": 4}, remat="full")
    metrics, gradients = step.gradients(state, BATCH)
    by_hand = lambda ab: loss({"w": start + ab["a"] @ ab["b"]}, BATCH, None)  # noqa: E731
    value, want = jax.value_and_grad(by_hand)(params["lora"]["w"])
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    for name, gradient in want.items():
        np.testing.assert_allclose(
            gradients["lora"]["w"][name], gradient, rtol=1e-5, atol=1e-6 * abs(gradient).max()
        )
