"""What models do with an adapted weight: every idiom against plain JAX, and what is refused."""

import collections

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

RNG = np.random.default_rng(3)
X = RNG.normal(size=(16, 8)).astype("f")
BATCH = {"x": X, "ids": np.arange(16) % 6}
SCALE = 2.0
SGD = optax.sgd(0.05)


def draw(*shape):
    return RNG.normal(size=shape).astype("f") / 2


@jax.custom_vjp
def product(x, w):
    return (x @ w).astype(x.dtype)


product.defvjp(
    lambda x, w: (product(x, w), (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g)
)


def unrolled(w, x):
    for index in range(w.shape[0]):
        x = jnp.tanh(x @ w[index])
    return x


def looped(w, x):
    def body(i, x):
        return jnp.tanh(x @ w[i])

    return jax.lax.fori_loop(0, 2, body, x)


def chosen(w, x):
    return jax.lax.cond(x.sum() > 100, lambda x: x, lambda x: x @ w, x)


# (shape and dims of a weight, what a model does with it and x [16, 8])
USES = {
    "transposed": ((5, 8), "oi", lambda w, x: x @ w.T),
    "the left operand of a vmap": ((5, 8), "oi", lambda w, x: jax.vmap(lambda row: w @ row)(x)),
    "heads": ((8, 2, 3), "ioo", lambda w, x: jnp.einsum("te,ehd->thd", x, w)),
    "heads joined": ((8, 2, 3), "ioo", lambda w, x: x @ w.reshape(8, 6)),
    "inputs joined": (
        (2, 4, 3),
        "iio",
        lambda w, x: jnp.einsum("thd,hdo->to", x.reshape(16, 2, 4), w),
    ),
    "inputs split": (
        (8, 3),
        "io",
        lambda w, x: jnp.einsum("tab,abo->to", x.reshape(16, 2, 4), w.reshape(2, 4, 3)),
    ),
    "fused outputs": ((8, 6), "io", lambda w, x: (x @ w[:, :2]).sum() + x @ w[:, 3:]),
    "split outputs": (
        (8, 6),
        "io",
        lambda w, x: sum(jnp.tanh(x @ part).sum(1) for part in jnp.split(w, [1, 3], 1)),
    ),
    "split inputs": (
        (8, 3),
        "io",
        lambda w, x: sum(jnp.tanh(x[:, :4] @ part) for part in jnp.split(w, 2)),
    ),
    "a part of the inputs": ((9, 3), "io", lambda w, x: x @ w[1:]),
    "experts": ((4, 2, 3), "sio", lambda w, x: jnp.einsum("xce,xef->xcf", x.reshape(4, 16, 2), w)),
    "all experts of a token": ((4, 8, 3), "sio", lambda w, x: jnp.einsum("te,xef->txf", x, w)),
    "experts on the left": ((4, 3, 8), "soi", lambda w, x: jnp.einsum("xfe,te->xft", w, x)),
    "stacked behind": ((8, 3, 4), "ios", lambda w, x: jnp.einsum("te,efx->xtf", x, w)),
    "unrolled layers": ((2, 8, 8), "sio", unrolled),
    "layers of a loop": ((2, 8, 8), "sio", looped),
    "a branch": ((8, 8), "io", chosen),
    "a rule of its own": ((8, 3), "io", lambda w, x: product(x, w)),
    "twice": ((8, 8), "io", lambda w, x: jnp.tanh(x @ w) @ w),
    "jit, cast and checkpoint": (
        (8, 3),
        "io",
        jax.jit(jax.checkpoint(lambda w, x: x @ w.astype("bfloat16").astype("float32"))),
    ),
}


ALL_AT_ONCE = ("all experts of a token", "experts on the left", "stacked behind")


@pytest.mark.parametrize("use", USES)
def test_a_use_equals_that_of_the_merged_weight(use):
    """Values and gradients of x W + scale (x A) B are those of x (W + scale A B)."""
    shape, dims, run = USES[use]

    def loss(params, batch, key=None):
        return jnp.mean(jnp.cos(run(params["w"], batch["x"])))

    w = draw(*shape)
    # A product with all experts at once does not tell that they are stacked.
    rank = (2, dims) if use in ALL_AT_ONCE else 2
    model = sk.lora(
        lambda key: {"w": jnp.asarray(w)}, loss, {"w": rank}, alpha=2 * SCALE, batch=BATCH
    )
    (one,) = model.adapted
    assert one.dims == dims
    factors = {name: draw(*one.shape(name)) for name in "ab"}
    letters = "".join(chr(ord("a") + dim) for dim in range(len(shape)))
    a, b = ("".join("r" if d is None else letters[d] for d in one.factors[n]) for n in "ab")

    def by_hand(factors):
        delta = jnp.einsum(f"{a},{b}->{letters}", factors["a"], factors["b"])
        return loss({"w": w + SCALE * delta}, BATCH)

    def mine(factors):
        return model.loss_fn({"w": w, "lora": {"w": factors}}, BATCH, jax.random.key(0))

    rtol = 2e-2 if "cast" in use else 1e-5
    found, expected = (jax.jit(jax.value_and_grad(f))(factors) for f in (mine, by_hand))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            x, y, rtol=rtol, atol=rtol * float(jnp.abs(y).max())
        ),
        found,
        expected,
    )
    # No product is as large as W: its gradient is not computed, but for rules that always do.
    sizes = [
        out.aval.shape
        for eqn in all_equations(jax.make_jaxpr(jax.grad(mine))(factors).jaxpr)
        for out in eqn.outvars
        if eqn.primitive.name == "dot_general"
    ]
    assert sizes
    assert use in ("twice", "a rule of its own") or shape not in sizes


def all_equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from all_equations(inner)


def test_it_can_be_folded_into_weights_that_no_product_has():
    def loss(params, batch, key=None):
        return jnp.mean((params["table"][batch["ids"]] * batch["x"]) ** 2)

    table, factors = draw(6, 8), {"a": draw(6, 2), "b": draw(2, 8)}
    model = sk.lora(lambda key: {"table": table}, loss, {"table": (2, "io")}, alpha=4, fold=True)
    params = {"table": table, "lora": {"table": factors}}
    expected = loss({"table": table + 2.0 * factors["a"] @ factors["b"]}, BATCH)
    np.testing.assert_allclose(model.loss_fn(params, BATCH, None), expected, rtol=1e-6)


def refused_loss(params, batch, key=None):
    table = params["table"][batch["ids"]] @ params["wrong"]
    gated = batch["x"] @ (params["scaled"] * 2.0)

    def body(carry, w):
        return (carry[0] @ carry[1], jnp.sin(carry[1])), batch["x"] @ w

    (x, _), y = jax.lax.scan(body, (batch["x"], params["carried"]), params["layers"])
    return jnp.mean(table) + jnp.mean(gated) + jnp.mean(x) + jnp.mean(y)


def test_a_tied_weight_has_a_fix_that_works():
    """Its two products have its dims in turn."""

    def loss(params, batch, key):
        return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) @ params["w"].T) ** 2)

    def adapt(rank, **options):
        return sk.lora(lambda key: {"w": jnp.ones((8, 8))}, loss, {"w": rank}, **options)

    for dims in ("io", "oi"):
        model = adapt((2, dims))
        with pytest.raises(sk.errors.StepError, match=r"if all its products are so, else leave it"):
            model.loss_fn(model.init(jax.random.key(0)), BATCH, jax.random.key(0))
    with pytest.raises(sk.errors.StepError, match=r'or fold=True and \(2, "io"\)'):
        adapt(2, batch=BATCH)
    model = adapt((2, "io"), fold=True)
    params = model.init(jax.random.key(0))
    want = loss(model.merge(params), BATCH, None)
    np.testing.assert_allclose(model.loss_fn(params, BATCH, jax.random.key(0)), want, rtol=1e-6)


def test_every_use_that_cannot_be_followed_is_in_one_error():
    shapes = {"table": (6, 8), "wrong": (8, 3), "scaled": (8, 8), "carried": (8, 8)}
    shapes |= {"layers": (2, 8, 3), "unused": (8, 8)}
    ranks = {"wrong": (2, "oi"), "layers": (2, "iso"), "**": 2}
    model = sk.lora(lambda key: {n: jnp.ones(s) for n, s in shapes.items()}, refused_loss, ranks)
    with pytest.raises(sk.errors.StepError) as error:
        model.loss_fn(model.init(jax.random.key(0)), BATCH, jax.random.key(0))
    text = str(error.value)
    place = "test_lora_models.py"
    for expected in (
        "table f32[6,8]",
        "goes into `gather`",
        "has the dims 'oi', and in `dot_general`",
        "they are 'io'",
        "Fix:",
        '(2, "io")',
        "goes into `mul`",
        "carried f32[8,8]",
        "goes into `scan`",
        "has the dims 'iso', and in `scan`",
        "unused f32[8,8]",
        "is multiplied with nothing in the loss",
        "fold=True",
        f"{place}:",
    ):
        assert expected in text, (expected, text)


def test_a_rule_of_its_own_that_is_not_linear_in_the_weight_is_refused():
    @jax.custom_vjp
    def rounded(x, w):
        return x @ jnp.round(w)

    rounded.defvjp(lambda x, w: (rounded(x, w), (x, w)), lambda s, g: (g @ s[1].T, s[0].T @ g))
    model = sk.lora(
        lambda key: {"w": jnp.ones((8, 3))},
        lambda p, b, key: rounded(b["x"], p["w"]).mean(),
        {"w": 2},
    )
    with pytest.raises(sk.errors.StepError, match="goes into `round`"):
        model.loss_fn(model.init(jax.random.key(0)), BATCH, jax.random.key(0))


def test_a_weight_that_a_rule_of_its_own_returns_keeps_its_adapter():
    """As a strategy that gathers weights, and not their gradients, moves them."""

    @jax.custom_vjp
    def turned(w):
        return w.T

    turned.defvjp(lambda w: (turned(w), None), lambda saved, g: (g.T,))
    model = sk.lora(
        lambda key: {"w": jnp.ones((3, 8))},
        lambda p, b, key: (b["x"] @ turned(p["w"])).mean(),
        {"w": (2, "oi")},
    )
    params = jax.tree.map(lambda x: x + 0.5, model.init(jax.random.key(0)))
    found = jax.value_and_grad(model.loss_fn)(params, BATCH, jax.random.key(0))
    merged = lambda p: (BATCH["x"] @ model.merge(p)["w"].T).mean()  # noqa: E731
    want = jax.value_and_grad(merged)(params)
    for tree in (found, want):
        del tree[1]["w"]  # which is frozen
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, want)


def stacked(key):
    return {
        "up": {"kernel": jnp.ones((2, 8, 3))},
        "down": jnp.ones((8, 3)),
        "bias": jnp.ones(3),
        "ids": jnp.arange(4).reshape(2, 2),
    }


@pytest.mark.parametrize(
    ("ranks", "options", "expected"),
    [
        ({"**/kernle": 2}, {}, r"'\*\*/kernle' +matches none of the 4 parameters.* Did you mean"),
        ({"down": 0}, {}, "'down': 0 +is not a rank"),
        ({"down": True}, {}, "is not a rank"),
        ({"down": (2, "ix")}, {}, "has dims that are not letters"),
        ({"down": (2, "ii")}, {}, "with both i, o"),
        ({"down": (2, "iio")}, {}, "down f32.8,3. +has 2 dims, and 'iio' names 3"),
        ({"bias": 2}, {}, "bias f32.3. +is no matrix"),
        ({"ids": 2}, {}, r"ids i32\[2,2\] +is not a floating-point"),
        ({"up/*": 2}, {}, r'up/kernel f32\[2,8,3\] +has 3 dims.*\n.*\(2, "ioo"\)'),
        ({"down": None}, {}, "chooses no parameter"),
        ({"down": 2}, {"dropout": 1.0}, r"dropout +1.0 is not in \[0, 1\)"),
        ({"down": 2}, {"dropout": 0.1, "fold": True}, "dropout +drops elements of an input"),
        ({"down": 2}, {"rank_stabilized": True}, "needs an alpha"),
        ({"down": 2}, {"alpha": "16"}, "alpha +expected"),
    ],
)
def test_a_wrong_declaration_is_an_error(ranks, options, expected):
    with pytest.raises(sk.errors.StepError, match=expected):
        sk.lora(stacked, lambda params, batch, key: 0.0, ranks, **options)


def test_other_losses_and_names_that_are_taken_are_errors():
    def loss(params, batch, key=None):
        return 0.0

    with pytest.raises(sk.errors.StepError, match=r"loss_fn +is an sk.ShardMapLoss"):
        sk.lora(stacked, sk.ShardMapLoss(loss, loss), {"down": 2})
    with pytest.raises(sk.errors.StepError, match=r"'lora' +is a key of the model's parameters"):
        sk.lora(lambda key: {"lora": jnp.ones((2, 2))}, loss, {"**": 2})

    def both(params, batch, key=None):
        return jnp.mean(batch["x"] @ params @ params.T)

    with pytest.raises(sk.errors.StepError, match="products whose dims are 'io' and 'oi'"):
        sk.lora(lambda key: jnp.ones((8, 8)), both, {"**": 2}, batch=BATCH)


Pair = collections.namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    ("init", "path"),
    [
        (lambda key: jnp.ones((8, 3)), "**"),
        (lambda key: [jnp.ones(3), jnp.ones((8, 3))], "1"),
        (lambda key: Pair(jnp.ones(3), {"w": jnp.ones((8, 3))}), "second/w"),
    ],
)
def test_any_pytree_is_adapted(init, path):
    def loss(params, batch, key=None):
        return jnp.mean((batch["x"] @ jax.tree.leaves(params)[-1]) ** 2)

    model = sk.lora(init, loss, {path: 2}, batch=BATCH)
    params = model.init(jax.random.key(0))
    assert set(params) == {"base", "lora"}
    assert jax.tree.structure(model.merge(params)) == jax.tree.structure(init(None))
    spec = sk.StepSpec(loss_fn=model.loss_fn, init=model.init, batch=BATCH, optimizer=SGD)
    assert [follows.of for follows in spec.follows] == [
        "base/" * (path != "**") + path.replace("**", "base")
    ] * 2
    assert float(model.loss_fn(params, BATCH, None)) == float(loss(init(None), BATCH))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        split = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
        self.up = nnx.Linear(8, 16, kernel_init=split, rngs=rngs)
        self.down = nnx.LinearGeneral((4, 4), 8, axis=(-2, -1), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.down(jax.nn.relu(self.up(x)).reshape(-1, 4, 4)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((4, 4), name="up")(x)
        return nn.DenseGeneral(8, axis=(-2, -1), name="down")(jax.nn.relu(x))


class EquinoxNet(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.up, self.down = (
            eqx.nn.Linear(n, 24 - n, key=k) for n, k in zip((8, 16), keys, strict=True)
        )

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x)))


def from_nnx():
    return sk.from_nnx(NnxNet, lambda m, b: jnp.mean((m(b["x"]) - b["x"][:, ::-1]) ** 2))


def from_linen():
    return sk.from_linen(LinenNet(), lambda y, b: jnp.mean((y - b["x"][:, ::-1]) ** 2), BATCH)


def from_equinox():
    return sk.from_equinox(
        EquinoxNet, lambda m, b: jnp.mean((jax.vmap(m)(b["x"]) - b["x"][:, ::-1]) ** 2)
    )


MODELS = {
    "nnx": (from_nnx, {"**/kernel": 2}, {"up/kernel": "io", "down/kernel": "iio"}),
    "linen": (from_linen, {"**/kernel": 2}, {"up/kernel": "ioo", "down/kernel": "iio"}),
    "equinox": (from_equinox, {"**/weight": 2}, {"up/weight": "oi", "down/weight": "oi"}),
}


def plain_forward(params, batch, dims):
    """The three models in plain JAX, with adapters as PEFT writes them."""
    x = batch["x"]
    for name in ("up", "down"):
        kind = "weight" if "weight" in params[name] else "kernel"
        w, bias, ab = params[name][kind], params[name]["bias"], params["lora"][name][kind]
        w = w.T if dims[f"{name}/{kind}"] == "oi" else w.reshape(x.shape[-1], -1)
        a, b = ab["a"].reshape(x.shape[-1], 2), ab["b"].reshape(2, -1)
        x = x @ w + SCALE * ((x @ a) @ b) + bias.reshape(-1)
        x = jax.nn.relu(x) if name == "up" else x
    if "norm" in params:  # training statistics
        x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5) * params["norm"]["scale"] + params["norm"][
            "bias"
        ]
    return jnp.mean((x - batch["x"][:, ::-1]) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_module_in_its_own_idiom_trains_as_by_hand(name):
    make, ranks, dims = MODELS[name]
    model = make()
    lora = sk.lora(model.init, model.loss_fn, ranks, alpha=2 * SCALE, batch=BATCH)
    assert {one.leaf.path: one.dims for one in lora.adapted} == dims
    strategy = sk.Strategy(params=sk.shard_largest("fsdp", min_size=0), batch=P(("data", "fsdp")))
    step = sk.StepSpec(
        loss_fn=lora.loss_fn, init=lora.init, batch=BATCH, optimizer=SGD, strategy=strategy
    ).compile(sk.MeshSpec(data=2, fsdp=4).build())
    state = step.init(jax.random.key(0))
    params = jax.tree.map(np.asarray, state.params)
    lora_params = params["lora"]
    for _ in range(3):
        value, gradient = jax.value_and_grad(
            lambda p: plain_forward({**params, "lora": p}, BATCH, dims)
        )(lora_params)
        state, metrics = step(state, BATCH)
        assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
        lora_params = jax.tree.map(lambda p, g: p - 0.05 * g, lora_params, gradient)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        state.params["lora"],
        lora_params,
    )
    merged = lora.merge(state.params)
    module = model.bind(merged, *((state.model_state,) if state.model_state else ()))
    assert callable(module)
