"""State of any optax chain: laid out as its parameters, kept so, and equal to one device's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.step import moment_spec
from shardkit.step._layout import resolve_layout

from ._quick import some_quick

SPECS = {
    "up/kernel": P("data", "tensor"),
    "up/bias": P("tensor"),
    "down/kernel": P("tensor", "data"),
    "down/bias": P(),
    "square": P("data", "tensor"),
    "stack": P(None, "data", "tensor"),
}
STRATEGY = sk.Strategy(params=sk.PathRules(SPECS), batch=P("data"))
BATCH = {
    "x": np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32),
    "y": np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32),
}
COMPILES = []


def _listen(event, duration, **_):
    if "backend_compile" in event:
        COMPILES.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


def init(key):
    def draw(*shape):  # a program without random bits compiles in a tenth of the time
        return jnp.sin(1.0 + 7.0 * jnp.arange(np.prod(shape))).reshape(shape) / shape[-1] ** 0.5

    return {
        "up": {"kernel": draw(16, 8), "bias": jnp.full(8, 0.1)},
        "square": draw(8, 8),
        "stack": draw(3, 8, 8),
        "down": {"kernel": draw(8, 16), "bias": jnp.zeros(16)},
    }


def loss_fn(params, batch, key):
    h = jnp.tanh(batch["x"] @ params["up"]["kernel"] + params["up"]["bias"])
    h = jnp.tanh(h @ params["square"])
    for layer in params["stack"]:
        h = h + jnp.tanh(h @ layer)
    return jnp.mean((h @ params["down"]["kernel"] + params["down"]["bias"] - batch["y"]) ** 2)


def is_matrix(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def by_rank(params):
    return jax.tree.map(lambda p: "matrices" if p.ndim > 1 else "rest", params)


CHAINS = {
    "adamw": optax.adamw(1e-2),
    "sgd_momentum": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4, momentum=0.9),
    "lion": optax.lion(1e-3),
    "multi_transform": optax.multi_transform(
        {"matrices": optax.adam(1e-2), "rest": optax.sgd(1e-2, momentum=0.9)}, by_rank
    ),
    "masked": optax.masked(optax.adam(1e-2), is_matrix),
    "multi_steps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-2), 3),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(
        optax.linear_schedule(1e-2, 1e-3, 10)
    ),
    "clip": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1e-1)),
    "muon": optax.contrib.muon(1e-2),
    "schedule_free": optax.contrib.schedule_free(optax.sgd(1e-2), 1e-2, b1=0.9),
    "chain": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(mu_dtype=jnp.bfloat16),
        optax.add_decayed_weights(1e-2, is_matrix),
        optax.ema(0.9),
        optax.scale_by_schedule(optax.cosine_decay_schedule(1e-2, 100)),
        optax.scale(-1.0),
    ),
    "reduce_on_plateau": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)),
}


@dataclasses.dataclass(frozen=True)
class Trained:
    name: str
    step: sk.CompiledStep
    start: tuple
    states: list
    metrics: list
    compiles: list


@pytest.fixture(scope="module")
def mesh():
    return sk.MeshSpec(data=2, tensor=4).build()


# One of each sort: plain moments, factored ones, sums over steps, orthogonal updates.
QUICK = ("adamw", "adafactor", "multi_steps", "muon")


@pytest.fixture(scope="module", params=some_quick(CHAINS, *QUICK))
def trained(request, mesh):
    """A step of one chain, its states before and after three updates, and what they cost."""
    optimizer = CHAINS[request.param]
    step = sk.compile_step(loss_fn, optimizer, init=init, batch=BATCH, mesh=mesh, strategy=STRATEGY)
    state = step.init(jax.random.key(0))
    # A copy: NumPy's view of a buffer would keep it from being donated.
    start = jax.tree.map(lambda x: np.asarray(jnp.copy(x)), (state.params, state.opt_state))
    states, seen, compiles = [state], [], []
    for _ in range(3):
        before = len(COMPILES)
        state, metrics = step(state, BATCH)
        compiles.append(len(COMPILES) - before)
        states.append(state)
        seen.append(metrics)
    return Trained(request.param, step, start, states, seen, compiles)


def specs(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (x.shape, x.sharding.spec)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_every_leaf_lives_where_its_parameter_does(trained):
    owners = specs(trained.states[-1].params)
    assert {path: spec for path, (_, spec) in owners.items()} == SPECS
    shapes = specs(trained.states[-1].opt_state)
    owned = 0
    for path, (shape, spec) in shapes.items():
        owner = max((p for p in owners if path.endswith("/" + p)), key=len, default=None)
        if owner is None or not shape:
            assert int(np.prod(shape)) <= 16, path
            assert spec == P(), path
        elif shape == owners[owner][0]:
            assert spec == owners[owner][1], path
            owned += 1
    assert owned or trained.name == "clip"


def test_the_state_keeps_its_layout_and_nothing_is_compiled_again(trained):
    declared = jax.tree.map(lambda s: s.spec, trained.step.shardings)
    for state in trained.states:
        assert jax.tree.map(lambda x: x.sharding.spec, state) == declared
    assert trained.compiles[1:] == [0, 0]


def test_every_donated_buffer_is_gone(trained):
    for state in trained.states[:-1]:
        assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves(trained.states[-1]))


def test_values_equal_a_plain_loop_on_one_device(trained):
    params, opt_state = trained.start
    optimizer = CHAINS[trained.name]

    @jax.jit
    def plain(params, opt_state):
        loss, grads = jax.value_and_grad(loss_fn)(params, BATCH, None)
        update = optax.with_extra_args_support(optimizer).update
        updates, opt_state = update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state, loss, optax.tree.norm(grads)

    for ours in trained.metrics:
        params, opt_state, loss, norm = plain(params, opt_state)
        np.testing.assert_allclose(ours["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(ours["grad_norm"], norm, rtol=1e-5)
    got, want = (trained.states[-1].params, trained.states[-1].opt_state), (params, opt_state)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = np.abs(b).max(initial=1e-30)
        assert np.abs(a - b).max(initial=0) <= 3e-5 * scale, jax.tree_util.keystr(path)


def layout_of(optimizer, mesh, init=init, strategy=STRATEGY):
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), BATCH)
    spec = sk.StepSpec(
        loss_fn=loss_fn, optimizer=optimizer, init=init, batch=batch, strategy=strategy
    )
    return resolve_layout(spec, mesh)


def opt_specs(optimizer, mesh, **given):
    layout = layout_of(optimizer, mesh, **given)
    found = jax.tree_util.tree_leaves_with_path(layout.shardings.opt_state)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): s.spec for p, s in found}


def test_factored_moments_keep_the_axes_of_the_dims_they_keep(mesh):
    found = opt_specs(CHAINS["adafactor"], mesh)
    assert found["0/v_row/up/kernel"] == P("tensor")  # f32[8] of f32[16, 8], dim 0 dropped
    assert found["0/v_col/up/kernel"] == P("data")
    assert found["0/v_row/down/kernel"] == P("tensor")
    assert found["0/v_col/down/kernel"] == P("data")
    # Of a square matrix nothing tells which dim was dropped; either way it stays split.
    assert found["0/v_row/square"] != P()
    assert found["0/v_col/stack"] != P()
    assert found["0/v/square"] == P()


@pytest.mark.parametrize(
    ("shape", "param", "spec", "derived"),
    [
        ((16, 8), (16, 8), P("data", "tensor"), P("data", "tensor")),
        ((16,), (16, 8), P("data", "tensor"), P("data")),
        ((8, 8), (8, 8, 8), P(None, "data", "tensor"), P("data", "tensor")),
        ((1,), (16, 8), P("data", "tensor"), P()),
        ((1, 1), (16, 8), P("data", "tensor"), P()),
        ((16, 1), (16, 8), P("data", "tensor"), P("data")),
        ((1, 8), (16, 8), P("data", "tensor"), P(None, "tensor")),
        ((1, 8), (1, 8), P(None, "tensor"), P(None, "tensor")),
        ((128,), (16, 8), P("data", "tensor"), None),
        ((8, 16), (16, 8), P("data", "tensor"), None),
    ],
)
def test_dims_of_a_moment_are_matched_to_its_parameters(shape, param, spec, derived):
    assert moment_spec(shape, param, spec) == derived


def flat(sizes):
    """An optimizer that keeps one vector of all parameters: no parameter explains it."""

    def start(params):
        return {"flat": jnp.zeros(sum(x.size for x in jax.tree.leaves(params)) + sizes)}

    return optax.GradientTransformation(start, lambda grads, state, params=None: (grads, state))


def test_a_leaf_that_no_parameter_explains_is_an_error_that_names_the_declaration(mesh):
    with pytest.raises(sk.errors.ShardingError) as caught:
        layout_of(flat(1024), mesh)
    text = str(caught.value)
    assert "1 leaf cannot be laid out on mesh (data=2, tensor=4)" in text
    assert "flat f32[1560]" in text
    assert 'Strategy(opt_state=sk.PathRules({"flat": sk.REPLICATED}))' in text


def statistics(dims):
    """Keeps a square matrix for each dim of each parameter, as shampoo does."""

    def start(params):
        shapes = [x.shape for x in jax.tree.leaves(params)]
        return {"of": [[jnp.zeros((dims + n, dims + n)) for n in shape] for shape in shapes]}

    return optax.GradientTransformation(start, lambda grads, state, params=None: (grads, state))


def test_the_declaration_that_the_error_spells_is_one_that_works(mesh):
    chained = optax.chain(statistics(40), flat(1024), optax.adam(1e-3))
    declared = dataclasses.replace(STRATEGY, opt_state=sk.PathRules({"1/flat": P("data")}))
    for strategy in (STRATEGY, declared):
        with pytest.raises(sk.errors.ShardingError) as caught:
            layout_of(chained, mesh, strategy=strategy)
        fix = str(caught.value).partition("Fix: ")[2].partition(", or a spec for each")[0]
        names = {"sk": sk, "strategy": strategy}
        if fix.startswith("opt_state="):
            right = dataclasses.replace(strategy, opt_state=eval(fix.partition("=")[2], names))
        else:
            right = eval(fix, names)
        found = opt_specs(chained, mesh, strategy=right)
        assert found["0/of/1/1"] == P()
        assert found["1/flat"] == (P("data") if strategy is declared else P())
        assert found["2/0/mu/up/kernel"] == P("data", "tensor")


def test_model_state_that_no_rule_decides_is_declared_by_its_own_rule(mesh):
    strategy = dataclasses.replace(
        STRATEGY, model_state=sk.PathRules({"mean": P()}, allow_unmatched=True)
    )
    with pytest.raises(sk.errors.ShardingError) as caught:
        layout_of(
            optax.sgd(0.1),
            mesh,
            lambda key: sk.Variables(init(key), {"var": jnp.ones((16, 8))}),
            strategy,
        )
    assert "Fix: model_state=sk.first_match(strategy.model_state, sk.REPLICATED)" in str(
        caught.value
    )


def test_the_declared_rule_decides_first_and_what_it_passes_follows(mesh):
    rules = sk.PathRules({"0/flat": P("data")})
    chained = optax.chain(flat(1024), optax.adam(1e-3))
    found = opt_specs(chained, mesh, strategy=dataclasses.replace(STRATEGY, opt_state=rules))
    assert found["0/flat"] == P("data")
    assert found["1/0/mu/up/kernel"] == P("data", "tensor")


def test_a_small_table_is_replicated(mesh):
    table = optax.GradientTransformation(
        lambda params: jnp.zeros((10, 100)), lambda grads, state, params=None: (grads, state)
    )
    assert opt_specs(table, mesh) == {"": P()}


def test_parameters_whose_paths_end_alike_keep_their_own_moments(mesh):
    def made(key):
        return {"w": jnp.ones((16, 8)), "mu": {"w": jnp.ones((16, 8))}, "nu": jnp.ones((16, 8))}

    rules = sk.PathRules({"w": P("data"), "mu/w": P("tensor"), "nu": P(None, "tensor")})
    own = sk.Strategy(params=rules, batch=P("data"))
    found = opt_specs(optax.adam(1e-3), mesh, init=made, strategy=own)
    assert found == {
        "0/count": P(),
        **{f"0/{m}/w": P("data") for m in ("mu", "nu")},
        **{f"0/{m}/mu/w": P("tensor") for m in ("mu", "nu")},
        **{f"0/{m}/nu": P(None, "tensor") for m in ("mu", "nu")},
    }


def test_a_bare_array_has_its_moments_beside_it(mesh):
    own = sk.Strategy(params=sk.PathRules({"**": P("data", "tensor")}), batch=P("data"))
    found = opt_specs(optax.adam(1e-3), mesh, init=lambda key: jnp.ones((16, 8)), strategy=own)
    assert found == {"0/count": P(), "0/mu": P("data", "tensor"), "0/nu": P("data", "tensor")}
