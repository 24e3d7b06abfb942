"""Folders of others that are damaged, hostile, or of another model: named, and nothing is made."""

import json
import os
import resource
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardkit as sk
from shardkit.hf._tensor_files import BadFile, read_header

from . import _hf

INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(_hf.ROOT / "llama", tmp_path / "llama")


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_map(folder, **changes):
    weights = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map={**weights, **changes})


def refused(load, *parts, error=sk.errors.CheckpointError):
    with pytest.raises(error) as raised:
        load()
    text = " ".join(str(raised.value).split())  # rows are aligned
    for part in parts:
        assert part in text
    return text


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".safetensors", 3]
)
def test_an_index_cannot_name_a_path(name, folder, tmp_path):
    (tmp_path / "secret.safetensors").write_bytes((folder / FIRST).read_bytes())
    edit_map(folder, **{"lm_head.weight": name})
    refused(lambda: _hf.load(folder), repr(name), "is not the name of a .safetensors file")


def test_a_folder_without_index_or_weights(folder, tmp_path):
    (folder / INDEX).unlink()
    refused(lambda: _hf.load(folder), "2 shards", f"and no {INDEX}", "Fix: a folder with")
    (folder / FIRST).unlink()
    (folder / SECOND).rename(folder / "pytorch_model.bin")
    refused(lambda: _hf.load(folder), "pytorch_model.bin is a pickle", "save_pretrained")
    refused(lambda: _hf.load(tmp_path / "absent"), "absent has no config.json")
    for text in ("[]", "{}", '{"weight_map": []}', "{", "[" * 10_000):
        (folder / INDEX).write_text(text)
        refused(lambda: _hf.load(folder), INDEX)


def test_a_truncated_and_a_wrong_shard_are_named(folder):
    size = (folder / FIRST).stat().st_size
    os.truncate(folder / FIRST, size - 4)
    text = refused(lambda: _hf.load(folder), FIRST, f"has {size - 4} bytes; its header describes")
    assert SECOND not in text
    shutil.copy(folder / SECOND, folder / FIRST)
    lacking = f"{FIRST} lacks model.embed_tokens.weight, which the index says it has"
    refused(
        lambda: _hf.load(folder), lacking, f"has lm_head.weight, which the index gives to {SECOND}"
    )
    (folder / SECOND).unlink()
    refused(lambda: _hf.load(folder), SECOND, "No such file or directory")


def test_two_sets_of_weights_in_one_folder(folder):
    """Of which transformers reads the single file."""
    single = folder / "model.safetensors"
    single.write_bytes((folder / FIRST).read_bytes())
    refused(
        lambda: _hf.load(folder), "is there beside the files of the index", "delete it, or model"
    )
    single.unlink()
    single.symlink_to("absent")
    refused(lambda: _hf.load(folder), "is there beside the files of the index")
    (folder / INDEX).unlink()
    refused(lambda: _hf.load(folder), "model.safetensors cannot be read: No such file")
    (folder / INDEX).symlink_to("absent")
    refused(lambda: _hf.load(folder), f"{INDEX} No such file")


def test_an_index_of_one_file_is_read(tmp_path):
    folder = shutil.copytree(_hf.ROOT / "qwen3", tmp_path / "a")
    names = dict.fromkeys(_hf.read_tensors(folder), "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    np.testing.assert_array_equal(_hf.load(folder)["norm"], _hf.load(_hf.ROOT / "qwen3")["norm"])


@pytest.mark.parametrize("name", [FIRST, INDEX, "config.json"])
def test_a_link_out_of_the_folder_is_not_followed(name, folder, tmp_path):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    refused(lambda: _hf.load(folder), name, "is a link out of the folder")
    # A cache of huggingface_hub has its files elsewhere.
    cached = tmp_path / "models--x" / "snapshots" / "0a1b"
    blobs = cached.parent.parent / "blobs"
    shutil.copytree(folder, cached, ignore=shutil.ignore_patterns(name))
    blobs.mkdir()
    (tmp_path / "elsewhere").rename(blobs / "77")
    (cached / name).symlink_to("../../blobs/77")
    assert set(_hf.load(cached)) == {"embedding", "head", "layers", "norm"}


@pytest.mark.parametrize(
    ("name", "start"), [("config.json", "{"), (INDEX, '"weight_map": {'), (FIRST, "{")]
)
def test_a_name_that_is_twice_in_an_object(name, start, folder):
    data = (folder / name).read_bytes()
    size = struct.unpack("<Q", data[:8])[0] if name == FIRST else len(data)
    text, rest = (data[8 : 8 + size], data[8 + size :]) if name == FIRST else (data, b"")
    key = b'"norm": 0, "norm": 1, '
    text = text.replace(start.encode(), start.encode() + key, 1)
    length = struct.pack("<Q", len(text)) if name == FIRST else b""
    (folder / name).write_bytes(length + text + rest)
    refused(lambda: _hf.load(folder), name, "not JSON: 'norm' is there twice")


def header(length, text=b"", data=b""):
    return struct.pack("<Q", length) + text + data


def entry(**changes):
    fields = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    text = json.dumps({"w": fields}).encode()
    return header(len(text), text, b"\0" * 8)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "says that its header alone"),
        (header(2**63), f"alone has {2**63}"),
        (header(50, b"{}"), "has 10 bytes, and says that its header alone has 50"),
        (header(2, b"{x"), "not JSON"),
        (header(2, b"[]"), "not an object"),
        (header(9_000, b"[" * 9_000), "not JSON"),
        (entry(shape=[3]), r"has 8 bytes for w, f32\[3\] has 12"),
        (entry(shape=[2**40, 2**40]), "has 8 bytes for w"),
        (entry(shape=[-2]), "with shape"),
        (entry(shape="x"), "with shape"),
        (entry(shape=[2.0]), "with shape"),
        (entry(dtype="F8"), "known: F64"),
        (entry(dtype=None), "known: F64"),
        (entry(data_offsets=[8, 16]), "at byte 8 of its data, not at 0"),
        (entry(data_offsets=[0]), "without dtype, shape or data_offsets"),
        (entry(data_offsets=[0, 8]) + b"\0", "its header describes"),
    ],
)
def test_a_header_is_checked_before_anything_is_mapped(content, why, tmp_path):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(BadFile, match=why):
        read_header(tmp_path / "a")


def test_missing_extra_and_other_tensors_are_one_error(tmp_path):
    folder = shutil.copytree(_hf.ROOT / "qwen3", tmp_path / "a")
    tensors = _hf.read_tensors(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((5, 32), np.float32)
    tensors["visual.weight"] = np.zeros(3, np.float32)
    tensors["model.norm.weight"] = np.zeros(32, np.int32)
    _hf.write_tensors(folder / "model.safetensors", tensors)
    refused(
        lambda: _hf.load(folder),
        "model.layers.1.mlp.up_proj.weight is missing, and layers/up f32[2,32,40] needs it",
        "is f32[5,32], and layers/up f32[2,32,40] needs f32[40,32]",
        "visual.weight is f32[3], and no parameter is made of it",
        "is i32[32], which norm f32[32] would round",
    )


def test_floats_are_rounded_only_where_that_is_declared():
    spec = _hf.make_spec(sk.hf.decoder_config(_hf.ROOT / "llama")).replace(
        precision=sk.Precision(param_dtype="bfloat16")
    )
    folder, mesh = _hf.ROOT / "llama", _hf.make_mesh(_hf.ONE)
    refused(lambda: sk.hf.load(folder, spec, mesh), "norm bf16[32] would round", "cast=['norm']")
    params = sk.hf.load(folder, spec, mesh, cast=["**"])
    want = jnp.asarray(_hf.read_tensors(folder)["lm_head.weight"].T, jnp.bfloat16)
    np.testing.assert_array_equal(params["head"], want)


def test_another_family_and_untied_heads(folder):
    shutil.copy(_hf.ROOT / "qwen2" / "config.json", folder)
    edit_json(folder / "config.json", tie_word_embeddings=False)
    refused(
        lambda: _hf.load(folder),
        "model.layers.1.self_attn.q_proj.bias",
        "is missing, and layers/query_bias f32[2,4,8] needs it",
    )
    edit_json(folder / "config.json", model_type="llama")
    refused(
        lambda: sk.hf.decoder_config(folder), "is not a language model", error=sk.errors.ConfigError
    )
    edit_json(folder / "config.json", model_type="lama", architectures=None)
    refused(
        lambda: sk.hf.decoder_config(folder), "Did you mean 'llama'?", error=sk.errors.ConfigError
    )
    tied = _hf.ROOT / "qwen2"
    config = sk.hf.decoder_config(tied, tie_embeddings=False)
    refused(lambda: _hf.load(tied, config=config), "lm_head.weight", "head f32[32,98] needs it")


def test_too_few_key_heads_for_the_axis():
    with pytest.raises(sk.errors.ShardingError, match=r"layers/key f32\[2,32,2,8\]"):
        _hf.load(_hf.ROOT / "llama", {"fsdp": 2, "tensor": 4}, _padded())


def _padded():
    return sk.hf.decoder_config(_hf.ROOT / "llama", vocab_padding=2)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_act": "relu"}, ("hidden_act='relu'", "'silu' is")),
        ({"swiglu_limit": 7.0}, ("swiglu_limit=7.0", "ignore=['swiglu_limit']")),
        ({"quantization_config": {}}, ("quantization_config={}",)),
        ({"attention_dropout": 0.1}, ("attention_dropout=0.1",)),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ("rope_type='yarn'",)),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, ("'low_freq_factor'",)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, ("{'beta': 1}",)),
        ({"num_hidden_layers": 10**12}, ("num_hidden_layers=1000000000000", "no model has")),
        ({"architectures": 3}, ("architectures=3",)),
        ({"rope_parameters": {"rope_theta": []}}, ("has a value of another type",)),
        ({"rope_parameters": 3}, ("has a value of another type",)),
        ({"hidden_size": "32"}, ("embed_dim", "expected int")),
        ({"num_key_value_heads": 3}, ("kv_heads=3", "does not divide num_heads=4")),
    ],
)
def test_a_config_that_is_not_computed_is_refused(changes, parts, folder):
    path = folder / "config.json"
    if "rope_scaling" in changes:
        edit_json(path, rope_parameters=None)
    edit_json(path, **changes)
    refused(lambda: sk.hf.decoder_config(folder), *parts, error=sk.errors.ConfigError)


FLAT = {"rope_type": "default", "rope_theta": 100.0}


@pytest.mark.parametrize(
    ("family", "changes", "part"),
    [
        ("gemma2", {"sliding_window_pattern": 1, "layer_types": None}, "sliding_window_pattern=1"),
        ("gemma3", {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping=3.0 is not computed"),
        ("gemma3", {"rope_parameters": FLAT}, "rope_parameters does not say which layers"),
        ("mixtral", {"layer_types": ["full_attention"] * 2, "sliding_window": 2}, "layer_types="),
        ("qwen3_moe", {"layer_types": ["full_attention"] * 2}, "layer_types="),
        ("qwen2", {"use_mrope": True}, "use_mrope=True is not computed; False is"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved=True is not computed; False is"),
        ("llama", {"rope_parameters": {**FLAT, "partial_rotary_factor": 0.5}}, "_factor': 0.5}"),
    ],
)
def test_keys_that_transformers_reads_otherwise_or_not_at_all(family, changes, part, tmp_path):
    """It ignores the first five in these families, though other families have them."""
    folder = shutil.copytree(_hf.ROOT / family, tmp_path / family)
    edit_json(folder / "config.json", **changes)
    refused(lambda: sk.hf.decoder_config(folder), part, error=sk.errors.ConfigError)


def test_keys_of_released_models_that_change_no_number(tmp_path):
    """Those of Qwen2.5, SmolLM2 and DistilGPT-2; and of Qwen3-MoE without the width of a head."""
    harmless = {
        "qwen2": {"use_mrope": False},
        "llama": {
            "is_llama_config": True,
            "rope_interleaved": False,
            "transformers.js_config": {"dtype": "fp16"},
            "unsloth_fixed": True,
        },
        "gpt2": {"_num_labels": 1, "tokenizer_class": None},
    }
    for family, keys in harmless.items():
        folder = shutil.copytree(_hf.ROOT / family, tmp_path / family)
        want = sk.hf.decoder_config(folder)
        edit_json(folder / "config.json", **keys)
        assert sk.hf.decoder_config(folder) == want
    folder = shutil.copytree(_hf.ROOT / "qwen3_moe", tmp_path / "qwen3_moe")
    values = json.loads((folder / "config.json").read_text())
    del values["head_dim"], values["num_key_value_heads"]
    (folder / "config.json").write_text(json.dumps(values))
    read = sk.hf.decoder_config(folder)
    assert (read.head_size, read.key_heads) == (8, 4)


def test_two_rotations_in_one_config_are_refused(folder):
    path = folder / "config.json"
    edit_json(path, rope_scaling={"type": "llama3", "factor": 8.0})
    assert sk.hf.decoder_config(folder).rope_factor == 8.0
    edit_json(path, rope_scaling={"rope_type": "yarn", "factor": 2.0})
    refused(
        lambda: sk.hf.decoder_config(folder),
        "rope_scaling.rope_type is 'yarn', in rope_parameters 'llama3'",
        error=sk.errors.ConfigError,
    )


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_config_that_is_no_json_has_a_fix(text, folder):
    (folder / "config.json").write_text(text)
    refused(lambda: _hf.load(folder), "config.json is not", "Fix: the file as save_pretrained")


@pytest.mark.parametrize(
    "table",
    [
        "llama",
        {"norm": 3},
        {"norm": ("model.norm.weight", 3)},
        {"layers/{i}/{i}": ("layers.{i}.weight", "e -> e")},
    ],
)
def test_a_table_of_another_type(table, folder):
    refused(lambda: _hf.load(folder, table=table), "table", 'Fix: {"layers/query": (')


def test_what_a_table_of_ones_own_lacks_is_mended_there(folder):
    table = {"norm": ("model.nrm.weight", "e -> e")}
    said = ("model.nrm.weight is missing, and norm", "is not in the table", "the names in table=")
    refused(lambda: _hf.load(folder, table=table), *said)


def test_a_missing_key_is_named(folder):
    values = json.loads((folder / "config.json").read_text())
    del values["intermediate_size"], values["vocab_size"]
    (folder / "config.json").write_text(json.dumps(values))
    text = refused(lambda: sk.hf.decoder_config(folder), error=sk.errors.ConfigError)
    assert "intermediate_size is missing: mlp_dim" in text
    assert "vocab_size is missing: vocab" in text


def test_configs_of_earlier_years_are_read(folder):
    """The keys of the released Llama 3.1, Gemma 2 and Gemma 3, which today's files have no more."""
    scaling = {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    path = folder / "config.json"
    edit_json(path, rope_parameters=None, rope_scaling=scaling, rope_theta=500_000.0)
    config = sk.hf.decoder_config(folder)
    assert (config.rope_theta, config.rope_factor) == (500_000.0, 8.0)
    assert config.rope_bands == (1.0, 4.0, 8192)
    old = {"rope_parameters": None, "layer_types": None, "num_hidden_layers": 12}
    for family, far in (("gemma2", (1, 3, 5, 7, 9, 11)), ("gemma3", (5, 11))):
        values = json.loads((_hf.ROOT / family / "config.json").read_text())
        path.write_text(json.dumps({**values, **old, "rope_local_base_freq": None}))
        read = sk.hf.decoder_config(folder)
        assert (read.window, read.global_layers) == (6, far)
    values = json.loads((_hf.ROOT / "qwen2" / "config.json").read_text())
    path.write_text(json.dumps({**values, "num_hidden_layers": 3}))
    uneven = "layer_types has 2 entries for 3 layers"
    refused(lambda: sk.hf.decoder_config(folder), uneven, error=sk.errors.ConfigError)
    late = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    path.write_text(json.dumps({**values, **late, "layer_types": None}))
    read = sk.hf.decoder_config(folder)
    assert (read.window, read.global_layers) == (9, (0,))
    values = json.loads((_hf.ROOT / "gemma3" / "config.json").read_text())
    path.write_text(json.dumps({**values, "layer_types": ["full_attention"] * 2}))
    read = sk.hf.decoder_config(folder)
    assert (read.window, read.local_rope_theta) == (None, None)


def test_a_full_disk_leaves_nothing(folder, tmp_path):
    params, before = _hf.load(folder), sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        text = refused(lambda: sk.hf.save(tmp_path / "out", params, like=folder), "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f" {tmp_path / 'out'} " in text
    assert "Fix: a folder with free space" in text
    assert sorted(tmp_path.iterdir()) == before
    sk.hf.save(tmp_path / "out", params, like=folder)
    refused(lambda: sk.hf.save(tmp_path / "out", params, like=folder), "exists already")


def test_parameters_of_another_model_are_not_written(folder, tmp_path):
    params = _hf.load(_hf.ROOT / "qwen2")
    text = refused(lambda: sk.hf.save(tmp_path / "out", params, like=folder))
    assert "lm_head.weight" in text
    assert "model.layers.0.self_attn.q_proj.bias is missing" in text
    wide = jax.tree.map(lambda x: x.astype(jnp.float8_e4m3fn), _hf.load(folder))
    refused(lambda: sk.hf.save(tmp_path / "out", wide, like=folder), "a dtype that safetensors")
    assert not (tmp_path / "out").exists()


def test_a_part_of_a_fused_tensor_is_not_enough(tmp_path):
    folder = _hf.ROOT / "gpt2"
    params = _hf.load(folder)
    queries = {n: x for n, x in params["layers"].items() if n not in ("value", "value_bias")}
    text = refused(lambda: sk.hf.save(tmp_path / "out", {**params, "layers": queries}, like=folder))
    assert "transformer.h.1.attn.c_attn.weight gets only 2/3 from parameters" in text
    family = sk.hf.FAMILIES["gpt2"]
    table = {**family.tensors, "layers/value": family.tensors["layers/key"]}
    text = refused(lambda: sk.hf.save(tmp_path / "out", params, like=folder, table=table))
    assert "transformer.h.0.attn.c_attn.weight is two parameters" in text
    assert not (tmp_path / "out").exists()
