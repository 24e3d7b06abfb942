"""Models as each library writes them, through an adapter, against the library's own training."""

import itertools

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
BATCH = {
    "x": RNG.normal(size=(8, 6)).astype(np.float32),
    "y": RNG.integers(0, 4, 8).astype(np.int32),
}
STRATEGY = sk.strategies.data() | sk.strategies.tensor()


@pytest.fixture(scope="module")
def mesh():
    return sk.MeshSpec(data=2, tensor=4).build()


def cross_entropy(logits, batch):
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    return loss, {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}


def compiled(model, mesh, strategy=STRATEGY, **options):
    return sk.compile_step(
        model.loss_fn,
        optax.sgd(0.1, momentum=0.9),
        init=model.init,
        batch=BATCH,
        mesh=mesh,
        strategy=strategy,
        **options,
    )


class LinenNet(nn.Module):
    """A linen model in the ordinary style: batch norm, dropout, a `train` flag."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, x, train: bool):
        dense = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        x = nn.Dense(16, kernel_init=dense)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(self.rate, deterministic=not train)(nn.relu(x))
        return nn.Dense(4)(x)


def linen_model(rate=0.5):
    return sk.from_linen(
        LinenNet(rate), cross_entropy, BATCH, train={"train": True}, evaluate={"train": False}
    )


# A plain layer carries no names: what the tables do not decide is replicated.
LINEN = sk.Strategy(
    params=sk.first_match(sk.AxisRules({"embed": None, "mlp": "tensor"}), sk.REPLICATED),
    batch=P("data"),
)


def test_a_linen_model_trains_as_flax_trains_it(mesh):
    model = linen_model(rate=0.0)
    step = compiled(model, mesh, LINEN)
    state = step.init(jax.random.key(0))
    kernel = state.params["Dense_0"]["kernel"]
    assert kernel.sharding.spec == P(None, "tensor")
    assert state.opt_state[0].trace["Dense_0"]["kernel"].sharding.spec == P(None, "tensor")

    def copy(tree):
        return jax.tree.map(lambda x: np.asarray(jnp.copy(x)), tree)

    params, stats = copy(state.params), copy(state.model_state)

    @jax.jit
    def plain(params, stats):
        def loss(params):
            logits, changed = LinenNet(0.0).apply(
                {"params": params, **stats}, BATCH["x"], train=True, mutable=["batch_stats"]
            )
            return cross_entropy(logits, BATCH)[0], changed

        (value, changed), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, changed, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    value, changed, updated = plain(params, stats)
    after, metrics = step(state, BATCH)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert 0 <= float(metrics["accuracy"]) <= 1
    for got, want in ((after.params, updated), (after.model_state, changed)):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)
    evaluated = step.evaluate(after, BATCH)
    own = LinenNet(0.0).apply(
        {"params": copy(after.params), **copy(after.model_state)}, BATCH["x"], train=False
    )
    np.testing.assert_allclose(evaluated["loss"], cross_entropy(own, BATCH)[0], rtol=1e-5)


@pytest.mark.slow
def test_dropout_of_a_linen_model_is_on_in_training_alone(mesh):
    step = compiled(linen_model(), mesh, LINEN)
    state = step.init(jax.random.key(0))
    first = step.evaluate(state, BATCH)["loss"]
    assert float(step.evaluate(state, BATCH)["loss"]) == float(first)
    assert abs(float(step.gradients(state, BATCH)[0]["loss"]) - float(first)) > 1e-3


def test_a_linen_layer_without_names_is_an_error_under_tables_alone(mesh):
    with pytest.raises(sk.errors.ShardingError) as caught:
        compiled(linen_model(), mesh)
    text = str(caught.value)
    assert "params/Dense_1/kernel f32[16,4]" in text
    assert "params/Dense_0/kernel" not in text
    assert "sk.first_match(strategy.params, sk.REPLICATED)" in text


def test_batch_statistics_are_refused_per_gradient_shard(mesh):
    with pytest.raises(
        sk.errors.StepError, match="would give every gradient shard its own statistics"
    ):
        compiled(linen_model(), mesh, LINEN, accumulate=2)
    compiled(linen_model(), mesh, LINEN, accumulate=sk.Accumulate(2, "every"))


def test_inputs_are_picked_from_the_batch():
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            return nn.Dense(2)(x + y)

    batch = {"a": np.ones((8, 4), np.float32), "b": np.ones((8, 4), np.float32)}
    ways = (["a", "b"], lambda batch: (batch["a"], batch["b"]))
    shapes = [
        jax.eval_shape(
            sk.from_linen(Pair(), lambda y, b: y.mean(), batch, inputs=way).init, jax.random.key(0)
        )
        for way in ways
    ]
    assert shapes[0] == shapes[1]


class NnxNet(nnx.Module):
    """An nnx model in the ordinary style: list of layers, batch norm, dropout, names on some."""

    def __init__(self, rngs, rate=0.5):
        named = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
        self.first = nnx.Linear(6, 16, kernel_init=named, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)])

    def __call__(self, x):
        x = self.drop(nnx.relu(self.norm(self.first(x))))
        for layer in self.layers:
            x = layer(x)
        return x


def nnx_model(rate=0.5):
    return sk.from_nnx(
        lambda rngs: NnxNet(rngs, rate), lambda net, batch: cross_entropy(net(batch["x"]), batch)
    )


def test_an_nnx_model_trains_as_flax_trains_it(mesh):
    model = nnx_model(rate=0.0)
    step = compiled(model, mesh, LINEN)
    state = step.init(jax.random.key(0))
    assert state.params["first"]["kernel"].sharding.spec == P(None, "tensor")
    assert set(state.params["layers"]) == {"0", "1"}
    assert set(state.model_state["norm"]) == {"mean", "var"}
    host = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(jnp.copy(x))), (state.params, state.model_state)
    )
    net = model.bind(*host)
    net.train()
    optimizer = nnx.Optimizer(net, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    value, grads = nnx.value_and_grad(lambda n: cross_entropy(n(BATCH["x"]), BATCH)[0])(net)
    optimizer.update(net, grads)

    after, metrics = step(state, BATCH)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    pairs = [
        (after.params["first"]["kernel"], net.first.kernel),
        (after.params["layers"]["1"]["bias"], net.layers[1].bias),
        (after.params["norm"]["scale"], net.norm.scale),
        (after.model_state["norm"]["mean"], net.norm.mean),
        (after.model_state["norm"]["var"], net.norm.var),
    ]
    for got, want in pairs:
        np.testing.assert_allclose(got, want[...], rtol=1e-4, atol=1e-6)


class Tables(nnx.Module):
    """Arrays without a variable: tables, a mask of numpy's, random features, in lists and dicts."""

    def __init__(self, rngs):
        self.dense = nnx.WeightNorm(nnx.Linear(6, 6, rngs=rngs), rngs=rngs)
        self.table = jnp.cos(jnp.arange(6.0))
        self.mask = np.tril(np.ones((6, 6), bool))
        self.features = nnx.List([jax.random.normal(rngs.params(), (6, 4)), 0.5])

    def __call__(self, x):
        features, scale = self.features
        return scale * (self.dense(x) * self.table) @ jnp.where(self.mask, 1.0, 0.0) @ features


@pytest.mark.parametrize("mode", [pytest.param("auto", marks=pytest.mark.slow), "shard_map"])
def test_arrays_of_an_nnx_module_without_a_variable_are_state(mode):
    model = sk.from_nnx(Tables, lambda net, batch: cross_entropy(net(batch["x"]), batch))
    mesh = sk.MeshSpec(data=2).build(devices=jax.devices()[:2])
    data = sk.Strategy(params=sk.REPLICATED, batch=P("data"))
    step = compiled(model, mesh, data, mode=mode, accumulate=2)
    state = step.init(jax.random.key(0))
    params, model_state = jax.tree.map(np.asarray, (state.params, state.model_state))
    assert {"table", "mask", "features"} <= set(model_state)
    dense = params["dense"]["layer_instance"]
    table, mask, features = model_state["table"], model_state["mask"], model_state["features"]["0"]

    def by_hand(dense):
        kernel = dense["kernel"] / jnp.linalg.norm(dense["kernel"], axis=0)
        y = (BATCH["x"] @ kernel + dense["bias"]) * table
        return cross_entropy(0.5 * y @ mask.astype("f") @ features, BATCH)[0]

    expected, gradient = jax.value_and_grad(by_hand)(dense)
    after, metrics = step(state, BATCH)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, dense, gradient)
    for got, want in zip(
        jax.tree.leaves(after.params["dense"]["layer_instance"]),
        jax.tree.leaves(moved),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_array_equal(after.model_state["features"]["0"], features)
    with pytest.raises(sk.ShardkitError, match=r"bind\(state.params, state.model_state\)"):
        model.bind(params)


def test_dropout_of_an_nnx_model_is_on_in_training_and_fresh_each_step(mesh):
    step = compiled(nnx_model(), mesh, LINEN)
    state = step.init(jax.random.key(0))
    quiet = float(step.evaluate(state, BATCH)["loss"])
    assert float(step.evaluate(state, BATCH)["loss"]) == quiet
    assert abs(float(step.gradients(state, BATCH)[0]["loss"]) - quiet) > 1e-3


def test_the_bound_module_is_the_model_in_evaluation_mode(mesh):
    model = nnx_model()
    made = model.init(jax.random.key(0))
    params = jax.tree.map(
        lambda x: x.value if isinstance(x, sk.WithAxes) else x,
        made.params,
        is_leaf=lambda x: isinstance(x, sk.WithAxes),
    )
    net = model.bind(params, made.model_state)
    np.testing.assert_array_equal(net(BATCH["x"]), net(BATCH["x"]))


def test_layers_stacked_by_nnx_keep_the_names_of_their_dims(mesh):
    class Stacked(nnx.Module):
        def __init__(self, rngs):
            named = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))

            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
            def stack(rngs):
                return nnx.Linear(6, 6, kernel_init=named, use_bias=False, rngs=rngs)

            self.layers = stack(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def forward(x, layer):
                return jnp.tanh(layer(x))

            return forward(x, self.layers)

    model = sk.from_nnx(Stacked, lambda net, batch: (net(batch["x"]) ** 2).mean())
    step = compiled(
        model, sk.MeshSpec(data=4, tensor=2).build(), sk.strategies.data() | sk.strategies.tensor()
    )
    assert step.layout.axes == {"layers/kernel": ("layers", "embed", "mlp")}
    assert step.shardings.params["layers"]["kernel"].spec == P(None, None, "tensor")
    state, metrics = step(step.init(jax.random.key(0)), BATCH)
    assert np.isfinite(metrics["loss"])
    assert state.params["layers"]["kernel"].shape == (3, 6, 6)


def test_a_loss_may_take_the_key():
    model = sk.from_nnx(
        lambda rngs: nnx.Linear(6, 4, rngs=rngs),
        lambda net, batch, key: (net(batch["x"]) * jax.random.normal(key, (4,))).mean(),
    )
    params = model.init(jax.random.key(0))
    first, second = (model.loss_fn(params, BATCH, jax.random.key(i))[0] for i in (1, 2))
    assert float(first) != float(second)


# --- names shorter than the rank


class LinenBlock(nn.Module):
    """A transformer block as flax's own examples name it: attention kernels by two names of three.

    A kernel is f32[embed, heads, head_dim], or f32[heads, head_dim, embed].
    """

    @nn.compact
    def __call__(self, tokens):
        def named(*names):
            return nn.with_logical_partitioning(nn.initializers.normal(0.5), names)

        x = nn.Embed(16, 8, embedding_init=named("vocab", "embed"))(tokens)
        y = nn.LayerNorm(scale_init=named("embed"))(x)
        attention = nn.MultiHeadDotProductAttention(
            num_heads=4, kernel_init=named("embed", "kv"), use_bias=False
        )
        x = x + attention(y, mask=nn.make_causal_mask(tokens))
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        h = nn.relu(nn.Dense(16, kernel_init=named("embed", "mlp"))(x))
        h = nn.with_logical_constraint(h, ("batch", "length", "mlp"))
        return x + nn.Dense(8, kernel_init=named("mlp", "embed"))(h)


TOKENS = {"tokens": RNG.integers(0, 16, (8, 4)).astype(np.int32)}


def tokens_model():
    return sk.from_linen(LinenBlock(), lambda y, _: (y**2).mean(), TOKENS, inputs="tokens")


@pytest.mark.slow
def test_names_shorter_than_the_rank_are_padded_as_jax_pads_a_spec():
    both = (sk.strategies.fsdp() | sk.strategies.tensor()).with_names(params={"kv": None})
    model, mesh = tokens_model(), sk.MeshSpec(fsdp=2, tensor=4).build()
    spec = sk.StepSpec(
        loss_fn=model.loss_fn,
        optimizer=optax.sgd(0.1),
        init=model.init,
        batch=TOKENS,
        strategy=both,
        accumulate=2,
    )
    step = spec.compile(mesh)
    state = step.init(jax.random.key(0))
    kernels = state.params["MultiHeadDotProductAttention_0"]
    assert kernels["query"]["kernel"].sharding.spec == P("fsdp")
    assert kernels["out"]["kernel"].sharding.spec == P("fsdp")
    assert state.params["Dense_0"]["kernel"].sharding.spec == P("fsdp", "tensor")

    def loss(params):
        return (LinenBlock().apply({"params": params}, TOKENS["tokens"]) ** 2).mean()

    expected, grads = jax.value_and_grad(loss)(jax.device_get(state.params))
    metrics, seen = step.gradients(state, TOKENS)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), seen, grads)


def test_a_name_that_no_table_lists_is_still_an_error():
    model = tokens_model()
    with pytest.raises(sk.errors.ShardingError) as raised:
        sk.compile_step(
            model.loss_fn,
            optax.sgd(0.1),
            init=model.init,
            batch=TOKENS,
            mesh=sk.MeshSpec(fsdp=8).build(),
            strategy=sk.strategies.fsdp(),
        )
    assert "query/kernel f32[8,4,2]" in str(raised.value)
    assert "'kv'" in str(raised.value)


class Constrained(nn.Module):
    """A module that constrains by a bare spec, which flax cannot initialise without a mesh."""

    @nn.compact
    def __call__(self, x):
        x = jax.lax.with_sharding_constraint(nn.Dense(8)(x), P("data", "tensor"))
        return nn.with_logical_constraint(x, ("batch", "mlp"))


def test_a_linen_module_with_a_bare_spec_needs_no_mesh_before_it_is_compiled(mesh):
    model = sk.from_linen(Constrained(), lambda y, batch: (y**2).mean(), BATCH)
    replicated = sk.Strategy(
        batch=P("data"), activations=sk.AxisRules({"batch": "data", "mlp": "tensor"})
    )
    step = compiled(model, mesh, replicated)
    state = step.init(jax.random.key(0))
    dense = jax.device_get(state.params["Dense_0"])
    y = BATCH["x"] @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(step.evaluate(state, BATCH)["loss"], (y**2).mean(), rtol=1e-5)


class SowingNet(nn.Module):
    """Its mode is a field of its config, and it sows a loss and what it computed."""

    deterministic: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        self.sow("losses", "size", 0.1 * jnp.mean(x**2))
        self.sow("intermediates", "hidden", x)
        x = nn.Dropout(0.5, deterministic=self.deterministic)(x)
        return nn.Dense(4)(x)


def with_sown_loss(outputs, batch):
    logits, sown = outputs
    loss, metrics = cross_entropy(logits, batch)
    hidden = jnp.mean(sown["intermediates"]["hidden"][0])
    return loss + sum(jax.tree.leaves(sown["losses"])), {**metrics, "hidden": hidden}


def test_linen_evaluation_module_and_sown_collections(mesh):
    model = sk.from_linen(
        SowingNet(),
        with_sown_loss,
        BATCH,
        evaluate=SowingNet(deterministic=True),
        mutable=("losses", "intermediates"),
    )
    step = compiled(model, mesh, sk.Strategy(params=sk.REPLICATED, batch=P("data")))
    state = step.init(jax.random.key(0))
    assert state.model_state == {}
    params = jax.tree.map(np.asarray, state.params)
    hidden = BATCH["x"] @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    logits = hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    expected = cross_entropy(logits, BATCH)[0] + 0.1 * np.mean(hidden**2)
    metrics = step.evaluate(state, BATCH)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["hidden"], hidden.mean(), rtol=1e-5)
    dropped = step(state, BATCH)[1]["loss"]
    assert abs(float(dropped) - expected) > 1e-3


def test_linen_what_the_loss_would_never_see_is_refused():
    with pytest.raises(sk.errors.StepError) as raised:
        sk.from_linen(SowingNet(), cross_entropy, BATCH)
    text = str(raised.value)
    assert "losses/size/0 f32[]  is sown, and the loss never sees it" in text
    assert "from_linen(..., mutable=('losses',))" in text
    with pytest.raises(sk.errors.StepError) as raised:
        sk.from_linen(nn.Dense(4), cross_entropy, BATCH, evaluate=nn.Dense(5))
    assert "params/kernel  is f32[6,4] in training, f32[6,5] in evaluation" in str(raised.value)


def test_linen_shards_of_a_products_weight_are_refused(mesh):
    """A linen layer fixes the sizes of its parameters, so it cannot take one device's heads."""

    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x):
            named = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "heads", None))
            x = sk.nn.constrain(x, "batch", "embed", into=("heads",))
            x = nn.DenseGeneral((4, 2), kernel_init=named, use_bias=False)(x)
            return sk.nn.psum(x.sum((1, 2)), "heads")

    model = sk.from_linen(Heads(), lambda y, batch: jnp.mean(y**2), BATCH)
    with pytest.raises(sk.errors.StepError) as raised:
        compiled(model, mesh, mode="shard_map")
    text = str(raised.value)
    assert "shape (6, 4, 2)" in text
    assert "shape (6, 1, 2)" in text
    assert 'mode="auto"' in text


@pytest.mark.parametrize("mode", ["auto", "shard_map"])
def test_linen_dense_general_with_names_over_fsdp(mode):
    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x):
            def named(*names):
                return nn.with_partitioning(nn.initializers.lecun_normal(), names)

            x = nn.DenseGeneral((4, 2), kernel_init=named("embed", "heads", None))(x)
            kernel = named("heads", None, "embed")
            return nn.DenseGeneral(6, axis=(-2, -1), kernel_init=kernel)(jnp.tanh(x))

    def loss(y, batch):
        return jnp.mean((y - batch["x"]) ** 2)

    model = sk.from_linen(Heads(), loss, BATCH)
    strategy = sk.first_match(sk.AxisRules({"embed": "fsdp", "heads": None}), sk.REPLICATED)
    strategy = sk.Strategy(params=strategy, batch=P(("data", "fsdp")))
    step = compiled(model, sk.MeshSpec(data=4, fsdp=2).build(), strategy, mode=mode)
    state = step.init(jax.random.key(0))
    params = jax.tree.map(np.asarray, state.params)
    assert state.params["DenseGeneral_0"]["kernel"].sharding.spec == P("fsdp")

    def by_hand(params):
        one, two = params["DenseGeneral_0"], params["DenseGeneral_1"]
        x = jnp.tanh(jnp.einsum("be,ehd->bhd", BATCH["x"], one["kernel"]) + one["bias"])
        return loss(jnp.einsum("bhd,hde->be", x, two["kernel"]) + two["bias"], BATCH)

    expected, gradients = jax.value_and_grad(by_hand)(params)
    state, metrics = step(state, BATCH)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.SpectralNorm(nn.Dense(8))(x, update_stats=train)
        return nn.Dense(8)(jnp.tanh(x))


class NnxSpectral(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.SpectralNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs)
        self.down = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x, update_stats=True)))


@pytest.mark.parametrize(
    ("framework", "axis"),
    some_quick(
        itertools.product(["linen", "nnx"], ["data", "fsdp"]), ("linen", "data"), ("nnx", "fsdp")
    ),
)
def test_state_that_no_row_decides_is_that_of_one_device_on_shards(framework, axis):
    batch = {"x": np.random.default_rng(0).normal(size=(16, 8)).astype("f")}

    def loss(y, batch):
        return ((y - batch["x"]) ** 2).mean()

    def train(devices, **options):
        if framework == "linen":
            model = sk.from_linen(Spectral(), loss, batch)
        else:
            model = sk.from_nnx(NnxSpectral, lambda m, batch: loss(m(batch["x"]), batch))
        step = sk.compile_step(
            model.loss_fn,
            optax.sgd(0.1),
            init=model.init,
            batch=batch,
            mesh=sk.MeshSpec(**{axis: devices}).build(devices=jax.devices()[:devices]),
            strategy=sk.strategies.data()
            if axis == "data"
            else sk.Strategy(params=sk.shard_largest("fsdp", min_size=1), batch=P("fsdp")),
            **options,
        )
        state = step.init(jax.random.key(0))
        for _ in range(3):
            state, metrics = step(state, batch)
        return jax.device_get((metrics["loss"], state.params, state.model_state))

    seen, wanted = train(4, mode="shard_map"), train(1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), seen, wanted)
