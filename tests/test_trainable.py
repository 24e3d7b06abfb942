"""Frozen parameters: laid out like the others, without gradient, moments, reduction or update."""

import dataclasses
import itertools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import shardkit as sk

from ._quick import some_quick

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 64)).astype("f")
RATE = 0.1
KEY = jax.random.key(1)


def init(key):
    a, b, c = jax.random.split(key, 3)
    base = {"up": jax.random.normal(a, (64, 128)) / 8, "down": jax.random.normal(b, (128, 64)) / 8}
    lora = {"a": jax.random.normal(c, (64, 4)), "b": jnp.full((4, 64), 0.1)}
    return {"base": base, "lora": lora, "table": jnp.arange(16)}


def loss(p, b, key):
    h = jnp.tanh(b["x"] @ p["base"]["up"]) @ p["base"]["down"]
    return jnp.mean((h + b["x"] @ p["lora"]["a"] @ p["lora"]["b"] + p["table"].mean()) ** 2)


def strategy(mesh_axes):
    rules = {
        "fsdp": {"base/*": P("fsdp", None), "lora/a": P("fsdp", None)},
        "tensor": {"base/up": P(None, "tensor"), "base/down": P("tensor", None)},
    }
    table = {glob: spec for axis in mesh_axes for glob, spec in rules.get(axis, {}).items()}
    rows = tuple(axis for axis in mesh_axes if axis in ("data", "fsdp"))
    return sk.Strategy(params=sk.PathRules({**table, "**": sk.REPLICATED}), batch=P(rows))


def by_hand(steps=3):
    """Losses, the adapters after some steps of adam, and the first gradient, on one device."""
    params = init(jax.random.key(0))
    optimizer = optax.adam(RATE)
    lora, losses, first = params["lora"], [], None
    state = optimizer.init(lora)
    for _ in range(steps):
        value, gradient = jax.value_and_grad(lambda p: loss({**params, "lora": p}, {"x": X}, None))(
            lora
        )
        first = gradient if first is None else first
        updates, state = optimizer.update(gradient, state, lora)
        lora = optax.apply_updates(lora, updates)
        losses.append(float(value))
    return losses, params["base"], lora, first


OPTIONS = {
    "plain": {},
    "accumulate": {"accumulate": 2},
    "remat": {"remat": "full"},
    "shard_map": {"mode": "shard_map"},
    "shard_map, accumulate": {"mode": "shard_map", "accumulate": 2},
}
MESHES = {"data": {"data": 8}, "fsdp": {"data": 2, "fsdp": 4}, "tensor": {"data": 2, "tensor": 4}}


def make_step(sizes, loss_fn=loss, init=init, **options):
    mesh = sk.MeshSpec(**sizes).build(devices=jax.devices()[: np.prod(list(sizes.values()))])
    options = {"trainable": "lora/*", "strategy": strategy(sizes), **options}
    options |= {"init": init, "batch": {"x": X}, "mesh": mesh}
    return sk.compile_step(loss_fn, optax.adam(RATE), **options)


def check_step(step):
    losses, base, lora, first = by_hand()
    state = step.init(jax.random.key(0))
    assert [leaf.shape for leaf in jax.tree.leaves(state.opt_state)].count((64, 128)) == 0
    metrics, gradients = step.gradients(state, {"x": X})
    assert gradients["base"] == {"up": None, "down": None}
    assert gradients["table"] is None
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(first)), rel=1e-5)
    for name, gradient in first.items():
        np.testing.assert_allclose(gradients["lora"][name], gradient, rtol=1e-4, atol=1e-6)
    seen = []
    for _ in losses:
        state, metrics = step(state, {"x": X})
        seen.append(float(metrics["loss"]))
    assert seen == pytest.approx(losses, rel=1e-5)
    for name, value in lora.items():
        np.testing.assert_allclose(state.params["lora"][name], value, rtol=1e-4, atol=1e-5)
    for name, value in base.items():
        np.testing.assert_array_equal(state.params["base"][name], value)
    return state


@pytest.mark.parametrize(
    ("mesh", "options"),
    some_quick(itertools.product(MESHES, OPTIONS), ("fsdp", "shard_map"), ("data", "accumulate")),
)
def test_frozen_parameters_equal_plain_jax_and_are_never_reduced(mesh, options):
    if options.startswith("shard_map") and mesh == "tensor":
        pytest.skip("a plain loss has no products split over tensor in this mode")
    step = make_step(MESHES[mesh], **OPTIONS[options])
    state = check_step(step)
    expected = step.layout.shardings.params["base"]["up"]
    assert state.params["base"]["up"].sharding == expected
    reduced = [
        operand
        for row in step.report().ledger
        if row.kind in ("all-reduce", "reduce-scatter") and row.phase in ("backward", "other")
        for operand in row.operands
    ]
    # The gradients of the adapters and scalars; on this loss activations are [rows, 64] or wider.
    sizes = {
        np.prod([int(n) for n in op.split("[")[1][:-1].split(",") if n] or [1]) for op in reduced
    }
    frozen = {64 * 128 // n for n in (1, 4)}
    assert not sizes & frozen


def test_it_is_verified_checked_and_saved(tmp_path):
    step = make_step(MESHES["fsdp"])
    sk.verify(step.spec, meshes=[step.mesh]).check()
    state = step.init(jax.random.key(0))
    assert "ok" in str(step.self_check(state, {"x": X})).splitlines()[-1]
    with sk.Checkpointer(tmp_path) as saver:
        saver.save(1, state)
    with sk.Checkpointer(tmp_path) as saver:
        again = saver.restore(step.abstract_state, shardings=step.shardings).state
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)


def test_an_nnx_model_whose_base_is_frozen_stays_in_params():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.base = nnx.Linear(64, 64, rngs=rngs)
            self.lora = nnx.LoRA(64, 4, 64, rngs=rngs)

        def __call__(self, x):
            return self.base(x) + self.lora(x)

    model = sk.from_nnx(
        lambda rngs: Net(rngs), lambda m, b: jnp.mean(m(b["x"]) ** 2), trainable=nnx.LoRAParam
    )
    step = sk.compile_step(
        model.loss_fn,
        optax.adam(RATE),
        init=model.init,
        batch={"x": X},
        mesh=sk.MeshSpec(fsdp=8).build(),
        strategy=sk.Strategy(params=sk.shard_largest("fsdp"), batch=P("fsdp")),
        accumulate=2,
    )
    state = step.init(jax.random.key(0))
    assert state.params["base"]["kernel"].addressable_shards[0].data.shape == (8, 64)
    after, _ = step(jax.tree.map(jnp.copy, state), {"x": X})
    np.testing.assert_array_equal(after.params["base"]["kernel"], state.params["base"]["kernel"])
    assert not np.array_equal(after.params["lora"]["lora_b"], state.params["lora"]["lora_b"])


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="head")(jnp.tanh(nn.Dense(64, name="body")(x)))


class Halves(eqx.Module):
    body: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        self.body, self.head = eqx.nn.Linear(64, 64, key=key), eqx.nn.Linear(64, 4, key=key)

    def __call__(self, x):
        return self.head(jnp.tanh(self.body(x)))


class Parts(nnx.Module):
    def __init__(self, rngs):
        self.body, self.head = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.body(x)))


def filter_of_equinox():
    none = jax.tree.map(lambda _: False, Halves(jax.random.key(0)))
    return eqx.tree_at(lambda m: m.head, none, jax.tree.map(lambda _: True, none.head))


TREE = {"body": False, "head": {"kernel": True, "bias": True}}
TRAINED = {
    ("linen", "glob"): "head/*",
    ("linen", "tree"): TREE,
    ("equinox", "glob"): "head/*",
    ("equinox", "tree"): filter_of_equinox(),
    ("nnx", "filter"): nnx.PathContains("head"),
    ("nnx", "tree"): TREE,
}


@pytest.mark.parametrize(("form", "of"), some_quick(TRAINED, ("equinox", "tree"), ("nnx", "tree")))
def test_an_adapter_says_what_is_trained(form, of):
    declared = {"trainable": TRAINED[form, of]}
    if form == "linen":
        model = sk.from_linen(Two(), lambda y, b: jnp.mean(y**2), {"x": X}, **declared)
    elif form == "nnx":
        model = sk.from_nnx(Parts, lambda m, b: jnp.mean(m(b["x"]) ** 2), **declared)
    else:
        model = sk.from_equinox(Halves, lambda m, b: jnp.mean(jax.vmap(m)(b["x"]) ** 2), **declared)
    step = make_step({"data": 2}, loss_fn=model.loss_fn, init=model.init, trainable=None)
    state = step.init(jax.random.key(0))
    after, metrics = step(jax.tree.map(jnp.copy, state), {"x": X})
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), after.params, state.params)
    assert not any(jax.tree.leaves(moved["body"]))
    assert all(jax.tree.leaves(moved["head"]))
    own = jax.grad(lambda p: model.loss_fn.train({**state.params, "head": p}, {"x": X}, KEY)[0])
    norm = optax.tree.norm(own(state.params["head"]))
    assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-5)


def test_two_networks_take_turns_without_copies():
    """A GAN: each step trains one network and passes the other one through."""

    def make(key):
        one, two = jax.random.split(key)
        return {"g": jax.random.normal(one, (64, 64)) / 8, "d": jax.random.normal(two, (64, 1)) / 8}

    def score(p, x):
        return (x @ p["d"])[:, 0]

    def d_loss(p, b, key):
        return jnp.mean(
            jax.nn.softplus(-score(p, b["x"])) + jax.nn.softplus(score(p, b["z"] @ p["g"]))
        )

    def g_loss(p, b, key):
        return jnp.mean(jax.nn.softplus(-score(p, b["z"] @ p["g"])))

    batch = {"x": X, "z": X[::-1].copy()}
    mesh = sk.MeshSpec(data=8).build()
    data = sk.Strategy(params=sk.REPLICATED, batch=P("data"))
    d_step, g_step = (
        sk.compile_step(
            of, optax.adam(RATE), init=make, batch=batch, mesh=mesh, strategy=data, trainable=name
        )
        for of, name in ((d_loss, "d"), (g_loss, "g"))
    )
    d_state, g_state = d_step.init(jax.random.key(0)), g_step.init(jax.random.key(0))
    params = make(jax.random.key(0))
    moments = {name: optax.adam(RATE).init(params[name]) for name in "dg"}
    for _ in range(2):
        d_state, _ = d_step(d_state, batch)
        g_state, _ = g_step(dataclasses.replace(g_state, params=d_state.params), batch)
        d_state = dataclasses.replace(d_state, params=g_state.params)
        for name, of in (("d", d_loss), ("g", g_loss)):
            gradient = jax.grad(lambda w: of({**params, name: w}, batch, None))(params[name])  # noqa: B023
            updates, moments[name] = optax.adam(RATE).update(gradient, moments[name])
            params[name] = optax.apply_updates(params[name], updates)
    for name in "dg":
        np.testing.assert_allclose(g_state.params[name], params[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_student_learns_from_a_frozen_teacher():
    """Distillation: one tree with both, of which the student alone has moments and gradients."""

    def make(key):
        one, two = jax.random.split(key)
        teacher = {"up": jax.random.normal(one, (64, 128)), "down": jnp.ones((128, 8)) / 8}
        return {"teacher": teacher, "student": jax.random.normal(two, (64, 8)) / 8}

    def distill(p, b, key):
        taught = jax.nn.log_softmax(jnp.tanh(b["x"] @ p["teacher"]["up"]) @ p["teacher"]["down"])
        learned = jax.nn.log_softmax(b["x"] @ p["student"])
        return jnp.mean(jnp.sum(jnp.exp(taught) * (taught - learned), -1))

    options = {"init": make, "batch": {"x": X}, "trainable": "student"}
    rules = sk.Strategy(params=sk.shard_largest("fsdp", min_size=0), batch=P("fsdp"))
    mesh = sk.MeshSpec(fsdp=8).build()
    step = sk.compile_step(distill, optax.adam(RATE), mesh=mesh, strategy=rules, **options)
    state, params = step.init(jax.random.key(0)), make(jax.random.key(0))
    moments = optax.adam(RATE).init(params["student"])
    for _ in range(2):
        state, _ = step(state, {"x": X})
        of = params | {"student": None}
        gradient = jax.grad(lambda p: distill({**of, "student": p}, {"x": X}, None))(  # noqa: B023
            params["student"]
        )
        updates, moments = optax.adam(RATE).update(gradient, moments)
        params["student"] = optax.apply_updates(params["student"], updates)
    np.testing.assert_allclose(state.params["student"], params["student"], rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state.params["teacher"], params["teacher"])
    # Their rows are gathered for the loss; nothing as large as the teacher is reduced.
    assert state.params["teacher"]["up"].addressable_shards[0].data.shape == (64, 16)


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ("lora/c", r"trainable='lora/c' +selects none of the 5 parameters"),
        (("lora/*", "bias"), r"trainable='bias' +selects none"),
        ("the predicate", r"trainable='the predicate' +selects none"),
        ((), "selects none"),
        (lambda path: False, "trainable +selects none"),
        ("**", r"table i32\[16\] +is not a floating-point array"),
        (None, r"table i32\[16\] +is not a floating-point array"),
        (3, "trainable +is of type int"),
        ({"base": False, "lora": {"a": True}}, r"lora/b +has no boolean in trainable="),
        ({"base": False, "lora": False, "table": False}, "trainable +selects none of the 5"),
        ({"bse": True, "lora": True}, r"trainable/bse +is True, and no parameter is there"),
        ({"base": False, "lora": 1, "table": False}, "trainable +is of type dict"),
        ((3,), "trainable +is of type tuple"),
    ],
)
def test_a_wrong_declaration_is_an_error(trainable, expected):
    with pytest.raises(sk.ShardkitError, match=expected):
        make_step(MESHES["data"], trainable=trainable)


def test_no_parameters_are_an_error_of_init():
    with pytest.raises(sk.errors.StepError, match=r"params  is \{\}, without a leaf"):
        sk.compile_step(
            loss,
            optax.adam(RATE),
            init=lambda key: {},
            batch={"x": X},
            mesh=sk.MeshSpec(data=2).build(devices=jax.devices()[:2]),
            strategy=sk.strategies.data(),
            trainable="lora/*",
        )


@pytest.mark.parametrize(
    "trainable",
    [
        ["lora/a", "lora/b"],
        {"lora/*"},
        lambda path: "lora" in path,
        {"base": False, "lora": {"a": True, "b": np.True_}, "table": False},
    ],
)
def test_forms_of_the_declaration(trainable):
    step = make_step({"data": 2}, trainable=trainable)
    assert step.layout.partition.frozen == {"base/up", "base/down", "table"}


def test_a_pipeline_beside_one_frozen_array_has_the_gradients_of_one_device():
    """Nothing but the layers is trained, and what is outside of them is a bare array."""
    draw = np.random.default_rng(0).normal
    params = {
        "layers": {"w": (draw(size=(4, 8, 8)) / 3).astype("f")},
        "table": draw(size=(8, 8)).astype("f"),
    }
    batch = draw(size=(8, 8)).astype("f")

    def loss(params, batch, key):
        return sk.nn.layer_stack(
            lambda table, x, key: x @ table,
            lambda w, x, batch, key: jnp.tanh(x @ w["w"]),
            lambda table, x, batch: jnp.mean((x @ table) ** 2),
            params["table"],
            params["layers"],
            batch,
            key,
        )

    def by_hand(layers):
        x = batch @ params["table"]
        for w in layers["w"]:
            x = jnp.tanh(x @ w)
        return jnp.mean((x @ params["table"]) ** 2)

    strategy = sk.strategies.pipeline(micro_batches=2) | sk.strategies.data()
    step = sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=lambda key: {
            "layers": {
                "w": sk.WithAxes(jnp.asarray(params["layers"]["w"]), ("layers", None, None))
            },
            "table": sk.WithAxes(jnp.asarray(params["table"]), (None, None)),
        },
        batch=batch,
        mesh=sk.MeshSpec(pipe=2, data=2).build(devices=jax.devices()[:4]),
        strategy=strategy,
        trainable="layers/**",
    )
    metrics, got = step.gradients(step.init(jax.random.key(0)), batch)
    value, want = jax.value_and_grad(by_hand)(params["layers"])
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(got["layers"]["w"], want["w"], rtol=1e-5, atol=1e-7)
