"""Hugging Face checkpoints against `transformers` on torch, and there and back bit by bit.

The golden files are made by `benchmarks/_hf_models.py`; no test needs torch.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.cli import main
from shardkit.hf._pattern import parse
from shardkit.lm import SIZES

from . import _hf
from ._quick import some_quick

TOLERANCE = 1e-4
# What a field is where a family does not have it, and what must change with it.
WITHOUT = {
    "activation": {"activation": "silu"},
    "attn_softcap": {"attn_softcap": None},
    "embed_scale": {"embed_scale": 1.0},
    "global_layers": {"global_layers": ()},
    "local_rope_theta": {"local_rope_theta": None},
    "logit_softcap": {"logit_softcap": None},
    "norm_offset": {"norm_offset": 0.0},
    "normalize_shares": {"normalize_shares": True},
    "query_scale": {"query_scale": None},
    "rope_bands": {"rope_bands": None},
    "rope_factor": {"rope_factor": 1.0},
    "window": {"window": None, "global_layers": (), "local_rope_theta": None},
}


@pytest.mark.parametrize("family", _hf.FAMILIES)
def test_logits_equal_torch_on_one_device(family):
    config, want = sk.hf.decoder_config(_hf.ROOT / family), _hf.golden(family)
    logits = _hf.logits(config, _hf.load(_hf.ROOT / family), want["tokens"])
    np.testing.assert_allclose(logits, want["logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt2", "llama", "mistral", "qwen3_moe"])
def test_golden_logits_need_every_field(family):
    config, want = sk.hf.decoder_config(_hf.ROOT / family), _hf.golden(family)
    params = _hf.load(_hf.ROOT / family)
    changed = 0
    for field, changes in WITHOUT.items():
        if getattr(config, field) != changes[field]:
            other = dataclasses.replace(config, **changes)
            logits = _hf.logits(other, params, want["tokens"])
            assert np.abs(logits - want["logits"]).max() > 100 * TOLERANCE, field
            changed += 1
    assert changed


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [pytest.param(_hf.ONE, marks=pytest.mark.exhaustive), _hf.EIGHT],
    ids=["one", "eight"],
)
@pytest.mark.parametrize("family", _hf.FAMILIES)
def test_logits_and_gradients_of_a_step_equal_torch(family, sizes, tmp_path):
    folder, want = _hf.ROOT / family, _hf.golden(family)
    config, mesh = sk.hf.decoder_config(folder), _hf.make_mesh(sizes)
    spec = _hf.make_spec(config, sizes)
    params = sk.hf.load(folder, spec, mesh)
    logits = _hf.logits(config, params, want["tokens"])
    np.testing.assert_allclose(logits, want["logits"], atol=TOLERANCE, rtol=0)
    step = spec.compile(mesh)
    state = step.init(jax.random.key(0), params=params)
    metrics, gradients = step.gradients(state, _hf.make_batch(want["tokens"]))
    np.testing.assert_allclose(metrics["loss"], want["loss"], rtol=1e-6)
    # Written as weights, gradients have the names and dims that torch's have.
    sk.hf.save(tmp_path / "gradients", gradients, like=folder)
    ours = _hf.read_tensors(tmp_path / "gradients")
    names = [name for name in want.files if name.startswith("gradient ")]
    assert len(names) >= 8
    for name in names:
        scale = np.abs(want[name]).max()
        error = np.abs(ours[name.removeprefix("gradient ")] - want[name]).max()
        assert error <= TOLERANCE * scale, name


@pytest.mark.parametrize("sizes", [_hf.ONE, _hf.EIGHT], ids=["one", "eight"])
@pytest.mark.parametrize(
    "family",
    # GPT-2 has queries, keys and values in one module.
    some_quick([family for family in _hf.FAMILIES if family != "gpt2"], "llama"),
)
def test_gradients_of_adapters_equal_those_of_torch(family, sizes):
    """W + s A B is the W of torch, so torch has its gradient, and those of A and B follow."""
    folder, want = _hf.ROOT / family, _hf.golden(family)
    config, mesh = sk.hf.decoder_config(folder), _hf.make_mesh(sizes)
    whole, ranks = _hf.make_spec(config, sizes), {"layers/query": 4, "layers/out": 4}
    adapted = sk.lora(whole.init, whole.loss_fn, ranks, alpha=8, batch=whole.batch)
    spec = whole.replace(loss_fn=adapted.loss_fn, init=adapted.init)
    params = sk.hf.load(folder, spec, mesh, key=jax.random.key(1))
    rng, scale = np.random.default_rng(0), 8 / 4
    for name in ("query", "out"):
        b = params["lora"]["layers"][name]["b"]
        drawn = rng.normal(size=b.shape).astype("f") / 4
        params["lora"]["layers"][name]["b"] = jax.device_put(drawn, b.sharding)
    merged = adapted.merge(params)
    for name in ("query", "out"):
        base = params["layers"][name]
        params["layers"][name] = jax.device_put(2 * base - merged["layers"][name], base.sharding)

    step = spec.compile(mesh)
    state = step.init(jax.random.key(0), params=params)
    metrics, gradients = step.gradients(state, _hf.make_batch(want["tokens"]))
    np.testing.assert_allclose(metrics["loss"], want["loss"], rtol=1e-5)
    for name, module in (("query", "q_proj"), ("out", "o_proj")):
        g = want[f"gradient model.layers.1.self_attn.{module}.weight"].T
        factors, found = params["lora"]["layers"][name], gradients["lora"]["layers"][name]
        a, b = (
            np.asarray(factors["a"][1]).reshape(-1, 4),
            np.asarray(factors["b"][1]).reshape(4, -1),
        )
        for ours, theirs in ((found["a"], scale * g @ b.T), (found["b"], scale * a.T @ g)):
            error = np.abs(np.asarray(ours[1]).reshape(theirs.shape) - theirs).max()
            assert error <= TOLERANCE * np.abs(theirs).max(), name


@pytest.mark.parametrize("sizes", [_hf.ONE, _hf.EIGHT], ids=["one", "eight"])
@pytest.mark.parametrize("family", _hf.FAMILIES)
def test_a_folder_comes_back_bit_by_bit(family, sizes, tmp_path, monkeypatch):
    if sizes == _hf.EIGHT:  # a few rows of each tensor at a time, as those of large models are
        monkeypatch.setattr("shardkit.hf._table._MAPPED_BYTES", 300)
    folder = shutil.copytree(_hf.ROOT / family, tmp_path / "from")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "modeling_custom.py").write_text("raise SystemExit")
    sk.hf.save(tmp_path / "to", _hf.load(folder, sizes), like=folder)
    (folder / "modeling_custom.py").unlink()
    assert _hf.bits(tmp_path / "to") == _hf.bits(folder)


@pytest.mark.parametrize("family", _hf.FAMILIES)
def test_leaves_are_laid_out_as_the_step_declares(family):
    params = _hf.load(_hf.ROOT / family, _hf.EIGHT)
    shardings = {name: x.sharding.spec for name, x in params["layers"].items()}
    assert shardings["query"] == P(None, "fsdp", "tensor")
    assert params["embedding"].sharding.spec == P("tensor", "fsdp")


def test_every_family_has_golden_files():
    types = {
        json.loads((_hf.ROOT / f / "config.json").read_text())["model_type"] for f in _hf.FAMILIES
    }
    assert types == set(sk.hf.FAMILIES)
    size = max(sum(p.stat().st_size for p in (_hf.ROOT / f).iterdir()) for f in _hf.FAMILIES)
    assert size <= 200_000


def test_a_16_bit_folder_keeps_its_bits_and_its_values(tmp_path):
    half = {n: x.astype(np.float16) for n, x in _hf.read_tensors(_hf.ROOT / "gpt2").items()}
    shutil.copytree(_hf.ROOT / "gpt2", tmp_path / "half")
    _hf.write_tensors(tmp_path / "half" / "model.safetensors", half)
    params = _hf.load(tmp_path / "half")
    assert params["embedding"].dtype == jnp.float32
    np.testing.assert_array_equal(params["embedding"], half["transformer.wte.weight"])
    sk.hf.save(tmp_path / "back", params, like=tmp_path / "half")
    back = _hf.read_tensors(tmp_path / "back")
    assert {n: x.tobytes() for n, x in back.items()} == {n: x.tobytes() for n, x in half.items()}


def test_names_without_prefix_and_masks_in_the_file(tmp_path):
    shutil.copytree(_hf.ROOT / "gpt2", tmp_path / "old")
    tensors = {
        name.removeprefix("transformer."): x
        for name, x in _hf.read_tensors(_hf.ROOT / "gpt2").items()
    }
    mask = {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.float32)}
    _hf.write_tensors(tmp_path / "old" / "model.safetensors", tensors | mask)
    params = _hf.load(tmp_path / "old")
    same = jax.tree.map(np.array_equal, params, _hf.load(_hf.ROOT / "gpt2"))
    assert all(jax.tree.leaves(same))
    sk.hf.save(tmp_path / "back", params, like=tmp_path / "old")
    assert _hf.read_tensors(tmp_path / "back").keys() == tensors.keys()


def test_without_weights_the_files_are_divided_by_size(tmp_path):
    (tmp_path / "like").mkdir()
    shutil.copy(_hf.ROOT / "llama" / "config.json", tmp_path / "like")
    params = _hf.load(_hf.ROOT / "llama")
    sk.hf.save(tmp_path / "a", params, like=tmp_path / "like", max_file_bytes=30_000)
    assert len(list((tmp_path / "a").glob("model-0000?-of-00003.safetensors"))) == 3
    again = _hf.load(tmp_path / "a", _hf.EIGHT)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, params)))


def test_a_table_of_your_own(tmp_path):
    """Stacked and separate layers, transposed and fused weights, without any config.json."""
    rng = np.random.default_rng(0)
    fused = {f"blocks.{i}.qk": rng.normal(size=(6, 2 * 4)).astype(np.float32) for i in range(3)}
    out = {f"blocks.{i}.o.weight": rng.normal(size=(6, 4)).astype(np.float32) for i in range(3)}
    (tmp_path / "a").mkdir()
    _hf.write_tensors(tmp_path / "a" / "model.safetensors", fused | out)
    table = {
        "q": ("blocks.{i}.qk", "e (0/2 n h) -> n e h"),
        "k": ("blocks.{i}.qk", "e (1/2 n h) -> n e h"),
        "out/{i}/w": ("blocks.{i}.o.weight", "e h -> h e"),
    }
    shapes = {"q": (3, 2, 6, 2), "k": (3, 2, 6, 2), "out": [{"w": (4, 6)}] * 3}

    def init(key):
        return jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))

    spec = _hf.make_spec(SIZES["nano"]).replace(
        init=init,
        loss_fn=lambda params, batch, key: 0.0,
        strategy=sk.Strategy(params=sk.shard_largest("fsdp", min_size=1), batch=P()),
    )
    params = sk.hf.load(tmp_path / "a", spec, _hf.make_mesh({"fsdp": 2}), table=table)
    for i in range(3):
        q, k = np.split(fused[f"blocks.{i}.qk"].reshape(6, 4, 2), 2, axis=1)
        np.testing.assert_array_equal(params["q"][i], q.transpose(1, 0, 2))
        np.testing.assert_array_equal(params["k"][i], k.transpose(1, 0, 2))
        np.testing.assert_array_equal(params["out"][i]["w"], out[f"blocks.{i}.o.weight"].T)
    sk.hf.save(tmp_path / "b", params, like=tmp_path / "a", table=table)
    back = _hf.read_tensors(tmp_path / "b")
    assert all(np.array_equal(back[name], x) for name, x in (fused | out).items())


@pytest.mark.parametrize("text", ["", "a", "a b -> a", "a (b -> a b", "a -> a a", "3/2 a -> a"])
def test_a_pattern_that_says_nothing_is_refused(text):
    with pytest.raises(sk.errors.CheckpointError, match="every letter once on each side"):
        parse(text)


def test_a_padded_vocabulary_is_declared_and_never_written(tmp_path):
    folder = _hf.ROOT / "llama"
    config = sk.hf.decoder_config(folder, vocab_padding=6)
    sizes = {"tensor": 8}  # which 104 rows divide and 98 do not
    with pytest.raises(sk.errors.ShardingError, match=r"embedding f32\[98,32\]"):
        _hf.load(folder, sizes)
    with pytest.raises(sk.errors.CheckpointError, match=r"embedding f32\[104,32\] needs f32\[104,"):
        _hf.load(folder, _hf.ONE, config)
    sizes = {"fsdp": 2, "tensor": 2}
    params = _hf.load(folder, sizes, config, vocab_padding=6)
    assert not np.asarray(params["embedding"])[98:].any()
    assert not np.asarray(params["head"])[:, 98:].any()
    sk.hf.save(tmp_path / "a", params, like=folder, vocab_padding=6)
    assert _hf.bits(tmp_path / "a") == _hf.bits(folder)


def test_leaves_may_be_fresh_and_tensors_dropped(tmp_path):
    folder = _hf.ROOT / "llama"
    config = sk.hf.decoder_config(folder, tie_embeddings=True)
    with pytest.raises(sk.errors.CheckpointError, match=r"lm_head.weight +is f32\[98,32\], and no"):
        _hf.load(folder, config=config)
    tied = _hf.load(folder, config=config, partial={"lm_head.weight": "drop"})
    assert "head" not in tied
    params = _hf.load(folder)
    ones = jax.tree.map(jnp.ones_like, params)
    mixed = _hf.load(folder, partial={"layers/*_norm": "fresh"}, fresh=lambda: ones)
    assert float(mixed["layers"]["attn_norm"].min()) == 1.0
    np.testing.assert_array_equal(mixed["layers"]["query"], params["layers"]["query"])


def test_convert_there_and_back(tmp_path, capsys):
    folder, run, back = _hf.ROOT / "qwen2", tmp_path / "run", tmp_path / "back"
    mesh = "data=2,fsdp=2,tensor=2"
    assert main(["convert", str(folder), str(run), "--target-mesh", mesh]) == 0
    assert "step 0 in the layout of (data=2, fsdp=2, tensor=2)" in capsys.readouterr().out
    params = _hf.load(folder)
    restored = sk.Checkpointer(run).restore({"params": params}).state["params"]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, restored, params)))
    assert main(["convert", str(run), str(back), "--like", str(folder)]) == 0
    assert _hf.bits(back) == _hf.bits(folder)
    assert main(["convert", str(folder), str(tmp_path / "x"), "--target-mesh", "rows=8"]) == 2
    assert "axis 'rows'" in capsys.readouterr().err


def test_convert_takes_keys_that_change_no_number(tmp_path, capsys):
    """The option that the error names."""
    folder = shutil.copytree(_hf.ROOT / "qwen3", tmp_path / "qwen3")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "harmless": 1}))
    mesh = ["--target-mesh", "data=2,fsdp=2,tensor=2"]
    command = ["convert", str(folder), str(tmp_path / "run"), *mesh]
    assert main(command) == 2
    assert "shardkit convert ... --ignore harmless" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--ignore", "harmless"]) == 0
