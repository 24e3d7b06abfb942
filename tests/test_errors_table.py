"""What JAX says when users err, and what is said here instead: one row, one test of the text.

Rows about meshes and rules alone are in `test_mesh.py` and `test_rules_errors.py`.
"""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from rich.console import Console

import shardkit as sk
from shardkit.hardware import CHIPS
from shardkit.parity._observe import count_compiles
from shardkit.report.memory import _memory

X = np.ones((8, 10), np.float32)
ROWS = P("data")


@pytest.fixture(scope="module")
def mesh():
    return sk.MeshSpec(data=2, model=4).build()


def loss_fn(params, batch, key):
    return jnp.mean((batch["x"] @ params["head"]["kernel"]) ** 2) + params["b"].sum()


def init(key):
    return {"head": {"kernel": jnp.ones((10, 16))}, "b": jnp.zeros(3)}


def compiled(mesh, rules, *, batch=None, spec=ROWS, on_retrace="warn", mode="auto", **given):
    return sk.compile_step(
        given.pop("loss", loss_fn),
        optax.adam(1e-3),
        init=given.pop("init", init),
        batch=batch or {"x": X},
        mesh=mesh,
        strategy=sk.Strategy(params=sk.PathRules(rules), batch=spec, **given),
        on_retrace=on_retrace,
        mode=mode,
    )


def text_of(kind, call):
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


GOOD = {"head/kernel": P(None, "model"), "**": sk.REPLICATED}

DECLARATIONS = {
    "dim not divisible": (
        {"rules": {"head/kernel": P("model"), "b": P("data")}},
        [
            "2 leaves cannot be laid out on mesh (data=2, model=4).",
            "params/head/kernel f32[10,16]",
            "dim 0 (10) is not divisible by model=4 (8 or 12 would be)",
            "params/b f32[3]",
            "dim 0 (3) is not divisible by data=2 (2 or 4 would be)",
            "MeshSpec(model=2)",
        ],
    ),
    "axis typo": (
        {"rules": {"head/kernel": P("modle"), "**": sk.REPLICATED}},
        [
            "params/head/kernel f32[10,16]",
            'PathRules["head/kernel"]',
            "uses axis 'modle'; mesh has data=2, model=4. Did you mean 'model'?",
        ],
    ),
    "spec longer than rank": (
        {"rules": {"head/kernel": P("data", "model", None), "**": sk.REPLICATED}},
        ["params/head/kernel f32[10,16]", "has 3 entries for 2 dims", "P('data', 'model')"],
    ),
    "duplicate axis": (
        {"rules": {"head/kernel": P("data", "data"), "**": sk.REPLICATED}},
        ["params/head/kernel f32[10,16]", "uses axis 'data' twice, for dims 0 and 1"],
    ),
    "specs tree lacks a key": (
        {"rules": {"head/kernel": P(None, "model")}},
        ["params/b f32[3]", "no rule decides it", "sk.first_match(strategy.params, sk.REPLICATED)"],
    ),
    "batch of 7 over data=2": (
        {"rules": GOOD, "batch": {"x": np.ones((7, 10), np.float32)}},
        ["batch/x f32[7,10]", "global batch 7 must be a multiple of 2", "6 or 8"],
    ),
    "batch of 6 over 8": (
        {
            "rules": GOOD,
            "batch": {"x": np.ones((6, 10), np.float32)},
            "spec": P(("data", "model")),
        },
        ["global batch 6 must be a multiple of 8 (data=2 x model=4 shard the batch dim)"],
    ),
}


@pytest.mark.parametrize("row", DECLARATIONS)
def test_a_declaration_that_does_not_fit(mesh, row):
    given, expected = DECLARATIONS[row]
    text = text_of(sk.errors.ShardingError, lambda: compiled(mesh, **given))
    for part in expected:
        assert part in text, (part, text)
    assert "Fix:" in text


def test_a_constraint_that_does_not_divide_is_not_replicated_silently(mesh):
    def constrained(params, batch, key):
        x = sk.nn.constrain(batch["x"], "batch", "embed")
        return jnp.mean(x @ params["head"]["kernel"]) + params["b"].sum()

    table = sk.AxisRules({"batch": "data", "embed": "model"})
    text = text_of(
        sk.errors.ShardingError, lambda: compiled(mesh, GOOD, loss=constrained, activations=table)
    )
    assert "constrain('batch', 'embed') f32[8,10]" in text
    assert "dim 1 (10) is not divisible by model=4" in text


def test_scalars_are_replicated_whatever_the_rule_says(mesh):
    def made(key):
        return {**init(key), "scale": jnp.ones(())}

    rules = {"head/kernel": P(None, "model"), "b": sk.REPLICATED, "scale": P("data")}
    step = compiled(mesh, rules, init=made)
    assert step.shardings.params["scale"].spec == P()
    assert step.shardings.opt_state[0].count.spec == P()


@pytest.fixture(scope="module")
def step(mesh):
    return compiled(mesh, GOOD, on_retrace="error")


@pytest.fixture(scope="module")
def lenient(mesh):
    return compiled(mesh, GOOD)


def test_donated_state_used_again_names_a_leaf_and_the_right_line(step):
    state = step.init(jax.random.key(0))
    step(state, {"x": X})
    text = text_of(sk.errors.StateError, lambda: step(state, {"x": X}))
    assert "params/b" in text
    assert "donated to an earlier step" in text
    assert "state, metrics = step(state, batch)" in text


def test_donated_array_read_later_is_named_wherever_the_toolkit_sees_it(step, tmp_path):
    state = step.init(jax.random.key(0))
    fed = step.shard_batch({"x": X})
    after, _ = step(state, fed)
    for call in (step.evaluate, step.gradients):
        text = text_of(sk.errors.StateError, lambda call=call: call(state, fed))
        assert "step, params/b, params/head/kernel" in text
    # What a step has consumed, fed as part of a batch.
    for call in (lambda batch: step(after, batch), step.shard_batch):
        text = text_of(
            sk.errors.StateError, lambda call=call: call({"x": state.params["head"]["kernel"]})
        )
        assert "The batch was donated." in text
        assert "batch  x: donated to an earlier step" in text
    text = text_of(sk.errors.StateError, lambda: sk.Checkpointer(tmp_path / "run").save(1, state))
    assert "A donated state cannot be saved." in text
    assert "step, params/b, params/head/kernel" in text
    assert not (tmp_path / "run").exists()
    # Read by hand it is JAX that answers, with an error and no crash.
    with pytest.raises(RuntimeError, match="Array has been deleted"):
        np.asarray(state.params["b"])
    assert int(step(after, fed)[0].step) == 2


def test_two_leaves_of_one_buffer_are_named_both(step):
    state = step.init(jax.random.key(0))
    adam = state.opt_state[0]
    alias = jax.device_put(state.params["b"], state.params["b"].sharding)
    shared = adam._replace(mu={**adam.mu, "b": alias})
    twice = sk.TrainState(
        state.step,
        state.params,
        (shared, *state.opt_state[1:]),
        state.model_state,
        state.key,
        state.halted,
    )
    text = text_of(sk.errors.StateError, lambda: step(twice, {"x": X}))
    assert "state/opt_state/0/mu/b" in text
    assert "is the same buffer as state/params/b" in text
    assert "jnp.copy" in text


def test_a_batch_on_other_devices_names_the_leaf_and_both_places(step):
    state = step.init(jax.random.key(0))
    away = jax.device_put(X, jax.devices()[1])
    text = text_of(sk.errors.BatchError, lambda: step(state, {"x": away}))
    assert "batch/x" in text
    assert "is committed to 1 device; the step has it as P('data'" in text
    assert "pass host numpy, or step.shard_batch(batch)" in text


def test_an_argument_laid_out_otherwise_names_the_leaf_and_both_specs(step, mesh):
    state = step.init(jax.random.key(0))
    kernel = jax.device_put(state.params["head"]["kernel"], jax.NamedSharding(mesh, P("data")))
    moved = sk.TrainState(
        state.step,
        {**state.params, "head": {"kernel": kernel}},
        state.opt_state,
        {},
        state.key,
        state.halted,
    )
    text = text_of(sk.errors.StateError, lambda: step(moved, {"x": X}))
    assert "state/params/head/kernel" in text
    assert "on 8 devices as P('data',); the step has it as P(None, 'model')" in text


def test_explicit_collectives_name_the_leaf_too(mesh):
    text = text_of(
        sk.errors.ShardingError,
        lambda: sk.compile_step(
            loss_fn,
            optax.adam(1e-3),
            init=init,
            batch={"x": X},
            mesh=mesh,
            strategy=sk.Strategy(params=sk.PathRules({"**": P("model")}), batch=ROWS),
            mode="shard_map",
        ),
    )
    assert "params/head/kernel f32[10,16]" in text
    assert "dim 0 (10) is not divisible by model=4" in text


def test_an_update_of_another_form_names_its_leaves(mesh):
    plain = optax.sgd(0.1)

    def update(grads, state, params=None):
        grads = {"head": {"kernel": grads["head"]["kernel"][:3]}, "more": grads["b"]}
        return grads, state

    text = text_of(
        sk.errors.StepError,
        lambda: sk.compile_step(
            loss_fn,
            optax.GradientTransformation(plain.init, update),
            init=init,
            batch={"x": X},
            mesh=mesh,
            strategy=sk.Strategy(params=sk.PathRules({"**": sk.REPLICATED}), batch=ROWS),
        ),
    )
    assert "params/head/kernel  is f32[10,16]; its update is f32[3,16]" in text
    assert "params/b            is f32[3]; its update is absent" in text
    assert "params/more         is absent; its update is f32[3]" in text


def test_a_key_that_is_used_twice_is_an_error_where_asked_for(mesh):
    def twice(params, batch, key):
        noise = jax.random.normal(key, (3,)) + jax.random.normal(key, (3,))
        return (params["b"] * noise).sum()

    def compile_(loss, **given):
        strategy = sk.Strategy(params=sk.PathRules({"**": sk.REPLICATED}), batch=ROWS)
        options = {"init": init, "batch": {"x": X}, "mesh": mesh, "strategy": strategy}
        return sk.compile_step(loss, optax.sgd(0.1), **options, **given)

    text = text_of(sk.errors.StepError, lambda: compile_(twice, debug=True))
    assert "loss_fn  uses a random key twice: " in text
    assert "already consumed" in text
    assert "first, second = jax.random.split(key)" in text
    assert not compile_(twice).spec.debug


@pytest.mark.parametrize("collective", [jax.lax.psum, jax.lax.pmean, jax.lax.all_gather])
def test_axis_typo_of_a_collective_in_a_loss_on_shards(mesh, collective):
    def misspelt(params, batch, key):
        return jnp.sum(collective(jnp.mean(batch["x"]) * params["b"].sum(), "dat"))

    rules = {"**": sk.REPLICATED}
    loss = sk.ShardMapLoss(misspelt, loss_fn)
    text = text_of(sk.errors.StepError, lambda: compiled(mesh, rules, loss=loss, mode="shard_map"))
    assert "The loss names a mesh axis that does not exist." in text
    assert f"{collective.__name__}(..., 'dat')" in text
    assert "the mesh has data=2, model=4. Did you mean 'data'?" in text
    assert "Fix: one of 'data', 'model'" in text


OWN_SHARD_MAP = {
    "psum": (lambda x: jax.lax.psum(x.sum(), "dat"), ROWS, "psum(..., 'dat')"),
    "all_to_all": (lambda x: jax.lax.all_to_all(x, ("dat",), 0, 0), ROWS, "all_to_all(..., 'dat')"),
    "axis_index": (lambda x: x.sum() + jax.lax.axis_index("dat"), ROWS, "axis_index(..., 'dat')"),
    "spec": (
        lambda x: jax.lax.psum(x.sum(), "data"),
        P("dat"),
        "shard_map(in_specs=... 'dat' ...)",
    ),
}


@pytest.mark.parametrize("row", OWN_SHARD_MAP)
def test_axis_typo_in_a_shard_map_of_the_users_own(mesh, row):
    body, spec, call = OWN_SHARD_MAP[row]

    def misspelt(params, batch, key):
        mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=P())
        return mapped(batch["x"]) + params["b"].sum()

    text = text_of(
        sk.errors.StepError, lambda: compiled(mesh, {"**": sk.REPLICATED}, loss=misspelt)
    )
    assert "The loss names a mesh axis that does not exist." in text
    assert f"{call}  the mesh has data=2, model=4. Did you mean 'data'?" in text


def test_what_a_loss_itself_asserts_is_told_as_it_is(mesh):
    def checked(params, batch, key):
        def row(x):
            raise AssertionError

        return jax.vmap(row, axis_name="rows")(batch["x"]).sum()

    with pytest.raises(AssertionError) as caught:
        compiled(mesh, {"**": sk.REPLICATED}, loss=checked)
    assert not isinstance(caught.value, sk.ShardkitError)


def test_out_of_memory_is_foreseen_before_anything_is_put_on_a_device(step, tmp_path, monkeypatch):
    small = dataclasses.replace(CHIPS["h100"], memory=512)
    monkeypatch.setattr(_memory, "identify_chip", lambda kind: small)
    made = []
    monkeypatch.setattr(type(step), "init", lambda *args: made.append(args))
    run = sk.Trainer(step, lambda i: {"x": X}, tmp_path / "run", console=Console(quiet=True))
    text = text_of(sk.errors.StepError, run.run)
    assert "The step does not fit on its devices." in text
    assert "each of 8 x cpu  needs " in text
    # The kernel over `model` (160 B) and b; twice that for Adam's moments, and its count.
    assert " of 512 B: params 172 B, opt_state 348 B, batch 160 B, temp " in text
    assert "split opt_state over 'data' too: " in text
    assert not made
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(_memory, "identify_chip", lambda kind: CHIPS["h100"])
    step.check_memory()


CAUSES = {
    "shape": (np.ones((4, 10), np.float32), "shape: declared as f32[8,10], is f32[4,10]"),
    "dtype": (X.astype(np.int32), "dtype: declared as f32[8,10], is i32[8,10]"),
    "both": (np.ones((4, 10), np.int32), "shape and dtype: declared as f32[8,10], is i32[4,10]"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_recompile_for_another_form_of_the_batch_warns_once_and_trains_on(lenient, mesh, cause):
    x, expected = CAUSES[cause]
    state, before = lenient.init(jax.random.key(0)), lenient.report().compiles
    with pytest.warns(sk.RetraceWarning) as told:
        placed = lenient.shard_batch({"x": x})
    text = str(told[0].message)
    assert text.startswith(
        f"The step compiles another batch variant; it now has {before + 1}.\n"
        f"  batch/x  changed its {expected}\nFix: pad all batches alike"
    )
    assert told[0].filename == __file__
    state, metrics = lenient(state, placed)
    with count_compiles() as compiled_since:
        state, _ = lenient(state, {"x": x})
        state, _ = lenient(state, {"x": X})
    assert compiled_since == [0]
    assert int(state.step) == 3
    alone = compiled(mesh, GOOD, batch={"x": x})
    assert metrics["loss"] == alone(alone.init(jax.random.key(0)), {"x": x})[1]["loss"]
    report = lenient.report()
    assert report.compiles == before + 1
    (found,) = [one for one in report.findings if one.kind == "second_compile"]
    assert f"the step was compiled {before + 1} times" in found.why
    with pytest.raises(sk.errors.BudgetError, match="compiles"):
        report.check(sk.Budget(compiles=1))


@pytest.mark.filterwarnings("ignore::shardkit.RetraceWarning")
@pytest.mark.parametrize("run", ["__call__", "gradients", "evaluate"])
def test_a_batch_that_the_loss_cannot_take_is_named_leaf_by_leaf(mesh, run):
    step = compiled(mesh, GOOD)
    state = step.init(jax.random.key(0))
    with pytest.raises(sk.errors.BatchError) as told:
        getattr(step, run)(state, {"x": np.ones((8, 9), np.float32)})
    text = str(told.value)
    assert "batch/x  changed its shape: declared as f32[8,10], is f32[8,9]" in text
    assert "loss_fn  cannot be traced with it: dot_general requires contracting dim" in text
    assert isinstance(told.value.__cause__, TypeError)
    step(state, {"x": X})


def test_a_form_that_was_not_used_for_long_compiles_again(mesh, monkeypatch):
    monkeypatch.setattr("shardkit.step._batch_variants.KEPT", 2)
    step = compiled(mesh, GOOD)
    batches = {n: np.ones((n, 10), np.float32) for n in (4, 12, 16)}

    def forms_compiled(*rows):
        before = step.report().compiles
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sk.RetraceWarning)
            for n in rows:
                step.shard_batch({"x": batches[n]})
        return step.report().compiles - before

    assert forms_compiled(4, 12, 4, 12) == 2
    assert forms_compiled(4, 16) == 1  # lets go of 12, which was used before 4
    assert forms_compiled(4, 16) == 0
    assert forms_compiled(12, 4) == 2
    _, metrics = step(step.init(jax.random.key(0)), {"x": batches[12]})
    assert np.isfinite(metrics["loss"])


def test_recompile_by_sharding_names_both_places_and_by_weak_type_does_not_happen(lenient, mesh):
    state = lenient.init(jax.random.key(0))
    turned = jax.device_put(X, jax.NamedSharding(mesh, P("model")))
    text = text_of(sk.errors.BatchError, lambda: lenient(state, {"x": turned}))
    assert "is committed to 8 devices as P('model',); the step has it as P('data',)" in text
    weak = jnp.broadcast_to(jnp.asarray(1.0), (8, 10))
    weak_b = jnp.broadcast_to(jnp.asarray(0.0), (3,))
    assert weak.weak_type
    assert weak_b.weak_type
    # Moving an array is a program of its own.
    placed = lenient.shard_batch({"x": weak}), lenient.shard_batch({"x": X})
    weak_b = jax.device_put(weak_b, jax.NamedSharding(mesh, P()))
    with count_compiles() as compiled_since:
        state, _ = lenient(state, placed[0])
        params = {**state.params, "b": weak_b}
        state, _ = lenient(dataclasses.replace(state, params=params), placed[1])
    assert compiled_since == [0]
    assert not state.params["b"].weak_type


def test_recompile_that_is_no_legal_batch_is_an_error(lenient):
    state = lenient.init(jax.random.key(0))
    for wrong in (X[:7], X[0], X[None]):
        text = text_of(sk.errors.BatchError, lambda wrong=wrong: lenient(state, {"x": wrong}))
        assert "; the step was compiled for f32[8,10]" in text
    longer = {**state.params, "b": jnp.zeros(4)}
    text = text_of(
        sk.errors.StateError, lambda: lenient(dataclasses.replace(state, params=longer), {"x": X})
    )
    assert "state/params/b" in text
    assert "is f32[4]; the step has f32[3]" in text


def test_what_would_be_a_second_trace_names_the_leaf_or_compiles_nothing(step):
    state = step.init(jax.random.key(0))
    text = text_of(sk.errors.BatchError, lambda: step(state, {"x": X.astype(np.int32)}))
    assert "batch/x" in text
    assert "is i32[8,10]; the step was compiled for f32[8,10]" in text
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
    text = text_of(
        sk.errors.StateError, lambda: step(dataclasses.replace(state, params=half), {"x": X})
    )
    assert "state/params/b" in text
    assert "is bf16[3]; the step has f32[3]" in text
    # Uncommitted, weakly typed or wider than the step's: none of them is another program.
    weak = jnp.broadcast_to(jnp.asarray(1.0), (8, 10))
    assert weak.weak_type
    # Moving an array is a program of its own, which `put` has made.
    placed = [step.shard_batch({"x": x}) for x in (jnp.asarray(X), X.astype(np.float64), weak)]
    with count_compiles() as compiled_since:
        for batch in placed:
            state, _ = step(state, batch)
    assert compiled_since == [0]


def test_another_shape_is_an_error_where_that_is_declared(step):
    state = step.init(jax.random.key(0))
    text = text_of(sk.errors.BatchError, lambda: step(state, {"x": X[:4]}))
    assert "is f32[4,10]; the step was compiled for f32[8,10]" in text
    assert "pass the declared shapes, or compile_step again" in text


@pytest.mark.parametrize("key", [0, np.uint32([0, 0])])
def test_an_int_or_raw_words_as_key(step, key):
    text = text_of(sk.errors.StateError, lambda: step.init(key))
    assert "one typed key" in text
    assert "step.init(jax.random.key(0))" in text


def test_the_same_key_gives_other_noise_to_every_row_of_the_batch(mesh):
    def noisy(params, batch, key):
        noise = jax.random.normal(key, (batch["x"].shape[0],))
        return params["b"].sum(), {"mean": noise.mean(), "square": jnp.square(noise).mean()}

    made = compiled(mesh, {"**": sk.REPLICATED}, loss=noisy, accumulate=2)
    _, metrics = made(made.init(jax.random.key(0)), {"x": X})
    assert float(metrics["square"]) > float(metrics["mean"]) ** 2
