"""An option of another type is refused where it is declared: `"False"` is true, `"2"` no number."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk
from shardkit._core.options import matches_annotation
from shardkit.checkpoint import RetentionPolicy
from shardkit.config import CompileConfig, OptimizerConfig
from shardkit.data import Arrays, DataConfig, Dataset, Loader
from shardkit.lm import DecoderConfig, TextTrainConfig
from shardkit.testing import kill_matrix

S = sk.strategies
DECODER = {"vocab": 8, "embed_dim": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 8}

# {name: (function of the value, what it takes)}
CALLS = {
    "reshard_after_forward": (lambda v: S.fsdp(reshard_after_forward=v), bool),
    "min_size": (lambda v: S.fsdp(min_size=v), int),
    "sequence": (lambda v: S.tensor(sequence=v), bool),
    "stage": (lambda v: S.zero(stage=v), int),
    "micro_batches": (lambda v: S.pipeline(micro_batches=v), int),
    "virtual_stages": (
        lambda v: S.pipeline(micro_batches=4, schedule="interleaved", virtual_stages=v),
        int,
    ),
    "accumulate": (lambda v: sk.Accumulate(v), int),
    "allow_unmatched": (lambda v: sk.PathRules({"**": sk.REPLICATED}, allow_unmatched=v), bool),
    "stateful": (lambda v: sk.Loss(print, print, stateful=v), bool),
    "scanned": (lambda v: sk.nn.remat(print, scanned=v), bool),
    "block": (lambda v: sk.GradientCompression("data", block=v), int),
    "data": (lambda v: sk.MeshSpec(data=v), int),
    "rows": (lambda v: Arrays(np.ones((8, 2)), v), int),
    "seed": (lambda v: Arrays(np.ones((8, 2)), 2, seed=v), int),
    "deterministic": (lambda v: step(deterministic=v), bool),
    "debug": (lambda v: step(debug=v), bool),
    "on_retrace": (lambda v: step(on_retrace=v), str),
    "on_nonfinite": (lambda v: step(on_nonfinite=v), str),
    "mode": (lambda v: step(mode=v), str),
    "independent_rows": (lambda v: step(independent_rows=v), bool),
    "axis": (lambda v: S.data(v), "text"),
    "kv_heads": (lambda v: S.tensor(kv_heads=v), str),
    "attention": (lambda v: S.context(attention=v), str),
    "schedule": (lambda v: S.pipeline(micro_batches=2, schedule=v), str),
    "outer_params": (lambda v: S.pipeline(micro_batches=2, outer_params=v), str),
    "reduce": (lambda v: sk.Accumulate(2, reduce=v), str),
    "remat": (lambda v: sk.Strategy(remat=v), "text"),
    "precision": (lambda v: sk.Strategy(precision=v), "text"),
    "Strategy.accumulate": (lambda v: sk.Strategy(accumulate=v), int),
    "compression": (lambda v: sk.Strategy(compression=v), int),
    "zero": (lambda v: sk.Strategy(zero=v), int),
    "kinds": (lambda v: sk.Strategy(kinds=v), int),
    "overrides": (lambda v: sk.Strategy(overrides=v), int),
    "names": (lambda v: sk.Strategy(names=v), int),
    "shard_largest.min_size": (lambda v: sk.shard_largest("fsdp", min_size=v), int),
    "axes": (lambda v: sk.shard_largest(v), "text"),
    "table": (lambda v: sk.AxisRules(v), "text"),
    "PathRules.table": (lambda v: sk.PathRules(v), "text"),
    "dcn": (lambda v: sk.MeshSpec(data=2, dcn=v), int),
    "memory_bytes": (lambda v: sk.Budget(memory_bytes=v), float),
    "compiles": (lambda v: sk.Budget(compiles=v), float),
    "memory": (lambda v: dataclasses.replace(sk.hardware.CHIPS["v5p"], memory=v), int),
    "steps": (lambda v: sk.verify(spec(), [MESH], steps=v), int),
    "batches": (lambda v: sk.verify(spec(), [MESH], batches=v), int),
    "meshes": (lambda v: sk.verify(spec(), v), "text"),
    "key": (lambda v: sk.verify(spec(), [MESH], key=v), int),
    "kill_matrix.steps": (lambda v: kill_matrix(spec(), MESH, steps=v), int),
    "target": (lambda v: sk.plan(spec(), v), "text"),
    "global_batch": (lambda v: planned(global_batch=v), int),
    "overlap": (lambda v: planned(overlap=v), float),
    "space": (lambda v: planned(space=v), int),
    "hardware": (lambda v: planned(hardware=v), int),
    "sweep.axes": (lambda v: sk.sweep(spec(), axes=v), "text"),
    "devices": (lambda v: sk.sweep(spec(), devices=v), int),
    "sweep.accumulate": (lambda v: sk.sweep(spec(), accumulate=v), int),
    "sweep.remat": (lambda v: sk.sweep(spec(), remat=v), "text"),
    "sweep.target": (lambda v: sk.sweep(spec(), target=v), "text"),
    "verify": (lambda v: sk.sweep(spec(), verify=v), bool),
    "time": (lambda v: sk.sweep(spec(), time=v), bool),
    "repeats": (lambda v: sk.sweep(spec(), repeats=v), int),
    "steps_per_repeat": (lambda v: sk.sweep(spec(), steps_per_repeat=v), int),
    "timeout": (lambda v: sk.sweep(spec(), timeout=v), float),
    "step_timeout": (lambda v: sk.distributed(step_timeout=v), float),
    "start_timeout": (lambda v: sk.distributed(start_timeout=v), float),
    "folder": (lambda v: sk.Checkpointer(v), "text"),
    "retention": (lambda v: sk.Checkpointer("made", retention=v), int),
    "Checkpointer.axes": (lambda v: sk.Checkpointer("made", axes=v), int),
    "step": (lambda v: sk.Checkpointer("made").save(v, {}), int),
    "start": (lambda v: Loader(None, None, start=v), int),
    "stop": (lambda v: Loader(None, None, stop=v), int),
    "prefetch": (lambda v: Loader(None, None, prefetch=v), int),
    "Dataset.rows": (lambda v: Dataset([0, 1], v), int),
    "causal": (lambda v: sk.nn.attention(HEADS, HEADS, HEADS, causal=v), bool),
    "implementation": (lambda v: sk.nn.attention(HEADS, HEADS, HEADS, implementation=v), str),
    "top_k": (lambda v: sk.nn.route(HEADS, v), int),
    "Trainer.data": (lambda v: trainer(data=v), (1, True)),
    "config": (lambda v: trainer(config=v), int),
    "evaluate": (lambda v: trainer(evaluate=v), int),
    "callbacks": (lambda v: trainer(callbacks=v), int),
    "record": (lambda v: trainer(record=v), int),
    "decides": (lambda v: trainer(decides=v), (1, True)),
    "tokens": (lambda v: trainer(tokens=v), int),
    "describe": (lambda v: trainer(describe=v), int),
    "Trainer.folder": (lambda v: trainer(folder=v), "text"),
    "Trainer.step": (lambda v: trainer(step=v), int),
}
DECLARED = {
    RetentionPolicy: {},
    sk.TrainConfig: {},
    TextTrainConfig: {},
    sk.SearchSpace: {},
    DataConfig: {},
    CompileConfig: {},
    OptimizerConfig: {},
    DecoderConfig: DECODER,
}
FIELDS = [(cls, field.name) for cls in DECLARED for field in dataclasses.fields(cls)]
WRONG = ("2", "False", 2.5, 2.0, True, None, 1, ("2",), (2.5,), {"data": "2"})


# Values of other types than an option takes; "text" may be any text.
NOT = {
    bool: ("False", "no", 1, 2.0),
    int: ("2", "no", 2.5, True),
    float: ("2", "no", True),
    str: (1, True, "no"),
    "text": (1, True, 2.0),
}
MESH = sk.MeshSpec(data=1).build(devices=jax.devices()[:1])
HEADS = np.ones((1, 4, 2, 8), np.float32)


def spec(**options):
    return sk.StepSpec(
        loss_fn=lambda params, batch, key: jnp.mean(batch @ params),
        optimizer=optax.sgd(0.1),
        init=lambda key: jnp.ones((4, 4)),
        batch=np.ones((4, 4), np.float32),
        strategy=S.data(),
        **options,
    )


def planned(**options):
    return sk.plan(spec(), "tpu:v5e:1x1", **options)


def trainer(**options):
    return sk.Trainer(**{"step": print, "data": print, "folder": "made", **options})


def step(**options):
    return spec(**options).compile(MESH)


@pytest.mark.parametrize("name", CALLS)
def test_an_option_of_another_type_is_refused_by_name(name):
    call, wanted = CALLS[name]
    for value in wanted if isinstance(wanted, tuple) else NOT[wanted]:
        with pytest.raises(sk.ShardkitError) as caught:
            call(value)
        text = str(caught.value)
        assert name.rpartition(".")[2] in text
        assert str(value) in text
        assert "Fix:" in text


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda one: getattr(one, "__name__", one))
def test_a_field_of_another_type_is_refused_with_its_own_name_and_type(cls, name):
    hint, given = typing.get_type_hints(cls)[name], DECLARED[cls]
    told = r"{0} +expected .*, got |{0}=.* +must be an integer of at least 1"
    tried = 0
    for value in WRONG:
        if not matches_annotation(hint, value):
            tried += 1
            with pytest.raises(sk.ShardkitError, match=told.format(name)) as caught:
                cls(**{**given, name: value})
            assert "Fix:" in str(caught.value)
    assert tried > 1


def test_every_wrong_field_is_told_at_once_with_code_that_mends_it():
    with pytest.raises(sk.errors.ConfigError) as caught:
        sk.TrainConfig(steps="400", max_to_keep="many", profile=3)
    text = str(caught.value)
    assert "train.steps        expected int, got '400'." in text
    assert "- steps=400" in text
    assert "- max_to_keep=1" in text
    assert "- profile='3'" in text
    with pytest.raises(sk.errors.StepError, match="Fix: reshard_after_forward=False"):
        S.fsdp(reshard_after_forward="False")


def test_numbers_of_numpy_and_lists_are_taken():
    assert RetentionPolicy(max_to_keep=np.int64(3)).max_to_keep == 3
    assert OptimizerConfig(lr=1).lr == 1
    assert sk.SearchSpace(zero=[0, 1]).zero == [0, 1]
