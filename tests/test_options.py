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
from shardkit.data import Arrays, DataConfig
from shardkit.lm import DecoderConfig, TextTrainConfig

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


def step(**options):
    return sk.compile_step(
        lambda params, batch, key: jnp.mean(batch @ params),
        optax.sgd(0.1),
        init=lambda key: jnp.ones((4, 4)),
        batch=np.ones((4, 4), np.float32),
        mesh=sk.MeshSpec(data=1).build(devices=jax.devices()[:1]),
        strategy=S.data(),
        **options,
    )


@pytest.mark.parametrize("name", CALLS)
def test_an_option_of_another_type_is_refused_by_name(name):
    call, wanted = CALLS[name]
    wrong = {bool: ("False", "no", 1, 2.0), int: ("2", "no", 2.5, True), str: (1, True, "no")}
    for value in wrong[wanted]:
        with pytest.raises(sk.ShardkitError) as caught:
            call(value)
        text = str(caught.value)
        assert name in text
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
