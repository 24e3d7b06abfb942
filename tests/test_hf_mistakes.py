"""Exports that would not be of the model, and declarations of `sk.hf.load` without effect."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

import shardkit as sk

from . import _hf

LLAMA = _hf.ROOT / "llama"
CheckpointError = sk.errors.CheckpointError


@pytest.fixture(scope="module")
def params():
    return _hf.load(LLAMA)


def config_only(folder, **changes):
    folder.mkdir()
    values = json.loads((LLAMA / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 3}, r"layers/query +is f32\[2,32,4,8\], and f32\[3,32,4,8\] by"),
        ({"vocab_size": 500}, r"embedding +is f32\[98,32\], and f32\[500,32\] by config.json"),
        ({"tie_word_embeddings": True}, r"head +is f32\[32,98\], and absent by config.json"),
    ],
)
def test_parameters_that_config_json_does_not_describe(changes, expected, params, tmp_path):
    like = config_only(tmp_path / "like", **changes)
    with pytest.raises(CheckpointError, match=expected):
        sk.hf.save(tmp_path / "out", params, like=like)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("leaf", "why"),
    [
        (jax.ShapeDtypeStruct((32,), np.float32), r"norm +is ShapeDtypeStruct, not an array"),
        (1.0, r"norm +is float, not an array with values"),
    ],
)
def test_leaves_without_values_are_no_export(leaf, why, params, tmp_path):
    with pytest.raises(CheckpointError, match=why):
        sk.hf.save(tmp_path / "out", {**params, "norm": leaf}, like=LLAMA)
    with pytest.raises(CheckpointError, match=r"max_file_bytes +expected int, got '5GB'"):
        sk.hf.save(tmp_path / "out", params, like=LLAMA, max_file_bytes="5GB")
    with pytest.raises(CheckpointError, match=r"lora/a .*\nFix: like= the folder of their model"):
        sk.hf.save(tmp_path / "out", {**params, "lora": {"a": params["norm"]}}, like=LLAMA)
    assert not list(tmp_path.iterdir())


def test_a_tied_head_that_a_file_repeats(tmp_path):
    """As DeepSpeed writes it. Transformers ties it where both are equal, and only there."""
    folder = shutil.copytree(_hf.ROOT / "qwen2", tmp_path / "qwen2")
    tensors = _hf.read_tensors(folder)
    table = tensors["model.embed_tokens.weight"]
    _hf.write_tensors(folder / "model.safetensors", {**tensors, "lm_head.weight": table})
    params = _hf.load(folder)
    sk.hf.save(tmp_path / "out", params, like=folder)
    found = _hf.read_tensors(tmp_path / "out")
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(found[name], x)
    _hf.write_tensors(folder / "model.safetensors", {**tensors, "lm_head.weight": table + 1})
    with pytest.raises(CheckpointError, match=r"lm_head.weight +is f32\[98,32\], and no parameter"):
        _hf.load(folder)


def test_some_parameters_alone_are_no_export(params, tmp_path):
    like, some = config_only(tmp_path / "like"), {"embedding": params["embedding"]}
    with pytest.raises(CheckpointError, match=r"norm +is absent, and f32\[32\] by config.json"):
        sk.hf.save(tmp_path / "out", some, like=like)
    with pytest.raises(CheckpointError, match=r"vocab_padding +-2 is no number of rows"):
        sk.hf.save(tmp_path / "out", params, like=like, vocab_padding=-2)
    with pytest.raises(CheckpointError, match=r"f32\[98,32\], and f32\[100,32\] by"):
        sk.hf.save(tmp_path / "out", params, like=like, vocab_padding=2)
    with pytest.raises(CheckpointError, match=r"vocab_padding +-2 is no number of rows"):
        _hf.load(LLAMA, vocab_padding=-2)
    sk.hf.save(tmp_path / "out", params, like=like)


def test_finite_values_never_become_infinite(params, tmp_path):
    half = {name: x.astype(np.float16) for name, x in _hf.read_tensors(LLAMA).items()}
    (tmp_path / "half").mkdir()
    shutil.copy(LLAMA / "config.json", tmp_path / "half")
    _hf.write_tensors(tmp_path / "half" / "model.safetensors", half)
    large = {**params, "norm": params["norm"].at[3].set(-1e6)}
    with pytest.raises(CheckpointError, match=r"model.norm.weight +has -1e\+06, which float16"):
        sk.hf.save(tmp_path / "out", large, like=tmp_path / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["half"]
    sk.hf.save(tmp_path / "large", large, like=LLAMA)
    spec = _hf.make_spec(sk.hf.decoder_config(LLAMA)).replace(
        precision=sk.Precision(param_dtype="float16")
    )
    with pytest.raises(CheckpointError, match=r"model.norm.weight +has -1e\+06, which float16"):
        sk.hf.load(tmp_path / "large", spec, _hf.make_mesh(_hf.ONE), cast=["**"])
    tensors = {**half, "model.norm.weight": np.ones(32, np.int32)}
    shutil.copytree(tmp_path / "half", tmp_path / "whole")
    _hf.write_tensors(tmp_path / "whole" / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"is i32\[32\] there, and norm f32\[32\] does not"):
        sk.hf.save(tmp_path / "out", params, like=tmp_path / "whole")
    infinite = {**params, "norm": params["norm"].at[3].set(-np.inf)}
    sk.hf.save(tmp_path / "out", infinite, like=tmp_path / "half")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"partial": {"nope/**": "fresh"}},
            r"partial\['nope/\*\*'\] +decides nothing: it matches no",
        ),
        ({"partial": {"haed": "fresh"}}, "Did you mean 'head'"),
        (
            {"partial": {"**": "saved", "head": "fresh"}},
            r"partial\['head'\] +decides nothing: a glob",
        ),
        ({"cast": ["norm", "zork"]}, "cast: 'zork' +decides nothing"),
        ({"cast": "norm"}, r"cast +expected .*, got 'norm'"),
        (
            {"partial": {"lm_head.weight": "drop"}},
            r"lm_head.weight +is dropped in partial, and head",
        ),
        ({"partial": {"head": "drop"}}, "head +is a parameter: only tensors are dropped"),
    ],
)
def test_declarations_without_effect(options, expected):
    with pytest.raises(CheckpointError, match=expected):
        _hf.load(LLAMA, **options)


def test_an_export_carries_texts_of_its_own_folder_alone(params, tmp_path):
    like = config_only(tmp_path / "like")
    (tmp_path / "secret").write_text("PRIVATE")
    (like / "tokenizer_x.json").symlink_to(tmp_path / "secret")
    (like / "tokenizer_y.json").symlink_to("tokenizer.json")
    config = (like / "config.json").rename(tmp_path / "elsewhere.json")
    (like / "config.json").symlink_to(config)
    with pytest.raises(CheckpointError, match=r"config.json +is a link out of the folder"):
        sk.hf.save(tmp_path / "out", params, like=like)
    config.rename(like / "config.json")
    for name in ("tokenizer.json", "tokenizer.model", "vocab.txt", "chat_template.jinja"):
        (like / name).write_text("x")
    for name in ("tokenizer.py", "tokenizer.pkl", "vocab.bin", "tokenizer.json.py"):
        (like / name).write_text("raise SystemExit")
    sk.hf.save(tmp_path / "out", params, like=like)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_y.json",
        "vocab.txt",
    ]


def test_the_folder_of_a_cache_is_links_to_its_blobs(params, tmp_path):
    like = tmp_path / "models--x" / "snapshots" / "0a1b"
    like.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    shutil.copy(LLAMA / "config.json", tmp_path / "models--x" / "blobs" / "77")
    (like / "config.json").symlink_to("../../blobs/77")
    sk.hf.save(tmp_path / "out", params, like=like)
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "out" / "config.json").is_symlink()


def test_a_pipe_and_a_huge_index_are_not_read(tmp_path, monkeypatch):
    folder = shutil.copytree(LLAMA, tmp_path / "a")
    shard = folder / "model-00001-of-00002.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(CheckpointError, match=r"00001-of-00002.*Is a pipe, not a file"):
        _hf.load(folder)
    monkeypatch.setattr("shardkit.hf._tensor_files._LARGEST_JSON", 100)
    with pytest.raises(CheckpointError, match=r"config.json +it has \d+ bytes, and at most 100"):
        sk.hf.decoder_config(folder)


def test_fresh_leaves_are_checked_and_placed():
    partial, head = {"head": "fresh"}, np.ones((32, 98), np.float32)
    found = _hf.load(LLAMA, _hf.EIGHT, partial=partial, fresh={"head": head})["head"]
    want = _hf.load(LLAMA, _hf.EIGHT)["head"]
    assert found.sharding == want.sharding
    np.testing.assert_array_equal(found, head)
    wrong = head[:2], head.astype(np.float64), jax.ShapeDtypeStruct(head.shape, head.dtype), 1.0
    for leaf, says in zip(
        wrong, ("f32[2,98]", "f64[32,98]", "ShapeDtypeStruct", "float"), strict=True
    ):
        with pytest.raises(CheckpointError) as error:
            _hf.load(LLAMA, partial=partial, fresh={"head": leaf})
        assert f"head  is {says} in fresh=, and f32[32,98] is wanted" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("rope_theta", value) for value in (0.0, -1.0, float("nan"), float("inf"))),
        *(("norm_eps", value) for value in (-1e-6, float("nan"), float("inf"))),
    ],
)
def test_numbers_that_no_decoder_has(name, value):
    with pytest.raises(sk.errors.ConfigError, match=rf"{name}={value} +must be"):
        sk.hf.decoder_config(LLAMA, **{name: value})
