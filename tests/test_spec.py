"""`StepSpec`: one frozen value that checks itself, and that everything takes."""

import copy
import dataclasses
import inspect
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.config import CompileConfig
from shardkit.step import compile_step
from shardkit.sweeps._spec_factory import axis_names
from shardkit.testing import assert_matches_one_device, kill_matrix

X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)
STRATEGY = sk.Strategy(
    params=sk.PathRules(
        {"**/up/kernel": P(None, "tensor"), "**/down/kernel": P("tensor", None), "**": P()}
    ),
    batch=P("data"),
)


def init(key):
    up, down = jax.random.split(key)
    return {
        "up": {"kernel": jax.random.normal(up, (4, 16))},
        "down": {"kernel": jax.random.normal(down, (16, 4))},
        "bias": jnp.zeros(4),
    }


def loss_fn(params, batch, key):
    hidden = jnp.tanh(batch["x"] @ params["up"]["kernel"])
    return jnp.mean((hidden @ params["down"]["kernel"] + params["bias"] - batch["x"]) ** 2)


def spec_of(**changes):
    fields = {
        "loss_fn": loss_fn,
        "optimizer": optax.sgd(0.1),
        "init": init,
        "batch": {"x": X},
        "strategy": STRATEGY,
    }
    return sk.StepSpec(**fields | changes)


@pytest.fixture(scope="module")
def mesh():
    return sk.MeshSpec(data=2, tensor=4).build()


@pytest.fixture(scope="module")
def spec():
    return spec_of()


@pytest.fixture(scope="module")
def step(spec, mesh):
    return spec.compile(mesh)


# The value


def test_a_spec_cannot_be_changed(spec):
    for field in ("strategy", "mode", "accumulate", "remat", "precision"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(spec, field, getattr(spec, field))
    with pytest.raises(TypeError):
        sk.StepSpec(loss_fn, optax.sgd(0.1))


def test_options_given_beside_a_strategy_are_the_strategys():
    optimizer = optax.sgd(0.1)
    beside = spec_of(optimizer=optimizer, accumulate=2, remat="full", precision="bfloat16")
    strategy = dataclasses.replace(STRATEGY, accumulate=2, remat="full", precision="bfloat16")
    assert beside == spec_of(optimizer=optimizer, strategy=strategy)
    assert beside.strategy == strategy
    assert (beside.accumulate, beside.remat) == (sk.Accumulate(2), "full")
    assert beside.precision == sk.Precision("float32", "bfloat16")
    assert copy.copy(beside) == beside
    assert beside != spec_of(optimizer=optimizer)


@pytest.mark.parametrize("replace", [dataclasses.replace, sk.StepSpec.replace])
def test_a_new_strategy_is_not_overridden_by_what_the_old_one_said(replace):
    old = spec_of(accumulate=2, remat="full", precision="bfloat16")
    new = replace(old, strategy=dataclasses.replace(STRATEGY, accumulate=4))
    assert (new.accumulate.micro_batches, new.remat, new.precision) == (4, "none", sk.Precision())
    assert replace(old, accumulate=4).accumulate.micro_batches == 4
    assert replace(old, mode="shard_map").strategy == old.strategy
    both = replace(old, strategy=STRATEGY, remat="dots")
    assert (both.accumulate.micro_batches, both.remat) == (1, "dots")


def test_an_unknown_field_is_named_with_the_nearest_one(spec, step):
    with pytest.raises(
        sk.errors.StepError, match=r"optimiser  is not a field.*Did you mean 'optimizer'"
    ):
        spec.replace(optimiser=optax.sgd(1.0))
    with pytest.raises(
        sk.errors.StepError, match=r"acumulate  is not a field.*Did you mean 'accumulate'"
    ):
        step.replace(acumulate=2)
    with pytest.raises(
        sk.errors.StepError, match=r"a mesh is given to step\.replace or spec\.compile"
    ):
        spec.replace(mesh=step.mesh)


class Pair(NamedTuple):
    x: object
    y: object


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x,),
        lambda x: [x, [x, {}]],
        lambda x: {"x": x, "none": None},
        lambda x: {0: x, 7: (x, ())},
        lambda x: Pair(x, {"x": x}),
    ],
    ids=["bare", "tuple", "nested lists", "None leaf", "integer keys", "NamedTuple"],
)
@pytest.mark.parametrize(
    "leaf",
    [X, jnp.asarray(X), jax.ShapeDtypeStruct((8, 4), np.float32), np.float32(1)],
    ids=["numpy", "jax", "shape", "numpy scalar"],
)
def test_a_batch_is_any_tree_of_arrays_and_is_kept_as_shapes(wrap, leaf):
    batch = spec_of(batch=wrap(leaf)).batch
    shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    assert jax.tree.structure(batch) == jax.tree.structure(wrap(leaf))
    assert all(x == shape for x in jax.tree.leaves(batch))


def test_dtypes_of_a_batch_are_those_that_jax_makes_of_them():
    assert spec_of(batch=np.ones(4)).batch.dtype == jnp.float32


# Its checks


def test_everything_that_needs_no_mesh_is_one_error():
    with pytest.raises(sk.errors.StepError) as raised:
        spec_of(
            loss_fn=3,
            optimizer=optax.adamw,
            init={"w": 1},
            batch={"x": 3, "y": [X, "no"]},
            mode="aut",
            accumulate=0,
            remat="ful",
            precision="fp8",
            compiler_options=["xla"],
            on_nonfinite="skipp",
            deterministic="yes",
            debug=1,
            on_retrace="eror",
            strategy=dataclasses.replace(STRATEGY, compression=sk.GradientCompression("data")),
        )
    text = str(raised.value)
    for row in (
        "loss_fn  ",
        "is of type int",
        "optimizer  ",
        "init  ",
        "batch/x  ",
        "batch/y/1  ",
        "mode='aut'",
        "Did you mean 'auto'?",
        "0 is not a positive int",
        "remat='ful'",
        "precision='fp8'",
        "compiler_options  ",
        "on_nonfinite='skipp'",
        "deterministic  ",
        "debug  ",
        "on_retrace='eror'",
        "compression  ",
        "Fix:",
        "optax.adamw(1e-3), called",
        'mode="shard_map"',
    ):
        assert row in text, (row, text)
    with pytest.raises(
        sk.errors.StepError, match=r"strategy  is of type dict[\s\S]*sk\.Strategy\("
    ):
        spec_of(strategy={"w": P()}, remat="ful")
    with pytest.raises(sk.errors.StepError, match=r"batch  is of type float"):
        spec_of(batch=1.0)


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({"precision": 8}, "precision  expected str or Precision, got 8"),
        ({"remat": True}, "remat  expected str, got True"),
        ({"accumulate": "2"}, "accumulate  expected int or Accumulate, got '2'"),
    ],
)
def test_an_option_that_cannot_be(changes, row):
    with pytest.raises(sk.errors.StepError) as raised:
        spec_of(**changes)
    text = str(raised.value)
    assert row in text
    assert "Fix:" in text


def test_what_only_a_mesh_decides_is_one_error_of_compile():
    manual = (AxisType.Manual, AxisType.Auto)
    wrong = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"), axis_types=manual)
    compressed = dataclasses.replace(STRATEGY, compression=sk.GradientCompression("dat"))
    spec = spec_of(strategy=compressed, mode="shard_map")
    with pytest.raises(sk.errors.StepError) as raised:
        spec.compile(wrong)
    assert "mesh axis 'data'  is of type Manual" in str(raised.value)
    assert "Did you mean 'data'?" in str(raised.value)
    for mesh, why in (
        (
            sk.MeshSpec(data=2),
            r"is a MeshSpec that is not built yet\nFix: sk.MeshSpec\(.*\).build\(\)",
        ),
        (None, "is of type NoneType"),
    ):
        with pytest.raises(sk.errors.StepError, match=why):
            spec.compile(mesh)


# The short form


def test_the_short_form_has_the_options_of_a_spec_and_their_defaults():
    short = dict(inspect.signature(compile_step).parameters)
    assert short.pop("mesh").kind is inspect.Parameter.KEYWORD_ONLY
    own = inspect.signature(sk.StepSpec).parameters
    assert list(short) == list(own)
    for name, one in short.items():
        if name != "compiler_options":  # an immutable nothing for a new one
            assert one.default == own[name].default, name
        assert one.annotation == own[name].annotation or name in (
            "accumulate",
            "remat",
            "precision",
        )


def test_the_short_form_is_the_spec_compiled(step, mesh):
    options = {"mode": "auto", "accumulate": 1, "on_retrace": "warn", "deterministic": False}
    short = sk.compile_step(
        loss_fn,
        step.spec.optimizer,
        init=init,
        batch={"x": X},
        mesh=mesh,
        strategy=STRATEGY,
        **options,
    )
    assert short.spec == step.spec
    assert (short.mesh, step.mesh) == (mesh, mesh)
    assert str(short.program.jaxpr) == str(step.program.jaxpr)


def test_a_step_is_replaced_on_another_mesh_or_with_other_fields(step):
    other = step.replace(mesh=sk.MeshSpec(data=4, tensor=2).build(), accumulate=2)
    assert (dict(other.mesh.shape), other.spec.accumulate.micro_batches) == (
        {"data": 4, "tensor": 2},
        2,
    )
    assert other.spec == step.spec.replace(accumulate=2)
    assert step.spec.accumulate.micro_batches == 1


# Everything takes it


def test_the_contract(spec, mesh, tmp_path):
    step = spec.compile(mesh)
    state = step.init(jax.random.key(0))
    state, metrics = step(state, {"x": X})
    assert {"loss", "grad_norm"} <= set(metrics)
    assert int(state.step) == 1
    assert np.isfinite(step.evaluate(state, {"x": X})["loss"])
    report = step.report()
    report.check(sk.Budget(reductions_per_step={"data": 1}, involuntary_remat=0))
    certificate = sk.verify(spec, meshes=[mesh], steps=2).check()
    assert certificate.ok
    planned = sk.plan(spec, "tpu:v5e:2x2", space=sk.SearchSpace(axes=("data",), remat=("none",)))
    assert dict(planned.best.mesh) == {"data": 4}
    swept = sk.sweep(spec, devices=8, out=tmp_path / "swept")
    assert {"data=2,tensor=4", "data=8,tensor=1"} <= {r.case.key.split()[0] for r in swept.rows}
    assert swept.ranked
    assert sk.explain_rules(STRATEGY.params, jax.eval_shape(init, jax.random.key(0)), mesh)


def test_a_sweep_without_a_folder_has_its_own_and_the_options_of_the_spec(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = spec_of(accumulate=sk.Accumulate(2, reduce="every"), remat="full")
    found = sk.sweep(own, devices=1, axes=["data"])
    assert found.folder.parent == tmp_path
    (row,) = found.rows
    assert (row.case.accumulate, row.case.remat, row.status) == (2, "full", "ok")
    assert str(Path(__file__).stem) in str(found)


def test_a_sweep_of_another_spec_is_refused_in_the_same_folder(tmp_path):
    sk.sweep(spec_of(), devices=1, out=tmp_path)
    with pytest.raises(sk.errors.SweepError, match="another"):
        sk.sweep(spec_of(precision="bfloat16"), devices=1, out=tmp_path)


def test_axes_of_a_sweep_are_those_that_the_strategy_names():
    ready = sk.strategies.fsdp() | sk.strategies.tensor()
    assert axis_names(ready) == ("fsdp", "tensor")
    assert axis_names(STRATEGY) == ("data", "tensor")
    assert axis_names(sk.Strategy(params=sk.shard_largest("fsdp"))) == ("fsdp",)
    with pytest.raises(sk.errors.ConfigError, match=r"axis 'tensr'.*Did you mean 'tensor'"):
        sk.sweep(spec_of(strategy=ready), devices=8, axes=["tensr"])


def test_a_spec_of_this_process_is_not_sent_to_a_target(spec, tmp_path):
    with pytest.raises(sk.errors.SweepError) as raised:
        sk.sweep(spec, target="tpu:v5e:2x4", out=tmp_path / "new")
    text = str(raised.value)
    assert f"{__name__}:loss_fn" in text
    assert "Fix: def factory(mesh, *, accumulate, remat)" in text
    assert 'sk.sweep("MODULE:factory", target=...)' in text
    assert not (tmp_path / "new").exists()


def test_a_trainer_compiles_a_spec_for_its_mesh(spec, step, mesh, tmp_path):
    config = sk.TrainConfig(steps=2, eval_every=0, log_every=1)
    batches = lambda i: {"x": X}  # noqa: E731
    state = sk.Trainer(spec, batches, tmp_path / "run", config, mesh=mesh).run()
    assert int(state.step) == 2
    for what, given in ((spec, {}), (step, {"mesh": mesh}), (lambda: step, {"mesh": mesh})):
        with pytest.raises(sk.errors.StepError, match=r"mesh  is[\s\S]*Fix: sk\.Trainer\(spec, "):
            sk.Trainer(what, batches, tmp_path / "other", config, **given)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda given: sk.verify(given, [sk.MeshSpec(data=2)]), sk.errors.VerificationError),
        (lambda given: sk.plan(given, "tpu:v5e:2x2"), sk.errors.MeshError),
        (lambda given: sk.sweep(given, devices=8), sk.errors.ConfigError),
        (
            lambda given: assert_matches_one_device(given, sk.MeshSpec(data=2)),
            sk.errors.VerificationError,
        ),
        (
            lambda given: kill_matrix(given, sk.MeshSpec(data=8).build()),
            sk.errors.VerificationError,
        ),
    ],
    ids=["verify", "plan", "sweep", "assert_matches_one_device", "kill_matrix"],
)
def test_a_compiled_step_where_a_spec_is_taken_says_step_spec(step, call, kind):
    with pytest.raises(kind, match=r"is of type CompiledStep\nFix: step\.spec"):
        call(step)
    with pytest.raises(kind, match=r"\n  (spec|7) .*int\nFix: "):
        call(7)


def test_assertions_take_a_spec(spec):
    assert assert_matches_one_device(spec, sk.MeshSpec(data=2, tensor=2), steps=2).ok


def test_a_config_becomes_a_spec_in_one_place():
    compiling = CompileConfig(mode="shard_map", options=("xla_first=true",), deterministic=True)
    config = sk.Config(compile=compiling)
    made = config.step_spec()
    assert (made.mode, made.deterministic, made.on_nonfinite) == ("shard_map", True, "stop")
    assert made.compiler_options == {"xla_first": True}
    assert made.strategy == config.strategy
    assert made.batch["inputs"].shape == (config.data.batch_size, config.data.seq_len)
