"""Every way to declare or call a step wrongly: one message, by its text."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import shardkit as sk

X = np.ones((8, 4), np.float32)


@pytest.fixture(scope="module")
def mesh():
    return sk.MeshSpec(data=2, tensor=4).build()


def init(key):
    return {"w": jnp.ones((4, 8))}


def loss_fn(params, batch, key):
    return jnp.mean((batch["x"] @ params["w"]) ** 2)


def declared(mesh, loss=loss_fn, **given):
    return sk.compile_step(
        loss,
        given.pop("optimizer", optax.sgd(0.1)),
        init=given.pop("init", init),
        batch=given.pop("batch", {"x": X}),
        mesh=mesh,
        strategy=given.pop(
            "strategy", sk.Strategy(params=sk.PathRules({"w": P(None, "tensor")}), batch=P("data"))
        ),
        **given,
    )


@pytest.fixture(scope="module")
def step(mesh):
    return declared(mesh, on_retrace="error")


def message(kind, call):
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def test_everything_wrong_with_a_declaration_is_in_one_error(mesh):
    def made(key):
        return sk.Variables(
            {"up": {"kernel": jnp.ones((4, 6))}, "dwn": jnp.ones((8, 8)), "free": jnp.ones((4, 4))},
            {"stats": jnp.ones(6)},
        )

    def opaque(params):
        return jnp.zeros(5000)

    strategy = sk.Strategy(
        params=sk.PathRules({"up/kernel": P(None, "tensor"), "down": P("data"), "dwn": P("modle")}),
        batch=P("data"),
        model_state=sk.PathRules({"stats": P("tensor")}),
    )
    text = message(
        sk.errors.ShardingError,
        lambda: declared(
            mesh,
            init=made,
            optimizer=optax.GradientTransformation(opaque, lambda g, s, p=None: (g, s)),
            batch={"x": jax.ShapeDtypeStruct((7, 4), jnp.float32)},
            strategy=strategy,
        ),
    )
    assert "cannot be laid out on mesh (data=2, tensor=4)." in text
    for row in (
        "params/up/kernel f32[4,6]",
        "dim 1 (6) is not divisible by tensor=4",
        'PathRules["down"]',
        "matches none of the 3 leaves of params.",
        "uses axis 'modle'; mesh has data=2, tensor=4.",
        "params/free f32[4,4]",
        "no rule decides it",
        "model_state/stats f32[6]",
        "opt_state f32[5000]",
        "Strategy(opt_state=sk.PathRules(",
        "batch/x f32[7,4]",
        "global batch 7 must be a multiple of 2 (data=2 shard the batch dim)",
    ):
        assert row in text, row


def test_leaves_of_one_path_in_different_trees_are_told_apart(mesh):
    both = sk.Strategy(params=sk.PathRules({"x": P("tensor")}), batch=P(("data", "tensor")))
    text = message(
        sk.errors.ShardingError,
        lambda: declared(
            mesh,
            init=lambda key: {"x": jnp.ones((6, 4))},
            batch={"x": jnp.ones((6, 4))},
            strategy=both,
        ),
    )
    assert "2 leaves cannot be laid out on mesh" in text
    assert "params/x f32[6,4]" in text
    assert "batch/x f32[6,4]" in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mode": "aut"}, ["mode='aut'", "Did you mean 'auto'?", 'mode="auto"']),
        ({"precision": "bfloat"}, ["precision='bfloat'", "Did you mean 'bfloat16'?"]),
        ({"remat": "ful"}, ["remat='ful'", "Did you mean 'full'?", "save:<name>"]),
        ({"remat": "save:"}, ["unknown policy"]),
        ({"accumulate": 0}, ["0 is not a positive int"]),
    ],
)
def test_unknown_options(mesh, options, expected):
    text = message(sk.errors.StepError, lambda: declared(mesh, **options))
    assert all(part in text for part in expected), text


def test_a_precision_that_is_no_dtype():
    text = message(
        sk.errors.StepError, lambda: sk.Precision(param_dtype="float31", compute_dtype="int8")
    )
    assert "precision.param_dtype" in text
    assert "Did you mean 'float32'?" in text
    assert "precision.compute_dtype" in text


def test_a_manual_mesh():
    devices = np.array(jax.devices()).reshape(2, 4)
    manual = Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Manual, AxisType.Auto))
    text = message(sk.errors.StepError, lambda: declared(manual))
    assert "mesh axis 'data'" in text
    assert "is of type Manual; the partitioner needs Auto axes" in text
    assert "MeshSpec(...).build()" in text


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda p, b, k: (b["x"] @ p["w"]).sum(1), "loss +is f32\\[8\\], not a floating-point"),
        (lambda p, b, k: jnp.int32(1), "loss +is i32\\[\\], not a floating-point scalar"),
        (lambda p, b, k: sk.Mean(p["w"], 1.0), "loss.total +is f32\\[4,8\\]"),
        (
            lambda p, b, k: (p["w"].sum(), p["w"]),
            "returned \\(.*\\); expected loss, or \\(loss, me",
        ),
        (lambda p, b, k: (p["w"].sum(), {"loss": 1.0}), "metrics\\['loss'\\] +is a name that the"),
        (lambda p, b, k: (p["w"].sum(), {"grad_norm": 1.0}), "metrics\\['grad_norm'\\] +is a nam"),
        (lambda p, b, k: (p["w"].sum(), {"m": p["w"]}), "metrics\\['m'\\] +is f32\\[4,8\\], not"),
        (lambda p, b, k: None, "loss +is of type NoneType, not"),
        (lambda p, b, k: {"loss": p["w"].sum()}, "loss +is of type dict, not"),
        (lambda p, b, k: [p["w"].sum(), {}], "loss +is of type list, not"),
    ],
    ids=["vector", "int", "mean", "pair", "loss", "norm", "metric", "none", "dict", "list"],
)
def test_a_loss_that_returns_what_no_step_can_use(mesh, loss, expected):
    with pytest.raises(sk.errors.StepError, match=expected) as caught:
        declared(mesh, loss)
    assert "Fix: return loss" in str(caught.value)


def test_parameters_that_have_no_gradient(mesh):
    def made(key):
        return {"w": jnp.ones((4, 8)), "count": jnp.zeros((2,), jnp.int32)}

    rules = sk.Strategy(batch=P("data"))
    text = message(sk.errors.StepError, lambda: declared(mesh, init=made, strategy=rules))
    assert "count i32[2]" in text
    assert "is not a floating-point array, so it has no gradient" in text
    assert "sk.Variables(params, model_state)" in text


def test_names_that_are_not_one_per_dim(mesh):
    text = message(
        sk.errors.ShardingError,
        lambda: declared(mesh, init=lambda key: {"w": sk.WithAxes(jnp.ones(8), ("embed", "mlp"))}),
    )
    assert "w" in text
    assert "2 names ('embed', 'mlp') for 1 dims" in text


def test_a_state_that_would_change_its_form(mesh):
    grows = optax.GradientTransformation(
        lambda params: {"n": jnp.zeros((), jnp.int32)},
        lambda grads, state, params=None: (grads, {"n": state["n"] + 0.5}),
    )
    text = message(sk.errors.StepError, lambda: declared(mesh, optimizer=grows))
    assert "state/opt_state/n" in text
    assert "is i32[] before, f32[] after" in text


def test_batch_leaves_with_other_numbers_of_rows(mesh):
    text = message(
        sk.errors.ShardingError,
        lambda: declared(mesh, batch={"x": X, "y": np.ones((4, 4), np.float32)}),
    )
    assert "batch/y f32[4,4]" in text
    assert "has 4 rows, x has 8" in text


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"x": X[:6]}, ["batch/x", "is f32[6,4]; the step was compiled for f32[8,4]"]),
        ({"x": X.astype(np.int32)}, ["batch/x", "is i32[8,4]; the step was compiled for f32[8"]),
        ({"x": X, "y": X}, ["batch/y", "is not declared"]),
        ({}, ["batch/x", "is declared but missing", "a batch with leaves x"]),
        ([X], ["batch/0", "is not declared", "batch/x"]),
        ({"x": [1.0, 2.0]}, ["batch/x", "is a list of 2 items"]),
    ],
)
def test_a_batch_that_is_not_the_declared_one(step, batch, expected):
    state = step.init(jax.random.key(0))
    text = message(sk.errors.BatchError, lambda: step(state, batch))
    assert "The batch is not what the step was compiled for." in text
    assert all(part in text for part in expected), text
    assert not state.params["w"].is_deleted()


def test_a_batch_committed_elsewhere(step, mesh):
    state = step.init(jax.random.key(0))
    away = jax.device_put(X, jax.devices()[3])
    text = message(sk.errors.BatchError, lambda: step(state, {"x": away}))
    assert "batch/x" in text
    assert "is committed to 1 device; the step has it as P('data'" in text
    assert "pass host numpy, or step.shard_batch(batch)" in text
    turned = jax.device_put(X, jax.NamedSharding(mesh, P("tensor")))
    text = message(sk.errors.BatchError, lambda: step(state, {"x": turned}))
    assert "is committed to 8 devices as P('tensor'" in text


def test_batches_that_are_right_in_any_place(step):
    placed = step.shard_batch({"x": X})
    for batch in ({"x": X}, {"x": jnp.asarray(X)}, placed):
        assert step.evaluate(step.init(jax.random.key(0)), batch)["loss"] > 0
    assert step.shard_batch(placed)["x"] is placed["x"]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (0, "is 0; the step takes one typed key"),
        (np.zeros(2, np.uint32), "the step takes one typed key"),
        (lambda: jax.random.PRNGKey(0), "is uint32[2]; the step takes one typed key, key<fry>[]"),
        (lambda: jax.random.split(jax.random.key(0)), "is key<fry>[2]"),
        (lambda: jax.random.key(0, impl="rbg"), "is key<rbg>[]"),
    ],
    ids=["int", "numpy", "raw", "keys", "rbg"],
)
def test_keys_that_are_none(step, key, expected):
    text = message(sk.errors.StateError, lambda: step.init(key() if callable(key) else key))
    assert expected in text
    assert "Fix: step.init(jax.random.key(0))" in text


def test_a_state_of_another_step(step, mesh):
    def wider(key):
        return {"w": jnp.ones((4, 16)), "b": jnp.ones(3)}

    other = declared(
        mesh,
        lambda p, b, k: jnp.mean(b["x"] @ p["w"]) + p["b"].sum(),
        init=wider,
        strategy=sk.Strategy(batch=P("data")),
    )
    state = other.init(jax.random.key(0))
    text = message(sk.errors.StateError, lambda: step(state, {"x": X}))
    assert "state/params/w" in text
    assert "is f32[4,16]; the step has f32[4,8]" in text
    assert "state/params/b" in text
    assert "is not part of this step's state" in text
    assert "jax.device_put(state, step.shardings)" in text


def test_a_state_laid_out_otherwise(step, mesh):
    replicated = declared(mesh, strategy=sk.Strategy(batch=P("data")))
    state = replicated.init(jax.random.key(0))
    text = message(sk.errors.StateError, lambda: step(state, {"x": X}))
    assert "state/params/w" in text
    assert "is on 8 devices as P(); the step has it as P(None, 'tensor')" in text


def test_something_that_is_no_state(step):
    text = message(sk.errors.StateError, lambda: step({"w": jnp.ones((4, 8))}, {"x": X}))
    assert "state  is of type dict, not a train state" in text
    assert "step(state, batch), with state = step.init" in text


def test_a_state_of_host_arrays_is_placed_as_declared(step):
    made = step.init(jax.random.key(0))
    host = sk.TrainState(
        np.int32(0),
        {"w": np.ones((4, 8), np.float32)},
        made.opt_state,
        {},
        made.key,
        np.bool(False),
    )
    after, _ = step(host, {"x": X})
    assert after.params["w"].sharding.spec == P(None, "tensor")


def test_a_consumed_state_is_an_error_and_not_a_crash(step):
    state = step.init(jax.random.key(0))
    after, _ = step(state, {"x": X})
    for call in (step, step.evaluate, step.gradients):
        text = message(sk.errors.StateError, lambda call=call: call(state, {"x": X}))
        assert "The state was donated." in text
        assert "step, params/w, key" in text
        assert "state, metrics = step(state, batch)" in text
    step(after, {"x": X})


def test_reuse_and_aliases_never_crash_the_interpreter():
    script = """
        import jax
        jax.config.update("jax_num_cpu_devices", 8)
        import jax.numpy as jnp, numpy as np, optax, shardkit as sk
        from jax.sharding import PartitionSpec as P
        mesh = sk.MeshSpec(data=8).build()
        step = sk.compile_step(
            lambda p, b, k: jnp.mean((b["x"] @ p["w"]) ** 2) + p["v"].sum(), optax.sgd(0.1),
            init=lambda key: {"w": jnp.ones((4, 8)), "v": jnp.ones((4, 8))},
            batch={"x": np.ones((8, 4), np.float32)}, mesh=mesh,
            strategy=sk.Strategy(batch=P("data")))
        batch = {"x": np.ones((8, 4), np.float32)}
        state = step.init(jax.random.key(0))
        after, _ = step(state, batch)
        for _ in range(3):
            try:
                step(state, batch)
            except sk.errors.StateError as error:
                print("consumed:", type(error).__name__)
        twice = sk.TrainState(after.step, {"w": after.params["w"], "v": after.params["w"]},
                              after.opt_state, {}, after.key, after.halted)
        try:
            step(twice, batch)
        except sk.errors.StateError as error:
            print(error)
        print("alive", float(step.evaluate(after, batch)["loss"]) != 0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("consumed: StateError") == 3
    assert "state/params/w" in done.stdout
    assert "is the same buffer as state/params/v" in done.stdout
    assert "alive True" in done.stdout


def test_a_compiler_that_finds_no_room_is_a_step_that_does_not_fit(mesh, monkeypatch):
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (24.27G) exceeds available HBM (15.75G)."
    )

    def compile(*_, **__):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
    strategy = sk.Strategy(params=sk.PathRules({"w": P(None, "tensor")}), batch=P("data"))
    with pytest.raises(sk.errors.StepError) as caught:
        declared(mesh, strategy=strategy)
    head, row, fix = str(caught.value).splitlines()
    assert head == "The program does not fit on its devices."
    # w, the step counter, the key and whether it halted, and four rows of x.
    assert row == f"  each of 8 x cpu  {said} State and batch take another 109 B."
    assert fix.startswith('Fix: accumulate=2 for half the rows at a time, remat="full"')
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        declared(mesh, strategy=strategy)
