"""Typed overrides, config files, and what is said when either is wrong."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax
import pytest

from shardkit._core.errors import ConfigError, DataError, MeshError, ShardkitError
from shardkit._core.options import matches_annotation
from shardkit.config import (
    Config,
    OptimizerConfig,
    apply_overrides,
    from_record,
    load_config,
    to_record,
)
from shardkit.config._values import BadValue, parse
from shardkit.data import DataConfig
from shardkit.lm import SIZES, TextTrainConfig
from shardkit.mesh import MeshSpec, Target
from shardkit.run import TrainConfig
from shardkit.targets import StepSource, compile_for

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def refused(*assignments: str) -> str:
    with pytest.raises(ConfigError) as error:
        apply_overrides(Config(), assignments)
    return str(error.value)


def written(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "mine.py"
    imports = "from shardkit.config import *; from shardkit.lm import TextTrainConfig"
    path.write_text(f"{imports}\n{body}")
    return path


# --- values


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (int, "-3", -3),
        (float, "1e-3", 1e-3),
        (bool, "False", False),
        (bool, "yes", True),
        (str, "a=b", "a=b"),
        (str | None, "None", None),
        (str | None, "text", "text"),
        (int | None, "4", 4),
        (Literal["a", 2], "2", 2),
        (tuple[int, ...], "1,2,3", (1, 2, 3)),
        (tuple[float, float], "(0.9, 0.95)", (0.9, 0.95)),
    ],
)
def test_text_is_read_by_annotation(annotation, text, value):
    found = parse(annotation, text)
    assert found == value
    assert type(found) is type(value)
    assert matches_annotation(annotation, found)


@pytest.mark.parametrize(
    ("annotation", "text", "message"),
    [
        (int, "two", "expected int, got 'two'."),
        (int, "1.5", "expected int, got '1.5'."),
        (bool, "2", "expected true or false, got '2'."),
        (float | None, "fast", "expected float or none, got 'fast'."),
        (Literal["adamw", "sgd"], "adm", "expected 'adamw' or 'sgd', got 'adm'."),
        (tuple[float, float], "0.9", "expected float,float, got '0.9'."),
    ],
)
def test_text_of_another_type_is_refused(annotation, text, message):
    with pytest.raises(BadValue) as error:
        parse(annotation, text)
    assert str(error.value) == message


# --- overrides


def test_each_field_can_be_set_and_nothing_else_changes():
    config = apply_overrides(
        Config(),
        [
            "name=mine",
            "model.num_layers=2",
            "data.path=/some/text",
            "devices=cpu:4",
            "mesh.tensor=2",
            "strategy.accumulate=2",
            "strategy.remat=full",
            "optimizer.grad_clip_norm=none",
            "optimizer.betas=0.8,0.9",
            "train.baselines=false",
        ],
    )
    assert config.model == dataclasses.replace(Config().model, num_layers=2)
    assert config.data == DataConfig(path="/some/text")
    assert (config.name, config.devices) == ("mine", "cpu:4")
    assert config.mesh == MeshSpec(data=-1, tensor=2)
    assert config.strategy == dataclasses.replace(Config().strategy, accumulate=2, remat="full")
    assert config.optimizer == dataclasses.replace(
        Config().optimizer, grad_clip_norm=None, betas=(0.8, 0.9)
    )
    assert config.train == dataclasses.replace(Config().train, baselines=False)


def test_whole_subtrees_have_names_and_short_forms():
    config = apply_overrides(
        Config(),
        [
            "model=llama2-7b",
            "model.num_layers=4",
            "strategy=fsdp | tensor(sequence=True)",
            "strategy.accumulate=2",
            "mesh=fsdp=4,tensor=2",
        ],
    )
    assert config.model == dataclasses.replace(SIZES["llama2-7b"], num_layers=4)
    assert [str(kind) for kind in config.strategy.kinds] == ["fsdp", "tensor+sequence"]
    assert config.strategy.accumulate == 2
    assert config.mesh == MeshSpec(fsdp=4, tensor=2)


def test_fields_of_one_group_are_checked_together():
    config = apply_overrides(Config(), ["data.overlap=300", "data.seq_len=512"])
    assert (config.data.seq_len, config.data.overlap) == (512, 300)


def test_the_later_of_two_wins():
    assert apply_overrides(Config(), ["train.steps=1", "train.steps=2"]).train.steps == 2


def test_an_unknown_field_lists_the_legal_ones_and_the_nearest():
    message = refused("model.num_layer=2")
    assert message.startswith("1 override cannot be applied.\n  --set model.num_layer=2  ")
    assert (
        "model has no field 'num_layer'; it has vocab, embed_dim, num_layers, num_heads," in message
    )
    assert message.endswith("Did you mean 'num_layers'?")


def test_every_bad_override_is_in_one_message():
    message = refused(
        "train.steps=two", "modle.layers=2", "mesh.tenser=2", "nonsense", "train.seed.x=1"
    )
    assert message.startswith("5 overrides cannot be applied.")
    assert "--set train.steps=two" in message
    assert "expected int, got 'two'." in message
    assert "the config has no field 'modle'" in message
    assert "Did you mean 'model'?" in message
    assert "mesh has no field 'tenser'; it has data, tensor. Did you mean 'tensor'?" in message
    assert "--set nonsense" in message
    assert "is not of the form path.to.field=value." in message
    assert "train.seed is 0 which has no fields." in message


def test_what_cannot_be_read_is_told_before_what_a_group_refuses():
    message = refused("data.seq_len=0", "mesh.tensor=0", "train.seed=x", "modle=1")
    assert message.startswith("2 overrides cannot be applied.")
    with pytest.raises(DataError, match=r"data\.seq_len=0"):
        apply_overrides(Config(), ["data.seq_len=0", "mesh.tensor=0"])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model=lama2-7b", "no size 'lama2-7b'; known: nano, "),
        ("model=lama2-7b", "Did you mean 'llama2-7b'?"),
        ("strategy=fsdp|tensr", "no strategy 'tensr'; known: "),
        ("strategy=tensor(seq=1)", "tensor has options axis, sequence, kv_heads, not 'seq'."),
        ("strategy=fsdp(", "expected strategies such as data|tensor(sequence=True)"),
        ("strategy=__import__('os')", "expected strategies such as"),
        ("mesh=data", "expected axis=size,axis=size, got 'data'."),
        ("mesh=data=1,data=2", "an axis has two sizes in 'data=1,data=2'."),
        ("mesh=data=2,dcn.data=1,dcn.data=2", "an axis has two sizes"),
        ("mesh=data=2,dcn=2", "slices are set per axis: dcn.data=2."),
        ("train=5", "is a group of fields, set one of them: steps, seed, "),
        ("train.seed=abc", "expected int, got 'abc'."),
        ("optimizer.name=adam", "expected 'adamw' or 'lion' or 'muon' or 'sgd', got 'adam'."),
        ("model.vocab=100", "text is read by the byte, which takes 256 tokens."),
        ("optimizer.warmup_fraction=2", "optimizer.warmup_fraction=2"),
        ("train.steps=0", "train.steps=0"),
    ],
)
def test_a_bad_value_says_what_is_legal(assignment, message):
    assert message in refused(assignment)


def test_a_mesh_size_is_checked_by_the_mesh():
    with pytest.raises(MeshError, match="tensor=0"):
        apply_overrides(Config(), ["mesh.tensor=0"])


# --- files


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_loads_and_its_mesh_fits_its_devices(path):
    config = load_config(path)
    n = Target.parse(config.devices).n_devices
    assert n is not None
    sizes = config.mesh.resolve(n)
    assert {kind.axis for kind in config.strategy.kinds} == set(sizes)
    assert config.name == path.stem
    doc = path.read_text().split('"""')[1]
    assert f"shardkit train configs/{path.name}" in doc
    assert json.loads(json.dumps(to_record(config)))["name"] == path.stem


def test_a_config_file_is_loaded_and_overridden(tmp_path):
    path = written(tmp_path, "def config():\n    return Config(name='mine')\n")
    config = load_config(path, ["train.steps=7"])
    assert (config.name, config.train.steps) == ("mine", 7)
    assert load_config() == Config()


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "default.py").write_text("")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "defalt.py")
    assert "There is no such config." in str(error.value)
    assert f"Did you mean {str(tmp_path / 'default.py')!r}?" in str(error.value)
    assert "Fix: one of " in str(error.value)


def test_a_shipped_config_is_loaded_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("nano", ["train.steps=3"]).train.steps == 3
    assert load_config("nano").model == SIZES["nano"]
    (tmp_path / "nano.py").write_text(
        "from shardkit.config import *\ndef config(): return Config()"
    )
    assert load_config("nano.py") == Config()
    with pytest.raises(ConfigError, match="Did you mean 'nano"):
        load_config("nan")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1", "defines no function config()."),
        ("def config():\n    return 5", "config() returned int, not sk.Config."),
        ("def config():\n    return nonsense", ":3  NameError: name 'nonsense' is not defined"),
        ("def config(:\n    pass", ":2  SyntaxError: "),
        ("import no_such_package", ":2  ModuleNotFoundError: No module named 'no_such_package'"),
        (
            "def config():\n    return Config(train=TextTrainConfig(step=5))",
            ":3  TypeError: TextTrainConfig.__init__() got an unexpected keyword argument 'step'; "
            "it has steps, seed, ",
        ),
        ("def config():\n    return Config(dat=5)", "Did you mean 'data'?"),
        ("def config():\n    return Config(devices=8)", "devices"),
        ("def config():\n    return Config(devices=8)", "expected str, got 8."),
        ("def config():\n    return Config(data=5)", "expected DataConfig, got 5."),
        (
            "from shardkit import *\ndef config():\n    return Config(train=TrainConfig(steps=7))",
            "train  expected TextTrainConfig, got TrainConfig(steps=7, ",
        ),
    ],
)
def test_a_broken_file_is_told_in_one_line_with_its_place(tmp_path, body, message):
    path = written(tmp_path, body)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_a_field_of_another_type_says_its_name_its_type_and_where_it_stands(tmp_path):
    path = written(tmp_path, "def config():\n    return Config(train=TextTrainConfig(seed='x'))")
    with pytest.raises(ConfigError, match=r"train.seed +expected int, got 'x'") as error:
        load_config(path)
    assert error.value.__notes__ == [f"(in {path}:3)"]


def test_an_error_of_the_declaration_says_where_it_stands(tmp_path):
    path = written(tmp_path, "def config():\n    return Config(train=TextTrainConfig(steps=0))")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert error.value.__notes__ == [f"(in {path}:3)"]


# --- optimizers

PARAMS = {
    "embedding": jnp.ones((8, 4)),
    "layers": {
        "query": jnp.ones((2, 4, 2, 2)),
        "out": jnp.ones((2, 2, 2, 4)),
        "attn_norm": jnp.ones((2, 4)),
    },
}


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_an_optimizer_moves_every_leaf_and_decays_no_norm(name):
    optimizer = OptimizerConfig(name=name, warmup_fraction=0.0).build(10)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    for gradients, still in ((PARAMS, set()), (zero, {"attn_norm"})):
        updates, _ = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
        norms = {name: float(jnp.abs(x).max()) for name, x in updates["layers"].items()}
        assert {name for name, size in norms.items() if size == 0} == still


def test_muon_makes_the_update_of_each_layer_orthogonal():
    key = jax.random.key(0)
    gradients = jax.tree.map(lambda x: jax.random.normal(key, x.shape), PARAMS)
    config = OptimizerConfig(
        name="muon", warmup_fraction=0.0, weight_decay=0.0, muon_lr=1.0, grad_clip_norm=None
    )
    optimizer = config.build(10)
    updates, _ = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
    for matrix in [
        *updates["layers"]["query"].reshape(2, 4, 4),
        *updates["layers"]["out"].reshape(2, 4, 4),
    ]:
        singular = jnp.linalg.svd(matrix, compute_uv=False)
        assert 0.5 < float(singular.min()) <= float(singular.max()) < 1.3


def test_the_schedule_warms_up_and_falls_to_its_last_share():
    rate = OptimizerConfig(lr=1.0, warmup_fraction=0.1, final_lr_fraction=0.2).schedule(100, 1.0)
    assert [float(rate(i)) for i in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])
    assert float(rate(100)) == pytest.approx(0.2)


def test_a_large_gradient_is_clipped_to_the_declared_norm():
    config = OptimizerConfig(
        name="sgd", lr=1.0, warmup_fraction=0.0, grad_clip_norm=0.5, weight_decay=0.0
    )
    optimizer = config.build(10)
    updates, _ = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.5)


def test_defaults_are_the_documented_run():
    config = Config()
    assert config.devices == "cpu:8"
    assert config.mesh.resolve(8) == {"data": 2, "tensor": 4}
    assert config.train == TextTrainConfig()


def test_what_only_text_needs_is_no_field_of_a_trainer():
    text = {"eval_batches", "sample", "temperature", "baselines", "export", "export_adapter", "out"}
    common, own = ({f.name for f in dataclasses.fields(c)} for c in (TrainConfig, TextTrainConfig))
    assert own - common == text
    assert not text & common
    with pytest.raises(ConfigError) as error:
        TextTrainConfig(steps=0, sample=-1, temperature=0.0)
    for field in ("train.steps=0", "train.sample=-1", "train.temperature=0"):
        assert field in str(error.value)


def test_a_record_gives_its_loop_back_whatever_the_order_of_its_fields():
    wanted = ("train.sample=7", "train.steps=9", "train.baselines=false", "train.loggers=wandb")
    config = apply_overrides(Config(), wanted)
    record = to_record(config)
    record["train"] = dict(reversed(record["train"].items()))
    assert from_record(record, "a dump").train == config.train


def test_compiler_options_reach_the_compiler():
    wrong = ("compile.options=xla_no_such_option=1", "model=nano", "mesh=data=4,tensor=2")
    with pytest.raises(ShardkitError, match="xla_no_such_option"):
        compile_for(StepSource("", wrong), "cpu:8")
    assert "compile.options='fast'  is not name=value" in refused("compile.options=fast")


def test_a_record_with_fields_of_an_older_version_is_refused_not_misread():
    record = to_record(Config())
    record["train"]["keep"] = record["train"].pop("max_to_keep")
    with pytest.raises(ConfigError, match=r"no field 'keep'.*Did you mean 'max_to_keep'"):
        from_record(record, "runs/old")


def test_a_record_of_an_older_version_is_refused_by_the_name_of_its_field():
    record = to_record(Config())
    assert from_record(record, "runs/a").data == Config().data
    record["data"]["held_out"] = record["data"].pop("validation_fraction")
    with pytest.raises(ConfigError, match=r"data has no field 'held_out'; it has path, "):
        from_record(record, "runs/a")
