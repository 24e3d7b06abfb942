"""A compiled step: what it holds, what it returns, and that it is what was declared."""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.nn._remat import parse_policy, use_policy
from shardkit.step._bound_spec import BoundSpec
from shardkit.step._layout import resolve_layout
from shardkit.step._readback import aliased_arguments, check_executable
from shardkit.step._saved_programs import KeptProgram
from shardkit.step._step_functions import StepFunctions

X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
BATCH = {"x": X, "y": X[:, :1].copy()}
RULES = sk.PathRules({"up": P(None, "tensor"), "down": P("tensor")})
STRATEGY = sk.Strategy(params=RULES, batch=P("data"))


@pytest.fixture(scope="module")
def mesh():
    return sk.MeshSpec(data=2, tensor=4).build()


def init(key):
    up, down = jax.random.split(key)
    return {"up": jax.random.normal(up, (4, 8)), "down": jax.random.normal(down, (8, 1))}


def loss_fn(params, batch, key):
    return jnp.mean((jnp.tanh(batch["x"] @ params["up"]) @ params["down"] - batch["y"]) ** 2)


def declared(mesh, loss=loss_fn, optimizer=None, **given):
    options = {"init": init, "batch": BATCH, "strategy": STRATEGY, **given}
    return sk.compile_step(loss, optimizer or optax.sgd(0.1), mesh=mesh, **options)


@pytest.fixture(scope="module")
def step(mesh):
    return declared(mesh, optimizer=optax.sgd(0.1, momentum=0.9))


def test_the_first_state_is_bitwise_the_same_on_every_mesh(step):
    def bits(made):
        state = made.init(jax.random.key(5))
        return jax.tree.map(np.asarray, (state.params, jax.random.key_data(state.key)))

    for sizes in ({"data": 8, "tensor": 1}, {"data": 1, "tensor": 8}):
        other = declared(sk.MeshSpec(**sizes).build(), optimizer=optax.sgd(0.1, momentum=0.9))
        jax.tree.map(np.testing.assert_array_equal, bits(step), bits(other))


def test_evaluation_is_the_loss_before_the_update_and_keeps_the_state(step):
    state = step.init(jax.random.key(0))
    metrics = step.evaluate(state, BATCH)
    again, grads = step.gradients(state, BATCH)
    assert sorted(metrics) == ["loss"]
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))
    plain = jax.grad(lambda p: loss_fn(p, BATCH, None))(jax.device_get(state.params))
    after, updated = step(state, BATCH)
    np.testing.assert_allclose(metrics["loss"], updated["loss"], rtol=1e-6)
    np.testing.assert_allclose(again["grad_norm"], updated["grad_norm"], rtol=1e-6)
    np.testing.assert_allclose(updated["grad_norm"], optax.tree.norm(plain), rtol=1e-6)
    for name, grad in grads.items():
        assert grad.sharding == step.shardings.params[name]
        np.testing.assert_allclose(grad, plain[name], rtol=1e-5, atol=1e-7)
    assert int(after.step) == 1


def test_the_same_key_runs_through_every_state(step):
    state = step.init(jax.random.key(0))
    key = np.asarray(jax.random.key_data(state.key)).copy()
    after, _ = step(state, BATCH)
    np.testing.assert_array_equal(jax.random.key_data(after.key), key)


def test_metrics_of_a_loss_stand_beside_its_own(mesh):
    def with_metrics(params, batch, key):
        loss = loss_fn(params, batch, key)
        return loss, {"twice": 2 * loss, "share": sk.Mean(3.0, 4.0), "none": sk.Mean(1.0, 0.0)}

    made = declared(mesh, with_metrics)
    _, metrics = made(made.init(jax.random.key(0)), BATCH)
    assert sorted(metrics) == ["grad_norm", "loss", "none", "share", "twice"]
    np.testing.assert_allclose(metrics["twice"], 2 * metrics["loss"], rtol=1e-6)
    assert float(metrics["share"]) == 0.75
    assert float(metrics["none"]) == 0
    assert all(value.shape == () for value in metrics.values())


def test_a_fresh_draw_every_step_and_the_same_one_on_a_second_run(mesh):
    def noisy(params, batch, key):
        return loss_fn(params, batch, key) + jax.random.normal(key)

    made = declared(mesh, noisy, optax.sgd(0.0))

    def losses():
        state, seen = made.init(jax.random.key(0)), []
        for _ in range(3):
            state, metrics = made(state, BATCH)
            seen.append(float(metrics["loss"]))
        return seen

    first = losses()
    assert len(set(first)) == 3
    assert losses() == first


# What is read back from the executable


def checked(program, step):
    check_executable(program.compiled, step.layout)


def test_an_executable_with_other_layouts_is_reported_by_leaf(step, mesh):
    replicated = declared(
        mesh,
        optimizer=optax.sgd(0.1, momentum=0.9),
        strategy=dataclasses.replace(STRATEGY, params=sk.REPLICATED),
    )
    checked(step.program, step)
    with pytest.raises(sk.errors.ShardingError) as caught:
        checked(replicated.program, step)
    text = str(caught.value)
    for leaf in ("state/params/up", "state/opt_state/0/trace/down", "new state/params/up"):
        assert leaf in text
    assert "declared P(None, 'tensor'), compiled as" in text
    assert "batch/x" not in text


def test_an_executable_with_the_batch_elsewhere_is_reported(step, mesh):
    other = declared(
        mesh,
        optimizer=optax.sgd(0.1, momentum=0.9),
        strategy=dataclasses.replace(STRATEGY, batch=P("tensor")),
    )
    with pytest.raises(
        sk.errors.ShardingError, match=r"batch/x +declared P\('data'.*\), compiled as"
    ):
        checked(other.program, step)


def test_a_leaf_that_is_not_donated_is_reported(step):
    run = jax.jit(
        lambda state, batch: (state, {}),
        in_shardings=(step.shardings, step.batch_shardings),
        out_shardings=(step.shardings, {}),
        keep_unused=True,
    )
    program = run.lower(step.abstract_state, step.layout.batch).compile()
    with pytest.raises(sk.errors.ShardingError) as caught:
        checked(dataclasses.replace(step.program, _made=KeptProgram(program, "")), step)
    text = str(caught.value)
    assert re.search(
        r"state/params/up +is donated, but no result reuses its buffer; new state/params/up should",
        text,
    )
    assert "state/key" in text


def test_aliases_are_read_from_the_header_of_the_program(step):
    leaves = len(jax.tree.leaves(step.abstract_state))
    assert aliased_arguments(step.hlo()) == set(range(leaves))
    header = "HloModule m, input_output_alias={ {0}: (2, {}, may-alias), {}: (0, {}, must-alias) }"
    assert aliased_arguments(header) == {0, 2}
    assert aliased_arguments("HloModule m, entry_computation_layout={()}") == set()


@pytest.mark.parametrize("spec", [P(("data", "tensor")), P(("tensor", "data")), P(None, "tensor")])
def test_layouts_over_several_axes_are_read_back(mesh, spec):
    def made(key):
        return {"w": jnp.ones((8, 8))}

    strategy = sk.Strategy(params=sk.PathRules({"w": spec}), batch=P("data"))
    got = declared(
        mesh, lambda p, b, k: (b["x"] @ p["w"][:4]).sum(), init=made, strategy=strategy
    ).init(jax.random.key(0))
    assert got.params["w"].sharding == NamedSharding(mesh, spec)


# Pytrees


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array


class Pair(NamedTuple):
    up: jax.Array
    down: jax.Array


FORMS = {
    "dataclass": (Layer, lambda p: p.kernel, "kernel"),
    "namedtuple": (Pair, lambda p: p.up, "up"),
    "list": (lambda w, b: [w, b], lambda p: p[0], "0"),
    "nested": (lambda w, b: {"a": [(w,), {"b": b}]}, lambda p: p["a"][0][0], "a/0/0"),
}


@pytest.mark.parametrize("form", FORMS)
def test_params_are_any_pytree(mesh, form):
    make, first, path = FORMS[form]

    def loss(params, batch, key):
        return jnp.mean((batch["x"] @ first(params)) ** 2)

    strategy = sk.Strategy(
        params=sk.PathRules({path: P(None, "tensor"), "**": sk.REPLICATED}), batch=P("data")
    )
    made = declared(
        mesh,
        loss,
        optax.adam(0.1),
        init=lambda key: make(jnp.ones((4, 8)), jnp.zeros(3)),
        strategy=strategy,
    )
    state, _ = made(made.init(jax.random.key(0)), BATCH)
    assert type(state.params) is type(make(1, 2))
    assert first(state.params).sharding.spec == P(None, "tensor")
    assert first(state.opt_state[0].mu).sharding.spec == P(None, "tensor")


def test_params_are_a_bare_array_and_a_batch_too(mesh):
    made = declared(
        mesh,
        lambda w, batch, key: jnp.mean((batch @ w) ** 2),
        optax.adam(0.1),
        init=lambda key: jnp.ones((4, 8)),
        batch=X,
        strategy=sk.Strategy(params=sk.PathRules({"**": P(None, "tensor")}), batch=P("data")),
    )
    state, _ = made(made.init(jax.random.key(0)), X)
    assert state.params.sharding.spec == state.opt_state[0].nu.sharding.spec == P(None, "tensor")


def test_a_plain_function_names_its_dims(mesh):
    made = declared(
        mesh,
        init=lambda key: {
            "up": sk.WithAxes(jnp.ones((4, 8)), ("embed", "mlp")),
            "down": sk.WithAxes(jnp.ones((8, 1)), ("mlp", None)),
        },
        strategy=sk.strategies.data() | sk.strategies.tensor(),
    )
    assert made.shardings.params["up"].spec == P(None, "tensor")
    assert made.shardings.params["down"].spec == P("tensor")
    assert isinstance(made.init(jax.random.key(0)).params["up"], jax.Array)


@settings(max_examples=15)
@given(data=st.data())
def test_any_tree_and_chain_is_laid_out_like_its_parameters(mesh, data):
    shapes = st.lists(st.sampled_from([4, 8, 16]), max_size=3).map(tuple)
    names = st.sampled_from(["w", "mu", "nu", "0", "bias", "count"])
    tree = data.draw(
        st.recursive(shapes.map(Shape), lambda kids: st.dictionaries(names, kids, min_size=1))
    )
    links = st.sampled_from([optax.scale_by_adam(), optax.trace(0.9), optax.clip(1.0)])
    chained = optax.chain(*data.draw(st.lists(links, min_size=1, max_size=3)))
    params = jax.tree.map(lambda s: jnp.zeros(s.dims), tree)
    spec = sk.StepSpec(
        loss_fn=loss_fn,
        optimizer=chained,
        init=lambda key: params,
        batch=BATCH,
        strategy=sk.Strategy(params=sk.shard_largest("tensor", min_size=1), batch=P("data")),
    )
    layout = resolve_layout(spec, mesh)
    assert jax.tree.structure(layout.state) == jax.tree.structure(layout.shardings)
    for part in jax.tree.leaves(layout.shardings.opt_state, is_leaf=lambda x: x is None):
        assert isinstance(part, NamedSharding)
    for kept in layout.shardings.opt_state:
        trees = [getattr(kept, name) for name in ("mu", "nu", "trace") if name in dir(kept)]
        assert all(moments == layout.shardings.params for moments in trees)


@dataclasses.dataclass(frozen=True)
class Shape:
    dims: tuple


# Precision and rematerialization


def traced(mesh, loss=loss_fn, **options):
    """StableHLO of a step that is not compiled."""
    given = {"init": init, "batch": BATCH, "strategy": STRATEGY, **options}
    keys = ("accumulate", "remat", "precision")
    d = sk.StepSpec(
        loss_fn=loss,
        optimizer=optax.sgd(0.1),
        init=given["init"],
        batch=given["batch"],
        strategy=given["strategy"],
        **{key: given[key] for key in keys if key in given},
    )
    layout = resolve_layout(d, mesh)
    run = StepFunctions(BoundSpec(d, mesh), layout).train()
    jitted = jax.jit(run, in_shardings=(layout.shardings, layout.batch_shardings))
    with use_policy(parse_policy(d.strategy.remat)):
        return jitted.lower(layout.state, layout.batch).as_text()


def low_loss(params, batch, key):
    return loss_fn(params, jax.tree.map(lambda x: x.astype(params["up"].dtype), batch), key)


def test_weights_are_cast_before_they_are_gathered(mesh):
    fsdp = sk.Strategy(params=sk.shard_largest("data", min_size=1), batch=P("data"))
    text = traced(mesh, low_loss, strategy=fsdp, precision="bfloat16")
    cast = re.search(
        r"(%\d+) = stablehlo.convert %arg\d+ .*tensor<4x8xf32>.*tensor<4x8xbf16>", text
    )
    placed = re.search(
        rf"sdy.sharding_constraint {cast.group(1)} <@mesh, \[\{{\}}, \{{\"data\"\}}\]>", text
    )
    assert placed, text
    assert re.search(r"dot_general .*tensor<8x4xbf16>, tensor<4x8xbf16>", text)
    assert not re.search(r"dot_general .*f32>", text)


@pytest.mark.parametrize(
    ("precision", "params", "rtol"),
    [
        pytest.param("float32", jnp.float32, 1e-6, marks=pytest.mark.slow),
        ("bfloat16", jnp.float32, 3e-2),
        ("pure_bfloat16", jnp.bfloat16, 3e-2),
        pytest.param(
            sk.Precision("float32", "bfloat16", "float32"),
            jnp.float32,
            3e-2,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_precision_says_what_is_kept_and_what_computes(mesh, precision, params, rtol):
    made = declared(mesh, low_loss, optax.adam(0.1), precision=precision)
    state = made.init(jax.random.key(0))
    plain = loss_fn(jax.device_get(declared_params(state)), BATCH, None)
    state, metrics = made(state, BATCH)
    kept = (state.params, state.opt_state[0].mu)
    assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype(params)}
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == jnp.float32
    np.testing.assert_allclose(metrics["loss"], plain, rtol=rtol)


def declared_params(state):
    return jax.tree.map(lambda x: x.astype(jnp.float32), state.params)


def deep_loss(params, batch, key):
    @sk.nn.remat
    def layer(x):
        return jnp.sin(checkpoint_name(x @ params["up"], "hidden")) @ params["up"].T

    return jnp.mean(layer(layer(batch["x"])) ** 2) + 0 * params["down"].sum()


def sines(text):
    return len(re.findall(r"stablehlo\.(?:sine|cosine) ", text))


def products(text):
    return len(re.findall(r"dot_general", text))


def test_marked_layers_follow_the_policy_of_the_step(mesh):
    plain, full = traced(mesh, deep_loss), traced(mesh, deep_loss, remat="full")
    assert products(full) > products(plain)
    assert sines(full) > sines(plain)
    dots = traced(mesh, deep_loss, remat="dots")
    assert products(dots) == products(plain)
    assert sines(dots) > sines(plain)
    named = traced(mesh, deep_loss, remat="save:hidden")
    assert products(named) < products(full)
    assert sines(named) > sines(plain)


@sk.nn.remat
def shared_layer(x, _):
    return jnp.sin(x), None


def test_a_layer_that_jax_has_traced_before_follows_the_policy_of_this_step(mesh):
    def loss(params, batch, key):
        x, _ = jax.lax.scan(shared_layer, batch["x"] @ params["up"], None, length=2)
        return jnp.mean(x**2) + 0 * params["down"].sum()

    texts = [traced(mesh, loss, remat=name) for name in ("none", "full", "none")]
    assert texts[0] == texts[2]
    assert "optimization_barrier" in texts[1]
    assert "optimization_barrier" not in texts[0]


def test_a_loss_without_marks_is_recomputed_as_a_whole(mesh):
    assert products(traced(mesh, remat="full")) > products(traced(mesh))


def test_recomputation_reaches_the_executable_and_changes_no_result(mesh):
    def scanned(params, batch, key):
        @lambda f: sk.nn.remat(f, scanned=True)
        def layer(x, _):
            return jnp.sin(x @ params["up"]) @ params["up"].T, None

        x, _ = jax.lax.scan(layer, batch["x"], None, length=4)
        return jnp.mean(x**2) + 0 * params["down"].sum()

    plain, full = (declared(mesh, scanned, remat=name) for name in ("none", "full"))
    assert plain.hlo().count(" sine(") < full.hlo().count(" sine(") + full.hlo().count("rematted")
    start = jax.device_get(plain.init(jax.random.key(0)).params)
    results = []
    for made in (plain, full):
        state = dataclasses.replace(made.init(jax.random.key(0)), params=start)
        after, metrics = made(jax.device_put(state, made.shardings), BATCH)
        results.append(jax.device_get((after.params, metrics)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *results)


def test_replaced_options_give_another_step(step):
    other = step.replace(accumulate=2)
    assert other.spec.accumulate.micro_batches == 2
    assert step.spec.accumulate.micro_batches == 1
    state, _ = other(other.init(jax.random.key(0)), BATCH)
    assert int(state.step) == 1


def test_the_norm_of_complex_gradients_counts_both_parts():
    x = jax.random.normal(jax.random.key(1), (16, 4), jnp.complex64)

    def loss(params, batch, key):
        return jnp.mean(jnp.abs(batch["x"] @ params["w"]) ** 2)

    step = sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=lambda key: {"w": jax.random.normal(key, (4, 4), jnp.complex64)},
        batch={"x": x},
        mesh=sk.MeshSpec(data=8).build(),
        strategy=sk.strategies.data(),
    )
    state = step.init(jax.random.key(0))
    want = np.linalg.norm(jax.grad(loss)(jax.device_get(state.params), {"x": x}, None)["w"])
    _, metrics = step(state, {"x": x})
    np.testing.assert_allclose(metrics["grad_norm"], want, rtol=1e-5)
