"""Every sampler of `jax.random`, where rows are split: as on one device, or refused with its line.

The reference is the plain loss on one device with the same key: micro-batch i of k has rows i, i+k,
… and draws from `fold_in(key of the step, i)`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk

from ._quick import some_quick
from ._tables import table

ROWS = 64
R = jax.random


def from_rows(draw):
    """A sampler of which every row draws its own."""
    return lambda key, n: draw(key, (n,))


def row_keys(draw):
    return lambda key, n: jax.vmap(draw)(R.split(key, n))


# One entry for each public sampler, under its own name: `(key, rows) -> [rows]`.
SAMPLERS = {
    "ball": lambda key, n: R.ball(key, 3, shape=(n,))[:, 0],
    "bernoulli": from_rows(lambda key, shape: R.bernoulli(key, 0.5, shape)),
    "beta": from_rows(lambda key, shape: R.beta(key, 2.0, 3.0, shape)),
    "binomial": from_rows(lambda key, shape: R.binomial(key, 10, 0.5, shape)),
    "bits": from_rows(lambda key, shape: R.bits(key, shape) >> 8),
    "categorical": from_rows(lambda key, shape: R.categorical(key, jnp.arange(5.0), shape=shape)),
    "cauchy": from_rows(R.cauchy),
    "chisquare": from_rows(lambda key, shape: R.chisquare(key, 3.0, shape=shape)),
    "choice": from_rows(lambda key, shape: R.choice(key, 10, shape)),
    "dirichlet": lambda key, n: R.dirichlet(key, jnp.ones(3), (n,))[:, 0],
    "double_sided_maxwell": from_rows(lambda key, s: R.double_sided_maxwell(key, 0.0, 1.0, s)),
    "exponential": from_rows(R.exponential),
    "f": from_rows(lambda key, shape: R.f(key, 3.0, 4.0, shape=shape)),
    "gamma": from_rows(lambda key, shape: R.gamma(key, 2.0, shape)),
    "generalized_normal": from_rows(lambda key, shape: R.generalized_normal(key, 2.0, shape)),
    "geometric": from_rows(lambda key, shape: R.geometric(key, 0.4, shape)),
    "gumbel": from_rows(R.gumbel),
    "laplace": from_rows(R.laplace),
    "loggamma": from_rows(lambda key, shape: R.loggamma(key, 2.0, shape)),
    "logistic": from_rows(R.logistic),
    "lognormal": from_rows(lambda key, shape: R.lognormal(key, 1.0, shape)),
    "maxwell": from_rows(R.maxwell),
    "multinomial": lambda key, n: R.multinomial(key, 10.0, jnp.ones((n, 3)) / 3)[:, 0],
    "multivariate_normal": lambda key, n: R.multivariate_normal(
        key, jnp.zeros(3), jnp.eye(3), (n,)
    )[:, 0],
    "normal": from_rows(R.normal),
    "orthogonal": lambda key, n: R.orthogonal(key, 3, (n,))[:, 0, 0],
    "pareto": from_rows(lambda key, shape: R.pareto(key, 3.0, shape)),
    "permutation": lambda key, n: R.permutation(key, n),
    "poisson": from_rows(lambda key, shape: R.poisson(key, 3.0, shape)),
    "rademacher": from_rows(R.rademacher),
    "randint": from_rows(lambda key, shape: R.randint(key, shape, 0, 99)),
    "rayleigh": from_rows(lambda key, shape: R.rayleigh(key, 1.0, shape)),
    "t": from_rows(lambda key, shape: R.t(key, 3.0, shape)),
    "triangular": from_rows(lambda key, shape: R.triangular(key, 0.0, 0.5, 1.0, shape)),
    "truncated_normal": from_rows(lambda key, shape: R.truncated_normal(key, -1.0, 1.0, shape)),
    "uniform": from_rows(R.uniform),
    "wald": from_rows(lambda key, shape: R.wald(key, 1.0, shape)),
    "weibull_min": from_rows(lambda key, shape: R.weibull_min(key, 1.0, 2.0, shape)),
}

# What is public in `jax.random` and draws nothing.
NO_SAMPLERS = {
    "Key PRNGKey clone fold_in key key_data key_dtype key_impl random_gamma_p split wrap_key_data"
}

# Other ways to draw.
PATTERNS = {
    "clone": lambda key, n: R.normal(R.clone(key), (n,)),
    "gamma between": lambda key, n: R.gamma(key, 2.0, (3, n, 2))[1, :, 1],
    "gamma for all": lambda key, n: jnp.ones(n) * R.gamma(key, 2.0),
    "one key a row": row_keys(R.normal),
    "keys of a row": row_keys(lambda key: R.normal(R.split(key, 3)[1])),
    "gamma of a row": row_keys(lambda key: R.gamma(key, 2.0)),
    "as many as rows for a row": lambda key, n: jax.vmap(lambda k: R.normal(k, (2, n))[1, 0])(
        R.split(key, n)
    ),
    "one key a layer": lambda key, n: jax.vmap(lambda k: R.normal(k, (n,)))(
        jax.vmap(R.fold_in, (None, 0))(key, jnp.arange(3))
    ).sum(0),
    "within a row": lambda key, n: R.permutation(
        key, jnp.broadcast_to(jnp.arange(4.0), (n, 4)), axis=1, independent=True
    )[:, 0],
    "own key for all": lambda key, n: jnp.ones(n) * R.normal(R.key(3)),
    "own key": lambda key, n: R.normal(R.key(3), (n,)),
    "own raw key": lambda key, n: R.normal(R.PRNGKey(3), (n,)),
    "own rbg key": lambda key, n: R.normal(R.key(3, impl="rbg"), (n,)),
    "wrapped data": lambda key, n: R.normal(R.wrap_key_data(R.key_data(key)), (n,)),
    "key as numbers": lambda key, n: jnp.ones(n) * R.key_data(key)[-1],
    "counted rows": lambda key, n: jax.vmap(R.normal)(
        jax.vmap(R.fold_in, (None, 0))(key, jnp.arange(n))
    ),
    "shuffled rows": lambda key, n: R.choice(key, jnp.linspace(0, 1, n), (n,), replace=False),
}
DRAWS = SAMPLERS | PATTERNS

# Rows decide these together, or JAX makes them with its own threefry keys alone.
REFUSED = {
    "binomial": "ends when rows say so",
    "multinomial": "ends when rows say so",
    "permutation": "sort picks rows by their place",
    "poisson": "takes no key of a part of the rows",
    "own key": "draws from a key that the loss makes itself",
    "own raw key": "draws from a key that the loss makes itself",
    "own rbg key": "draws from a key that the loss makes itself",
    "wrapped data": "takes no key of a part of the rows",
    "key as numbers": "reads the words of the key",
    # Of a pipeline the draws are looked at first, elsewhere the rows.
    "counted rows": "picks rows by their place|folds in numbers counted over the rows",
    "shuffled rows": "iota counts rows",
    "as many as rows for a row": "draws something for each pair of rows",
}
QUICK = ("gamma", "one key a layer", "keys of a row", "own key", "poisson", "key as numbers")

MODES = {
    "accumulate": {"accumulate": 2},
    "shard_map": {"mode": "shard_map"},
    "whole": {},
}
BATCH = {"hot": np.eye(ROWS, dtype=np.float32)}


def split_step(draw, devices, options, **spec):
    """A step whose gradient is the noise of each row, over the number of rows."""

    def loss(params, batch, key):
        noise = draw(key, len(batch["hot"])).astype(jnp.float32)
        return jnp.mean((batch["hot"] @ params["w"]) * noise)

    return sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=lambda key: {"w": jnp.ones(ROWS)},
        batch=BATCH,
        mesh=sk.MeshSpec(data=devices).build(devices=jax.devices()[:devices]),
        strategy=sk.strategies.data(),
        **options,
        **spec,
    )


def noise_of_step(step):
    state = step.init(R.key(0))
    return np.asarray(step.gradients(state, BATCH)[1]["w"]) * ROWS, R.fold_in(state.key, 0)


def noise_of_one_device(draw, key, micro_batches):
    noise = np.zeros(ROWS)
    for i in range(micro_batches):
        own = R.fold_in(key, i) if micro_batches > 1 else key
        noise[i::micro_batches] = jax.jit(draw, static_argnums=1)(own, ROWS // micro_batches)
    return noise


def check_draw(name, mode, devices):
    draw, options = DRAWS[name], MODES[mode]
    splits = mode == "accumulate" or (mode == "shard_map" and devices > 1)
    if name in REFUSED and splits:
        with pytest.raises(sk.errors.StepError, match=REFUSED[name]) as caught:
            split_step(draw, devices, options)
        assert "test_random_draws.py:" in str(caught.value)
        return
    got, key = noise_of_step(split_step(draw, devices, options))
    want = noise_of_one_device(draw, key, options.get("accumulate", 1))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


def test_every_public_sampler_of_jax_has_its_row():
    """A sampler that a newer JAX adds fails here until it has one."""
    public = {name for name in dir(R) if not name.startswith("_")}
    others = {name for text in NO_SAMPLERS for name in text.split()}
    assert public - others == SAMPLERS.keys()


@pytest.mark.parametrize(
    ("name", "mode"),
    some_quick(
        itertools.product(QUICK, ("accumulate", "shard_map")),
        *((name, ("accumulate", "shard_map")[n % 2]) for n, name in enumerate(QUICK)),
    ),
)
def test_a_draw_is_that_of_one_device_or_refused(name, mode):
    check_draw(name, mode, 4)


@pytest.mark.parametrize(("name", "mode", "devices"), table(DRAWS, MODES, (1, 2, 8), every=13))
def test_every_draw_is_that_of_one_device_or_refused(name, mode, devices):
    check_draw(name, mode, devices)


@pytest.mark.parametrize("mode", some_quick(["auto", "shard_map"], "shard_map"))
def test_the_dtype_of_a_reduction_changes_no_draw(mode):
    options = {"precision": sk.Precision(reduce_dtype="bfloat16"), "mode": mode}
    got, key = noise_of_step(split_step(DRAWS["normal"], 2, options))
    np.testing.assert_allclose(got, noise_of_one_device(DRAWS["normal"], key, 1), rtol=1e-2)


# Draws whose distribution the rows decide.
OF_ROWS = {
    "gamma": R.gamma,
    "dirichlet": lambda key, a: R.dirichlet(key, jnp.stack([a, 2 * a], 1))[:, 0],
    "t": R.t,
    "f": lambda key, a: R.f(key, 3.0, a + 3),
}


@pytest.mark.parametrize("mode", some_quick(["accumulate", "shard_map"], "shard_map"))
@pytest.mark.parametrize("name", some_quick(OF_ROWS, "gamma"))
def test_a_draw_from_what_rows_decide_is_that_of_one_device(name, mode):
    def loss(params, batch, key):
        return jnp.mean(OF_ROWS[name](key, jnp.exp(batch["hot"] @ params["w"])))

    step = sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=lambda key: {"w": jnp.ones(ROWS)},
        batch=BATCH,
        mesh=sk.MeshSpec(data=4).build(devices=jax.devices()[:4]),
        strategy=sk.strategies.data(),
        **MODES[mode],
    )
    got, key = noise_of_step(step)
    micro_batches, want = MODES[mode].get("accumulate", 1), np.zeros(ROWS)
    for i in range(micro_batches):
        own = R.fold_in(key, i) if micro_batches > 1 else key
        rows = {"hot": BATCH["hot"][i::micro_batches]}
        gradient = jax.grad(loss)({"w": jnp.ones(ROWS)}, rows, own)["w"]
        want += np.asarray(gradient) * ROWS / micro_batches
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_gamma_draw_as_large_as_a_split_is_refused_not_guessed():
    """Two rows a part: the generator is asked for 2 keys both by `split` and for the draws."""
    draw = from_rows(lambda key, shape: R.gamma(R.split(key)[0], 2.0, shape))
    with pytest.raises(sk.errors.StepError, match="something else of the same shape") as told:
        split_step(draw, 8, {"accumulate": 4})
    assert "an accumulate or a mesh of another size" in str(told.value)
    split_step(draw, 8, {"accumulate": 2})


# Two rows a part: the generator is asked for 2 of each row's key, and for 2 of all rows' key.
TWO_OF_A_ROW = {
    "keys": row_keys(lambda key: R.normal(R.split(key)[1])),
    "numbers": lambda key, n: (
        row_keys(lambda k: R.normal(k, (2,))[1])(R.fold_in(key, 1), n) + R.normal(key, (n,))
    ),
}


@pytest.mark.parametrize("name", some_quick(TWO_OF_A_ROW, "keys"))
def test_the_keys_of_rows_draw_as_many_as_rows(name):
    draw = TWO_OF_A_ROW[name]
    got, key = noise_of_step(split_step(draw, 8, {"accumulate": 4}))
    np.testing.assert_allclose(got, noise_of_one_device(draw, key, 4), rtol=2e-5)


REPEATED = {
    "broadcast": lambda key, n: jnp.broadcast_to(key, (n,)),
    "look-up": lambda key, n: R.split(key, 3)[jnp.zeros(n, int)],
    "folds": lambda key, n: jax.vmap(R.fold_in, (0, None))(R.split(key, n), 3),
}


@pytest.mark.parametrize("name", REPEATED)
def test_as_many_keys_as_rows_may_be_of_all_rows(name):
    """Nothing says then that such a key is one row's own."""

    def draw(key, n):
        own = jax.vmap(lambda k: R.normal(k, (2,))[1])(REPEATED[name](R.fold_in(key, 1), n))
        return own + R.normal(key, (n,))

    with pytest.raises(sk.errors.StepError, match="something else of the same shape"):
        split_step(draw, 8, {"accumulate": 4})


@pytest.mark.slow
def test_the_splits_inside_of_a_gamma_draw_are_of_one_row():
    """Two rows a part: each element's key is split into two again, and those are no rows."""
    got, key = noise_of_step(split_step(DRAWS["gamma"], 8, {"accumulate": 4}))
    want = noise_of_one_device(DRAWS["gamma"], key, 4)
    np.testing.assert_allclose(got, want, rtol=2e-5)


def test_typed_keys_in_a_batch_are_refused_with_the_way_out():
    keys = R.split(R.key(1), ROWS)
    with pytest.raises(sk.errors.StepError, match=r"batch/keys +is key<fry>\[64\]"):
        sk.StepSpec(
            loss_fn=lambda params, batch, key: params,
            optimizer=optax.sgd(0.1),
            init=lambda key: jnp.ones(()),
            batch={"keys": keys},
        )


def test_numbers_of_the_batch_may_be_folded_into_keys():
    def loss(params, batch, key):
        keys = jax.vmap(R.fold_in, (None, 0))(key, batch["id"])
        own = jax.vmap(lambda seed: R.normal(R.key(seed)))(batch["id"])
        noise = jax.vmap(R.normal)(keys) + own
        return jnp.mean((batch["hot"] @ params["w"]) * noise)

    ids = np.random.default_rng(0).permutation(ROWS)
    batch = {**BATCH, "id": ids}
    step = sk.compile_step(
        loss,
        optax.sgd(0.1),
        init=lambda key: {"w": jnp.ones(ROWS)},
        batch=batch,
        mesh=sk.MeshSpec(data=4).build(devices=jax.devices()[:4]),
        strategy=sk.strategies.data(),
        mode="shard_map",
    )
    state = step.init(R.key(0))
    got = np.asarray(step.gradients(state, batch)[1]["w"])
    want = jax.grad(lambda p: loss(p, batch, R.fold_in(state.key, 0)))({"w": jnp.ones(ROWS)})["w"]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("draw", ["poisson", "normal of rbg"])
def test_parts_of_rows_are_checked_on_one_device_too(draw, devices):
    """Two micro-batches have keys of parts, whose draws are those of whole rows or refused."""
    impl = "rbg" if draw == "normal of rbg" else "threefry2x32"
    sampler = SAMPLERS["normal" if draw == "normal of rbg" else draw]
    with jax.default_prng_impl(impl), pytest.raises(sk.errors.StepError) as told:
        split_step(sampler, devices, {"accumulate": 2}, independent_rows=True)
    assert "test_random_draws.py:" in str(told.value)


def test_a_loss_that_asserts_its_rows_without_a_word_is_named():
    def loss(params, batch, key):
        assert len(batch["hot"]) == ROWS
        return jnp.mean(batch["hot"] @ params["w"])

    options = {"optimizer": optax.sgd(0.1), "init": lambda key: {"w": jnp.ones(ROWS)}}
    spec = sk.StepSpec(loss_fn=loss, batch=BATCH, strategy=sk.strategies.data(), **options)
    mesh = sk.MeshSpec(data=2).build(devices=jax.devices()[:2])
    for split in ({"accumulate": 2}, {"mode": "shard_map"}):
        with pytest.raises(sk.errors.StepError, match=f"is written for {ROWS} rows.*Assertion"):
            spec.replace(**split).compile(mesh)
    step = spec.compile(mesh)
    with pytest.raises(sk.errors.BatchError, match=f"is written for {ROWS} rows"):
        step.evaluate(step.init(R.key(0)), {"hot": BATCH["hot"][:3]})


@pytest.mark.parametrize(
    "setting", [("jax_default_prng_impl", "rbg"), ("jax_threefry_partitionable", False)], ids=str
)
def test_other_generators_are_refused_where_rows_are_split(setting):
    name, value = setting
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        with pytest.raises(
            sk.errors.StepError,
            match=r"only draws of partitionable threefry keys .*test_random_draws.py:\d+ in",
        ):
            split_step(SAMPLERS["normal"], 4, {"accumulate": 2})
    finally:
        jax.config.update(name, before)


@pytest.mark.parametrize("name", ["poisson", "own key"])
def test_rows_declared_independent_do_not_make_draws_so(name):
    with pytest.raises(sk.errors.StepError, match=REFUSED[name]):
        split_step(DRAWS[name], 4, {"mode": "shard_map"}, independent_rows=True)


LAYERS = 2


def staged_loss(draw, params, batch, key):
    def layer(w, x, rows, key):
        noise = draw(key, len(x)).astype(jnp.float32)
        return x * w + noise[:, None] * rows["hot"]

    return sk.nn.layer_stack(
        lambda outer, rows, key: rows["hot"] @ outer,
        layer,
        lambda outer, x, rows: jnp.mean((x * jnp.arange(ROWS)) ** 2),
        params["outer"],
        params["layers"],
        batch,
        key,
    )


def staged_init(key):
    return {
        "outer": sk.WithAxes(jnp.eye(ROWS), ("embed", None)),
        "layers": sk.WithAxes(jnp.linspace(0.5, 1, LAYERS), ("layers",)),
    }


@pytest.mark.parametrize("name", table(DRAWS, every=7))
def test_every_draw_in_a_pipeline_is_that_of_one_device_or_refused(name):
    strategy = sk.strategies.data() | sk.strategies.pipeline(micro_batches=2)
    loss = functools.partial(staged_loss, DRAWS[name])
    compiled = functools.partial(
        sk.compile_step,
        loss,
        optax.sgd(0.1),
        init=staged_init,
        batch=BATCH,
        mesh=sk.MeshSpec(data=2, pipe=2).build(devices=jax.devices()[:4]),
        strategy=strategy,
    )
    if name in REFUSED:
        with pytest.raises(sk.errors.StepError, match=REFUSED[name]):
            compiled()
        return
    step = compiled()
    state = step.init(R.key(0))
    metrics, grads = step.gradients(state, BATCH)
    params = jax.tree.map(np.asarray, state.params)
    want, true = jax.jit(jax.value_and_grad(loss))(params, BATCH, R.fold_in(state.key, 0))
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-4)
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(true), strict=True):
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert error < 1e-4
