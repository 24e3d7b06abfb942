"""An update that is not finite is not made, on the devices, at no further collective."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk
from shardkit.report import read_ledger

from . import _checkpoints as ck
from . import _staged
from . import test_context as cp
from . import test_expert_parallel as ep
from ._quick import some_quick

data, fsdp, tensor, zero = (
    getattr(sk.strategies, name) for name in ("data", "fsdp", "tensor", "zero")
)
RNG = np.random.default_rng(0)
GOOD = {"x": RNG.standard_normal((8, 16)).astype(np.float32)}
# The loss of this batch is 0 and finite; its gradient is 0 · inf.
FLAT = {"x": np.zeros((8, 16), np.float32)}
BAD = {"x": np.where(np.arange(128).reshape(8, 16) == 77, np.inf, GOOD["x"])}


def init(key):
    up, down = jax.random.split(key)
    params = {
        "up": sk.WithAxes(jax.random.normal(up, (16, 32)) / 4, ("embed", "mlp")),
        "down": sk.WithAxes(jax.random.normal(down, (32, 16)) / 4, ("mlp", "embed")),
    }
    return sk.Variables(params, {"seen": jnp.zeros(()), "draws": jax.random.key(7)})


def loss(params, batch, key, model_state=None):
    up, down = (sk.nn.use_param(params[name], *axes) for name, axes in AXES.items())
    h = jax.nn.relu(sk.nn.constrain(batch["x"], "batch", "embed", into=("mlp",)) @ up)
    y = sk.nn.constrain(h, "batch", "mlp") @ down
    value = jnp.sqrt(jnp.square(sk.nn.constrain(y, "batch", "embed", partial=("mlp",))).mean())
    return value, {}, model_state and {**model_state, "seen": model_state["seen"] + 1}


AXES = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1))


@functools.cache
def compiled(strategy, on_nonfinite, mode="auto", accumulate=1, **sizes):
    stateful = mode == "auto"  # explicit collectives carry no mutable state
    return sk.compile_step(
        sk.Loss(loss, loss, stateful=True) if stateful else lambda *args: loss(*args)[0],
        OPTIMIZER,
        init=init if stateful else lambda key: init(key).params,
        batch=GOOD,
        mesh=sk.MeshSpec(**sizes).build(devices=jax.devices()[: np.prod(list(sizes.values()))]),
        strategy=strategy,
        mode=mode,
        accumulate=sk.Accumulate(accumulate, "every"),
        on_nonfinite=on_nonfinite,
        independent_rows=True,  # the root of a mean; alike in every variant of a step
    )


def sent(step):
    """Wire bytes and number of collectives, by kind and axes."""
    ledger = read_ledger(step.hlo(), list(step.mesh.shape.items()))
    assert ledger.complete
    rows = {}
    for row in ledger:
        at = (row.kind, row.axes)
        rows[at] = np.add(rows.get(at, (0, 0)), (row.wire_bytes * row.trips, row.trips)).tolist()
    return rows


def rest(state):
    """Bits of everything but the counter and whether it halted."""
    apart = (".step", ".halted")
    return {path: bits for path, bits in ck.bits(state).items() if path not in apart}


CASES = {
    "one device": (data(), {"data": 1}),
    "data": (data(), {"data": 8}),
    "zero2 ×2": (zero(stage=2), {"data": 4, "accumulate": 2}),
    "fsdp | tensor": (fsdp() | tensor(), {"fsdp": 4, "tensor": 2}),
    "fsdp, explicit": (fsdp(), {"fsdp": 8, "mode": "shard_map"}),
}


@pytest.mark.parametrize("case", some_quick(CASES, "data", "fsdp, explicit"))
def test_a_skipped_update_leaves_every_bit_but_the_counter(case):
    strategy, options = CASES[case]
    step, plain = (compiled(strategy, how, **options) for how in ("skip", "apply"))
    assert sent(step) == sent(plain)
    state = step.init(jax.random.key(0))
    before = rest(state)
    state, metrics = step(state, BAD)
    assert (rest(state), int(state.step), float(metrics["skipped"])) == (before, 1, 1.0)
    state, metrics = step(state, FLAT)
    assert (float(metrics["loss"]), np.isfinite(metrics["grad_norm"])) == (0.0, False)
    assert (rest(state), int(state.step), float(metrics["skipped"])) == (before, 2, 1.0)

    state, metrics = step(state, GOOD)
    other = plain.init(jax.random.key(0))
    other, expected = plain(other, GOOD)
    assert float(metrics["skipped"]) == 0.0
    assert rest(state) != before
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-6)
    got, want = jax.tree.leaves(state.params), jax.tree.leaves(other.params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, want)
    assert state.model_state.get("seen") == other.model_state.get("seen")


def test_a_stopped_step_keeps_what_it_failed_on_however_late_that_is_read():
    step = compiled(zero(stage=2), "stop", data=4)
    state, _ = step(step.init(jax.random.key(0)), GOOD)
    before = rest(state)
    assert not state.halted
    for batch in (BAD, GOOD, GOOD):
        state, metrics = step(state, batch)
        assert (rest(state), float(metrics["skipped"])) == (before, 1.0)
        assert (bool(state.halted), int(state.step)) == (True, 1)
        assert state.halted.sharding.is_fully_replicated
    skipping = compiled(zero(stage=2), "skip", data=4)
    state, metrics = skipping(state, GOOD)
    assert (rest(state), int(state.step), bool(state.halted)) == (before, 1, True)
    state = dataclasses.replace(state, halted=state.halted & False)
    state, metrics = step(state, GOOD)
    assert (int(state.step), float(metrics["skipped"]), bool(state.halted)) == (2, 0.0, False)


def test_without_a_declaration_the_update_is_made_and_no_metric_added():
    step = compiled(data(), "apply", data=8)
    state, metrics = step(step.init(jax.random.key(0)), BAD)
    assert sorted(metrics) == ["grad_norm", "loss"]
    assert not np.isfinite(np.asarray(state.params["up"])).any()


@pytest.mark.slow
def test_rows_whose_length_is_split_skip_too():
    step = cp.compiled(cp.mesh_of(context=2), sk.strategies.context(), on_nonfinite="skip")
    weights = cp.BATCH["weights"].copy()
    weights[3, -1] = np.nan
    check_skips(step, cp.BATCH, {**cp.BATCH, "weights": weights})


def test_experts_over_devices_skip_too():
    strategy = sk.strategies.data() | sk.strategies.expert()
    mesh = ep.mesh_of({"data": 2, "expert": 4})
    step = ep.layer(ep.DROPLESS, strategy, mesh, on_nonfinite="skip")
    batch = ep.vectors()
    x = batch["x"].copy()
    x[5, 3, 1] = np.inf
    check_skips(step, batch, {**batch, "x": x})


def check_skips(step, good, bad):
    """An update on `bad` changes nothing, one on `good` is made."""
    state = step.init(jax.random.key(0))
    before = rest(state)
    state, metrics = step(state, bad)
    assert (rest(state), float(metrics["skipped"]), int(state.step)) == (before, 1.0, 1)
    state, metrics = step(state, good)
    assert (float(metrics["skipped"]), int(state.step)) == (0.0, 2)
    assert rest(state) != before
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_pipelines_skip_too():
    batch = _staged.make_batch()
    strategy = sk.strategies.pipeline(micro_batches=4) | data()
    mesh = sk.MeshSpec(pipe=2, data=4).build()
    plain = _staged.step(mesh, strategy)
    step = plain.replace(on_nonfinite="skip")
    assert sent(step) == sent(plain)
    state = step.init(jax.random.key(0))
    before = rest(state)
    poisoned = {**batch, "gate": np.full_like(batch["gate"], np.nan)}
    state, metrics = step(state, poisoned)
    assert (rest(state), float(metrics["skipped"])) == (before, 1.0)


@pytest.mark.parametrize("setting", ["jax_debug_nans", "jax_debug_infs"])
def test_jax_set_to_raise_at_such_numbers_names_them(setting):
    """After a first call too, and where JAX then donates nothing, as for `jax_debug_nans`."""
    jax.config.update(setting, True)
    try:
        step = sk.compile_step(
            lambda params, batch, key: jnp.mean(jnp.log(batch["x"] * params["w"])),
            optax.adam(0.1),
            init=lambda key: {"w": jnp.ones((8, 16))},
            batch=GOOD,
            mesh=sk.MeshSpec(data=8).build(),
            strategy=sk.strategies.fsdp("data", min_size=1),
        )
        assert not [f for f in step.report().findings if f.kind == "unaliased_donation"]
        state, metrics = step(step.init(jax.random.key(0)), {"x": np.ones((8, 16), np.float32)})
        assert np.isfinite(metrics["loss"])
        bad = np.full((8, 16), -1 if setting == "jax_debug_nans" else 0, np.float32)
        with pytest.raises(FloatingPointError, match="loss") as raised:
            step(state, {"x": bad})
        assert ("NaN" if setting == "jax_debug_nans" else "infinity") in str(raised.value)
        assert 'Fix: on_nonfinite="stop", and sk.replay' in str(raised.value)
    finally:
        jax.config.update(setting, False)


def test_without_jit_a_step_is_refused():
    step = compiled(data(), "apply", data=8)
    state = step.init(jax.random.key(0))
    with jax.disable_jit():
        for call in (lambda: step.init(jax.random.key(0)), lambda: step(state, GOOD)):
            with pytest.raises(sk.errors.StepError, match="jax_disable_jit  is set") as raised:
                call()
            assert "with jax.disable_jit(False)" in str(raised.value)


def test_a_setting_that_changes_the_arguments_of_executables_is_refused():
    setting = "jax_use_simplified_jaxpr_constants"
    jax.config.update(setting, True)
    try:
        with pytest.raises(sk.errors.StepError, match=f"{setting}  is set") as raised:
            compiled.__wrapped__(data(), "apply", data=8)
        assert f"jax.config.update('{setting}', False)" in str(raised.value)
    finally:
        jax.config.update(setting, False)
