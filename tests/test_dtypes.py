"""Parameters of every dtype: as on one device in plain JAX, or refused with the fix."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk

ROWS, WIDTH = 16, 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, WIDTH)).astype(np.float32)
TRUE = np.array([1 + 2j, -1j, 0.5, 2 - 1j], np.complex64)

MODES = {
    "whole": {},
    "accumulate": {"accumulate": 2},
    "every": {"accumulate": sk.Accumulate(2, "every")},
    "reduce": {"precision": sk.Precision(reduce_dtype="bfloat16")},
    "shard_map": {"mode": "shard_map"},
    "shard_map accumulate": {"mode": "shard_map", "accumulate": 2},
}
QUICK = [name if name in ("accumulate", "shard_map") else pytest.param(name, marks=pytest.mark.slow)
         for name in MODES]  # fmt: skip


def spec_of(loss, init, batch=None, **options):
    batch = {"x": X} if batch is None else batch
    strategy = options.pop("strategy", sk.strategies.data())
    return sk.StepSpec(
        loss_fn=loss, optimizer=optax.sgd(0.1), init=init, batch=batch, strategy=strategy, **options
    )


def mesh_of(**sizes):
    n = int(np.prod(list(sizes.values())))
    return sk.MeshSpec(**sizes).build(devices=jax.devices()[:n])


def step_and_plain(spec, batch, plain, mesh=None):
    """The step, its state, and `(metrics, gradients)` of it and of plain JAX on one device."""
    step = spec.compile(mesh or mesh_of(data=4))
    state = step.init(jax.random.key(0))
    params = jax.tree.map(np.asarray, state.params)
    loss, grads = jax.jit(jax.value_and_grad(plain))(params, batch)
    return step, state, step.gradients(state, batch), ({"loss": loss}, grads)


def assert_equal_gradients(got, want, rtol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        wide = np.promote_types(b.dtype, np.float64)
        a, b = np.asarray(a).astype(wide), np.asarray(b).astype(wide)
        assert np.abs(a - b).max() <= rtol * np.abs(b).max(), (a, b)


def norm_of(grads):
    return np.sqrt(sum(np.sum(np.abs(np.asarray(g)) ** 2) for g in jax.tree.leaves(grads)))


def fit(params, batch, key=None):
    """Real and imaginary parts, their conjugates, and a spectrum."""
    z = batch["x"] @ params["w"]
    error = jnp.abs(z - batch["x"] @ TRUE) ** 2
    mixed = jnp.real(jnp.conj(z) * (batch["x"] @ params["v"])) + jnp.imag(jnp.exp(0.1j * z))
    spectrum = jnp.abs(jnp.fft.fft(batch["x"] * params["v"])).sum(-1) * params["scale"]
    return jnp.mean(error + mixed + spectrum)


def complex_init(key):
    return {
        "w": jnp.full(WIDTH, 0.3 - 0.2j, jnp.complex64),
        "v": jnp.full(WIDTH, 0.4 + 1j, jnp.complex64),
        "scale": jnp.float32(0.5),
    }


@pytest.mark.parametrize("mode", QUICK)
def test_complex_gradients_keep_both_parts(mode):
    spec = spec_of(fit, complex_init, **MODES[mode])
    step, state, (metrics, grads), (want, true) = step_and_plain(spec, {"x": X}, fit)
    # Of the complex leaves nothing is rounded to bfloat16; the real one is.
    assert_equal_gradients(grads, true, 1e-2 if mode == "reduce" else 1e-6)
    assert_equal_gradients([grads["w"], grads["v"]], [true["w"], true["v"]], 1e-6)
    assert np.abs(np.imag(true["w"])).max() > 0.1
    np.testing.assert_allclose(metrics["grad_norm"], norm_of(grads), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], want["loss"], rtol=1e-5)
    assert step.self_check(state, {"x": X}).ok


def test_verify_sees_the_imaginary_part(monkeypatch):
    spec = spec_of(fit, complex_init)
    assert sk.verify(spec, [mesh_of(data=2)], batches=[{"x": X}]).ok
    from shardkit.step import _gradients

    honest = _gradients.divide_by_weight
    monkeypatch.setattr(
        _gradients,
        "divide_by_weight",
        lambda *args: jax.tree.map(lambda g: g.real.astype(g.dtype), honest(*args)),
    )
    report = sk.verify(spec_of(fit, complex_init), [mesh_of(data=2)], batches=[{"x": X}])
    assert "gradients" in {row.check for row in report.rows if not row.ok}


@pytest.mark.slow
def test_complex_weights_are_split_by_fsdp():
    strategy = sk.strategies.fsdp(min_size=1)
    init = lambda key: {"w": sk.WithAxes(jnp.ones((4, 8)) * (1 + 2j), ("embed", "mlp"))}  # noqa: E731

    def loss(params, batch, key=None):
        return jnp.mean(jnp.abs(batch["x"] @ params["w"]) ** 2)

    for options in ({}, {"mode": "shard_map"}, {"accumulate": 2}):
        spec = spec_of(loss, init, strategy=strategy, **options)
        _, _, (_, grads), (_, true) = step_and_plain(spec, {"x": X}, loss, mesh_of(fsdp=4))
        assert_equal_gradients(grads, true, 1e-6)


def test_complex_gradients_are_not_compressed_as_real_ones():
    strategy = sk.Strategy(
        batch=jax.sharding.PartitionSpec("data"), compression=sk.GradientCompression("data")
    )
    spec = spec_of(fit, complex_init, strategy=strategy, mode="shard_map")
    with pytest.raises(sk.errors.StepError, match=r"params/w c64\[4\] +is complex"):
        spec.compile(mesh_of(data=4))


def test_a_complex_metric_is_refused():
    def loss(params, batch, key):
        z = batch["x"] @ params["w"]
        return jnp.mean(jnp.abs(z)), {"mean": z.mean()}

    with pytest.raises(sk.errors.StepError, match=r"is c64\[\], not a real scalar"):
        spec_of(loss, complex_init).compile(mesh_of(data=2))


def test_a_policy_that_changes_no_parameter_is_refused():
    def loss(params, batch, key):
        return jnp.mean(jnp.abs(batch["x"] @ params["w"]))

    init = lambda key: {"w": jnp.ones(WIDTH, jnp.complex64)}  # noqa: E731
    spec = spec_of(loss, init, precision="bfloat16")
    with pytest.raises(sk.errors.StepError, match=r"compute_dtype='bfloat16' +changes no param"):
        spec.compile(mesh_of(data=2))


def mixed_loss(params, batch, key=None):
    hidden = jnp.tanh(batch["x"] @ params["w"]).astype(jnp.bfloat16)
    return jnp.mean((hidden @ params["v"]).astype(jnp.float32) ** 2)


def mixed_init(key):
    return {
        "w": jax.random.normal(key, (WIDTH, WIDTH)),
        "v": jax.random.normal(key, (WIDTH, 8), jnp.bfloat16),
    }


@pytest.mark.parametrize("mode", QUICK)
def test_a_model_keeps_the_dtype_of_each_parameter(mode):
    spec = spec_of(mixed_loss, mixed_init, **MODES[mode])
    step, state, (_, grads), (_, true) = step_and_plain(spec, {"x": X}, mixed_loss)
    assert {k: x.dtype.name for k, x in state.params.items()} == {"w": "float32", "v": "bfloat16"}
    assert_equal_gradients(grads, true, 2e-2)
    state, _ = step(state, {"x": X})
    assert {k: x.dtype.name for k, x in state.params.items()} == {"w": "float32", "v": "bfloat16"}


@pytest.mark.usefixtures("float16")
def test_a_policy_casts_every_parameter():
    for precision, dtypes in (
        ("float32", {"float32"}),
        ("pure_bfloat16", {"bfloat16"}),
        (sk.Precision(param_dtype="float16"), {"float16"}),
    ):
        step = spec_of(mixed_loss, mixed_init, precision=precision).compile(mesh_of(data=2))
        assert {x.dtype.name for x in step.abstract_state.params.values()} == dtypes


HALF = 100 * np.abs(RNG.normal(size=(256, 64))).astype(np.float32)


def half_loss(params, batch, key=None):
    """Each row's gradient is below 65504, their sum is not."""
    losses = (batch["x"].astype(jnp.float16) @ params["w"].astype(jnp.float16)).astype(jnp.float32)
    return sk.Mean(jnp.sum(losses**2), jnp.float32(4 * len(batch["x"])))


def half_plain(params, batch):
    mean = half_loss(params, batch)
    return mean.total / mean.weight


@pytest.mark.usefixtures("float16")
@pytest.mark.parametrize("mode", QUICK)
def test_sums_in_float16_are_scaled_before_they_are_differentiated(mode):
    if mode == "reduce":
        pytest.skip("reduces in bfloat16")
    init = lambda key: {"w": jnp.ones((64, 4)) / 8}  # noqa: E731
    spec = spec_of(half_loss, init, {"x": HALF}, **MODES[mode])
    of_sum = jax.grad(lambda p: half_loss(p, {"x": HALF}).total)(init(None))
    assert not np.isfinite(of_sum["w"]).all()
    _, _, (metrics, grads), (want, true) = step_and_plain(spec, {"x": HALF}, half_plain)
    assert_equal_gradients(grads, true, 2e-3)
    np.testing.assert_allclose(metrics["loss"], want["loss"], rtol=1e-3)


def test_weights_that_cancel_are_not_divided_by():
    signs = np.array([1, -1] * 4 + [3, 1] * 4, np.float32)

    def loss(params, batch, key=None):
        return sk.Mean(jnp.sum((batch["x"] @ params["w"]) * batch["s"]), jnp.sum(batch["s"]))

    def plain(params, batch):
        mean = loss(params, batch)
        return mean.total / mean.weight

    batch = {"x": X, "s": signs}
    spec = spec_of(loss, lambda key: {"w": jnp.ones(WIDTH)}, batch, accumulate=2)
    _, _, (_, grads), (_, true) = step_and_plain(spec, batch, plain)
    assert_equal_gradients(grads, true, 1e-5)


def test_a_mean_of_float16_sums_is_refused():
    def loss(params, batch, key):
        losses = (batch["x"] @ params["w"]).astype(jnp.float16) ** 2
        return sk.Mean(losses.sum(), jnp.float16(losses.size))

    with pytest.raises(sk.errors.StepError, match="holds no sum above 65504") as caught:
        spec_of(loss, lambda key: {"w": jnp.ones(WIDTH)}).compile(mesh_of(data=2))
    assert "loss.total" in str(caught.value)
    assert "dtype=jnp.float32" in str(caught.value)


def test_parameters_without_a_gradient_are_refused():
    init = lambda key: {"i": jnp.arange(3), "b": jnp.ones(2, bool), "w": jnp.ones(WIDTH)}  # noqa: E731
    spec = spec_of(lambda p, b, k: jnp.mean(b["x"] @ p["w"]), init)
    with pytest.raises(sk.errors.StepError) as caught:
        spec.compile(mesh_of(data=2))
    assert "i i32[3]" in str(caught.value)
    assert "b bool[2]" in str(caught.value)
    assert "sk.Variables" in str(caught.value)


def test_parameters_of_8_bits_are_stored_as_a_policy_says():
    init = lambda key: {"w": jnp.ones(WIDTH, jnp.float8_e4m3fn)}  # noqa: E731

    def loss(params, batch, key):
        return jnp.mean((batch["x"] @ params["w"].astype(jnp.float32)) ** 2)

    with pytest.raises(sk.errors.StepError, match="too few bits") as caught:
        spec_of(loss, init).compile(mesh_of(data=2))
    assert 'sk.Precision(param_dtype="float32")' in str(caught.value)
    step = spec_of(loss, init, precision="float32").compile(mesh_of(data=2))
    assert step.abstract_state.params["w"].dtype == jnp.float32


@pytest.mark.parametrize("field", ["param_dtype", "compute_dtype", "reduce_dtype"])
def test_float64_is_refused_where_jax_would_make_it_float32(field):
    precision = sk.Precision(**{field: "float64"})
    spec = spec_of(lambda p, b, k: jnp.mean(b["x"] @ p["w"]), lambda key: {"w": jnp.ones(WIDTH)},
                   precision=precision)  # fmt: skip
    with pytest.raises(sk.errors.StepError, match="jax_enable_x64"):
        spec.compile(mesh_of(data=2))


FLOAT64 = """
import jax, jax.numpy as jnp, numpy as np, optax, shardkit as sk
sk.simulate_devices(4)
jax.config.update("jax_enable_x64", True)
x = np.random.default_rng(0).normal(size=(16, 4))
mesh = sk.MeshSpec(data=4).build()
w = lambda key: {"w": jax.random.normal(key, (4, 4)), "z": jnp.full(4, 1 + 1j)}
def loss(p, b, key=None):
    value = jnp.sum(jnp.tanh(b["x"] @ p["w"]) ** 2) + jnp.sum(jnp.abs(b["x"] @ p["z"]) ** 2)
    return sk.Mean(value, 4.0 * len(b["x"])), {"size": jnp.float32(2)}
def plain(p, b):
    mean = loss(p, b)[0]
    return mean.total / mean.weight
narrow = lambda key: jax.tree.map(lambda x: x.astype(np.promote_types("f4", x.dtype.kind + "8")
                                  if x.dtype.kind == "c" else "f4"), w(key))
cases = [(w, {}), (narrow, {"precision": sk.Precision("float64", "float64")})]
for init, given in cases:
    for mode in ({}, {"accumulate": 2}, {"mode": "shard_map"}):
        batch = {"x": x}
        spec = sk.StepSpec(loss_fn=loss, optimizer=optax.adam(0.1), init=init, batch=batch,
                           strategy=sk.strategies.data(), **given, **mode)
        step = spec.compile(mesh)
        state = step.init(jax.random.key(0))
        metrics, grads = step.gradients(state, batch)
        want, true = jax.value_and_grad(plain)(jax.tree.map(np.asarray, state.params), batch)
        assert metrics["loss"].dtype == metrics["grad_norm"].dtype == np.float64
        assert metrics["size"].dtype == np.float32
        assert abs(metrics["loss"] - want) < 1e-14 * want, (metrics["loss"], want)
        for name in true:
            assert grads[name].dtype == true[name].dtype, grads[name].dtype
            assert np.abs(grads[name] - true[name]).max() < 1e-14
        norm = np.sqrt(sum(np.sum(np.abs(g) ** 2) for g in true.values()))
        assert abs(metrics["grad_norm"] - norm) < 1e-14 * norm
        assert step.self_check(state, batch).ok
    assert sk.verify(spec, [mesh], batches=[batch]).ok
"""


@pytest.mark.slow
def test_float64_is_kept_in_loss_metrics_and_gradients():
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", FLOAT64],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert run.returncode == 0, run.stderr[-3000:]


def staged(params, batch, key=None, dtype=jnp.complex64):
    return sk.nn.layer_stack(
        lambda outer, rows, key: (rows["x"] @ outer).astype(dtype),
        lambda w, x, rows, key: x * w.astype(dtype) + x**2 / 8,
        lambda outer, x, rows: jnp.mean(jnp.abs(x).astype(jnp.float32) ** 2),
        params["outer"],
        params["layers"],
        batch,
        None,
    )


def staged_init(key):
    layers = jnp.linspace(0.2, 0.8, 2 * WIDTH).reshape(2, WIDTH) * (1 - 0.5j)
    return {
        "outer": sk.WithAxes(jnp.ones((WIDTH, WIDTH)) * (0.1 + 0.2j), ("embed", None)),
        "layers": sk.WithAxes(layers.astype(jnp.complex64), ("layers", "embed")),
    }


@pytest.mark.slow
def test_complex_layers_in_a_pipeline():
    strategy = sk.strategies.data() | sk.strategies.pipeline(micro_batches=2)
    spec = spec_of(staged, staged_init, strategy=strategy)
    mesh = mesh_of(data=2, pipe=2)
    _, _, (_, grads), (_, true) = step_and_plain(spec, {"x": X}, staged, mesh)
    assert_equal_gradients(grads, true, 1e-5)


def test_float16_in_a_pipeline_is_refused():
    def loss(params, batch, key):
        return staged(jax.tree.map(jnp.real, params), batch, key, jnp.float16)

    strategy = sk.strategies.data() | sk.strategies.pipeline(micro_batches=2)
    with pytest.raises(sk.errors.StepError, match="computes in float16"):
        spec_of(loss, staged_init, strategy=strategy).compile(mesh_of(data=2, pipe=2))
