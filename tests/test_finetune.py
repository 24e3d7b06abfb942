"""A fine-tune as a user types it: a Hugging Face folder and chats in, such a folder out."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk
from shardkit._core.errors import CheckpointError, ConfigError, StepError
from shardkit.cli import main
from shardkit.config import (
    PretrainedDecoder,
    apply_overrides,
    from_record,
    load_config,
    run_record,
)
from shardkit.data import load_examples
from shardkit.lm import LoraConfig, TextTrainConfig, Tuning, declare_run, decoder_model

from . import _hf
from .test_examples import make_tokenizer, write

SUMS = [
    {
        "messages": [
            {"role": "user", "content": f"{a}+{b}=?"},
            {"role": "assistant", "content": f"{s}"},
        ]
    }
    for a in range(8)
    for b in range(6)
    for s in (a + b,)
]
SETTINGS = {
    "data.path": "sums.jsonl",
    "data.tokenizer": "t.json",
    "data.seq_len": 48,
    "model.vocab_padding": 4,
    "mesh": "data=2,fsdp=2,tensor=2",
    "strategy": "data|fsdp|tensor",
    "train.steps": 3,
    "train.eval_every": 0,
    "train.sample": 0,
    "train.checkpoint_every": 2,
    "train.check": "off",
}


def place(folder, monkeypatch, family="llama"):
    """A working folder with weights, a tokenizer that fits them, and sums as chats."""
    monkeypatch.chdir(folder)
    shutil.copytree(_hf.ROOT / family, folder / "hf")
    (folder / "hf" / "golden.npz").unlink()
    make_tokenizer(folder / "t.json", "<|im_start|>", "<|im_end|>", characters=90)
    write(folder / "sums.jsonl", *SUMS)


def arguments(**changed):
    settings = {**SETTINGS, "model.weights": "hf", **changed}
    words = (word for name, value in settings.items() for word in ("--set", f"{name}={value}"))
    return ["train", "finetune_llama", *words]


def rows(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


@pytest.mark.slow
def test_a_run_reads_trains_adapters_resumes_and_exports(tmp_path, monkeypatch, capsys):
    place(tmp_path, monkeypatch)
    options = {"train.export": "out", "train.export_adapter": "adapter", "train.sample": 5}
    assert main(arguments(**{"lora.rank": 4}, **options)) == 0
    said = capsys.readouterr().out
    assert "template chatml" in said
    assert "weights like hf: out" in said
    assert "<|im_start|>assistant\n" in said
    [run] = (tmp_path / "runs").iterdir()
    # The record of the run says what its weights were.
    [start] = rows(run, "start")
    assert start["config"]["weights"]["fingerprint"] == sk.hf.fingerprint("hf")
    before, after = _hf.read_tensors(tmp_path / "hf"), _hf.read_tensors(tmp_path / "out")
    adapter = _hf.read_tensors(tmp_path / "adapter")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    adapted = [name for name in before if "self_attn" in name and name.endswith("weight")]
    assert changed == set(adapted)
    for name in adapted:  # W + alpha / rank · (B A), as PEFT has them
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        a, b = adapter[f"{prefix}A.weight"], adapter[f"{prefix}B.weight"]
        np.testing.assert_allclose(after[name], before[name] + 4 * b @ a, atol=1e-6)
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"]) == (4, 16)
    assert main(["convert", str(run), "converted", "--like", "hf"]) == 0
    converted = _hf.read_tensors(tmp_path / "converted")
    for name in after:  # on one device, A B is summed in another order than on eight
        atol = 1e-7 if name in changed else 0
        np.testing.assert_allclose(converted[name], after[name], rtol=0, atol=atol)
    # A longer run goes on from the same weights and data; with other weights it is another run.
    longer = {"lora.rank": 4, "train.steps": 4, "train.resume": str(run), "train.export": "again"}
    assert main(arguments(**longer)) == 0
    assert "resum" in capsys.readouterr().out.lower()
    tensors = _hf.read_tensors(tmp_path / "hf")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    (tmp_path / "other").mkdir()
    shutil.copy("hf/config.json", "other")
    _hf.write_tensors(tmp_path / "other" / "model.safetensors", tensors)
    longer |= {"model.weights": "other", "train.steps": 5, "train.export": "third"}
    assert main(arguments(**longer)) == 2
    assert "weights.fingerprint" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_sample_and_export_what_one_does(tmp_path, monkeypatch, capfd):
    """Rows drop the same elements of an adapter's input, whichever process has them."""
    place(tmp_path, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    options = {"lora.rank": 4, "lora.dropout": 0.2, "train.sample": 3}
    samples = []
    for n, launcher in (("1", []), ("2", ["launch", "-n", "2", "--devices", "4", "--"])):
        exports = {"train.export": f"out-{n}", "train.export_adapter": f"adapter-{n}"}
        words = arguments(**options, **exports, **{"train.out": f"runs-{n}"})
        python = [sys.executable, "-m", "shardkit"] if launcher else []
        assert main([*launcher, *python, *words]) == 0
        out, _ = capfd.readouterr()
        samples.append(out.partition("a sample that it wrote")[2].partition("goodput")[0])
    assert samples[0] == samples[1] != ""
    for folder in ("out", "adapter"):
        one, two = (_hf.read_tensors(tmp_path / f"{folder}-{n}") for n in "12")
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            np.testing.assert_allclose(two[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_run_on_codes_resumes_samples_and_exports_what_it_evaluated(
    tmp_path, monkeypatch, capsys
):
    place(tmp_path, monkeypatch)
    codes = {"lora.rank": 4, "lora.quantize": "nf4", "lora.block": 4, "train.sample": 5}
    assert main(arguments(**codes, **{"train.steps": 2, "train.check": "first"})) == 0
    assert "<|im_start|>assistant\n" in capsys.readouterr().out
    [run] = (tmp_path / "runs").iterdir()
    longer = {**codes, "train.steps": 3, "train.resume": str(run), "train.export": "out"}
    longer["train.export_adapter"] = "adapter"
    assert main(arguments(**longer)) == 0
    assert "resum" in capsys.readouterr().out.lower()
    before, after = _hf.read_tensors(tmp_path / "hf"), _hf.read_tensors(tmp_path / "out")
    adapter = _hf.read_tensors(tmp_path / "adapter")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {n for n in before if ".layers." in n and before[n].ndim == 2}
    # The rounded weights with the adapters, no others: what every score of the run was of.
    levels = {"mlp.gate_proj": 16, "self_attn.q_proj": 16}
    for module, most in levels.items():
        name = f"model.layers.0.{module}.weight"
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        own = after[name]
        if f"{prefix}A.weight" in adapter:
            own = own - 4 * adapter[f"{prefix}B.weight"] @ adapter[f"{prefix}A.weight"]
        # A block is along the outputs, which are the rows of torch's matrices.
        blocks = own.T.reshape(-1, 4)
        scaled = blocks / np.abs(blocks).max(1, keepdims=True)
        assert len(np.unique(scaled.round(4))) <= most
    assert main(["convert", str(run), "converted", "--like", "hf"]) == 0
    for name, tensor in _hf.read_tensors(tmp_path / "converted").items():
        np.testing.assert_allclose(tensor, after[name], rtol=0, atol=1e-7)
    other = {**longer, "lora.quantize": "int8", "train.steps": 4, "train.export": "other"}
    assert main(arguments(**other | {"train.export_adapter": "none"})) == 2
    assert "lora.quantize" in capsys.readouterr().err


@pytest.mark.slow
def test_the_first_loss_and_gradient_are_those_of_a_step_by_hand(tmp_path, monkeypatch):
    """One SGD update of all weights on eight devices: loss and weights by plain JAX on one."""
    place(tmp_path, monkeypatch)
    options = {"lora.rank": "none", "train.steps": 1, "train.export": "out"}
    options |= {
        "optimizer.name": "sgd",
        "optimizer.warmup_fraction": 0,
        "optimizer.lr": 0.5,
        "optimizer.betas": "0,0.95",
    }
    options |= {"optimizer.grad_clip_norm": "none", "model.vocab_padding": 0}
    assert main(arguments(**options)) == 0
    [run] = (tmp_path / "runs").iterdir()
    config = load_config("finetune_llama", arguments(**options)[3::2])
    batch = load_examples(config.encoded_data, 98).batch(0)
    model = decoder_model(config.decoder)
    params = _hf.load(tmp_path / "hf")

    def loss(params):
        bound = model.bind(params)
        logits = bound.logits(bound(batch["inputs"], batch["segment_ids"]))
        log_p = jax.nn.log_softmax(logits)
        taken = jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
        return -(taken * batch["weights"]).sum() / batch["weights"].sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    [first] = rows(run, "step")
    np.testing.assert_allclose(first["loss"], value, rtol=1e-5)
    want = jax.tree.map(lambda w, g: w - 0.5 * g, params, gradient)
    found = _hf.load(tmp_path / "out")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


# --- weights beside adapters


def adapted_spec(sizes, **options):
    config = sk.hf.decoder_config(_hf.ROOT / "llama")
    spec = _hf.make_spec(config, sizes)
    lora = LoraConfig(rank=2, **options).adapt(decoder_model(config))
    return dataclasses.replace(
        spec, init=lora.init, loss_fn=lora.loss_fn, optimizer=optax.adam(1e-3)
    )


def test_a_key_draws_the_adapters_and_the_folder_has_the_rest():
    spec, mesh, key = adapted_spec(_hf.EIGHT), _hf.make_mesh(_hf.EIGHT), jax.random.key(3)
    params = sk.hf.load(_hf.ROOT / "llama", spec, mesh, key=key)
    plain = _hf.load(_hf.ROOT / "llama")
    lora = params.pop("lora")
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, plain)))
    drawn = jax.jit(spec.init)(key)["lora"]
    drawn = jax.tree.map(lambda x: x.value, drawn, is_leaf=lambda x: isinstance(x, sk.WithAxes))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, lora, drawn)))
    assert np.abs(lora["layers"]["query"]["a"]).max() > 0


@pytest.mark.slow
def test_a_tuning_on_codes_reads_the_folder_and_merges_what_it_computes():
    mesh, folder = _hf.make_mesh(_hf.EIGHT), _hf.ROOT / "llama"
    config = sk.hf.decoder_config(folder)
    lora = LoraConfig(rank=2, quantize="int8", block=4)
    data = load_config("finetune_llama", ["data.seq_len=8", "data.batch_size=8"]).data
    strategy = _hf.make_spec(config, _hf.EIGHT).strategy
    spec = declare_run(config, data, strategy, optax.sgd(0.1), lora=lora)
    read = PretrainedDecoder(weights=str(folder)).open()
    tuning = Tuning(config, lora, read, TextTrainConfig())
    step = spec.compile(mesh)
    load = tuning.loader(spec, mesh)
    assert load is not None
    state = step.init(jax.random.key(0), params=load(step))
    layers = state.params["layers"]
    assert {n for n, x in layers.items() if x.dtype == jnp.int8} == set(
        "query key value out gate up down".split()
    )
    batch = {n: np.ones(x.shape, x.dtype) for n, x in spec.batch.items()}
    state, _ = step(state, batch)
    merged = tuning.merge(state.params)
    plain = loss_on_one_device(config, merged, batch)
    assert float(step.evaluate(state, batch)["loss"]) == pytest.approx(plain, rel=1e-5)


def loss_on_one_device(config, params, batch):
    """The loss of the decoder on one device."""
    mean, _ = decoder_model(config).loss_fn.evaluate(jax.device_get(params), batch, None)
    return float(mean.total / mean.weight)


def test_adapters_need_a_key_and_a_key_needs_adapters():
    mesh, folder = _hf.make_mesh(_hf.ONE), _hf.ROOT / "llama"
    with pytest.raises(CheckpointError) as error:
        sk.hf.load(folder, adapted_spec(_hf.ONE), mesh)
    assert "lora/layers/query/a  is an adapter, which no folder has" in str(error.value)
    assert "load(..., key=jax.random.key(0))" in str(error.value)
    with pytest.raises(CheckpointError, match="is 5, not a typed key"):
        sk.hf.load(folder, adapted_spec(_hf.ONE), mesh, key=5)
    plain = _hf.make_spec(sk.hf.decoder_config(folder), _hf.ONE)
    with pytest.raises(CheckpointError, match="draws nothing: the step has no adapters"):
        sk.hf.load(folder, plain, mesh, key=jax.random.key(0))


def test_a_fingerprint_is_that_of_the_numbers_however_they_are_divided(tmp_path):
    folder = _hf.ROOT / "llama"
    tensors = _hf.read_tensors(folder)
    shutil.copy(folder / "config.json", tmp_path)
    _hf.write_tensors(tmp_path / "model.safetensors", tensors)
    assert sk.hf.fingerprint(tmp_path) == sk.hf.fingerprint(folder)
    seen = {sk.hf.fingerprint(tmp_path)}
    one = {"model.norm.weight": tensors["model.norm.weight"] * np.float32(1 + 2**-23)}
    _hf.write_tensors(tmp_path / "model.safetensors", tensors | one)
    seen.add(sk.hf.fingerprint(tmp_path))
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text + " ")
    seen.add(sk.hf.fingerprint(tmp_path))
    assert len(seen) == 3


def test_large_folders_are_sampled_in_every_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr("shardkit.hf._fingerprint._MAX_FULL", 0)
    monkeypatch.setattr("shardkit.hf._fingerprint._BLOCK", 16)
    test_a_fingerprint_is_that_of_the_numbers_however_they_are_divided(tmp_path)


# --- configs


def test_the_decoder_of_a_config_is_that_of_the_folder():
    folder = str(_hf.ROOT / "llama")
    settings = [f"model.weights={folder}", "model.loss_chunks=2", "data.path=chats.jsonl"]
    config = load_config("finetune_llama", settings)
    want = sk.hf.decoder_config(folder, loss_chunks=2, balance_loss=0.0)
    assert config.decoder == want
    record = run_record(config)
    assert record["model"]["embed_dim"] == 32
    assert record["weights"]["fingerprint"] == sk.hf.fingerprint(folder)
    assert record["lora"]["base_dtype"] == "float32"
    assert json.loads(json.dumps(record)) == record
    again = from_record(record, "a dump")  # as `shardkit replay` reads it
    assert (again.decoder, again.adapters) == (config.decoder, config.adapters)


def test_the_frozen_weights_have_the_dtype_of_their_files(tmp_path):
    folder = _hf.ROOT / "llama"
    config = sk.hf.decoder_config(folder)
    half = LoraConfig(rank=2, base_dtype="bfloat16").adapt(decoder_model(config))
    shapes = jax.eval_shape(half.init, jax.random.key(0))
    assert shapes["layers"]["query"].value.dtype == jnp.bfloat16
    assert shapes["lora"]["layers"]["query"]["a"].value.dtype == jnp.float32
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _hf.load(folder))
    shutil.copytree(folder, tmp_path / "like", ignore=shutil.ignore_patterns("*.safetensors*"))
    sk.hf.save(tmp_path / "half", halved, like=tmp_path / "like")
    pretrained = PretrainedDecoder(weights=str(tmp_path / "half"))
    assert pretrained.lora(LoraConfig(rank=2)).base_dtype == "bfloat16"
    assert pretrained.lora(LoraConfig(rank=2, base_dtype="float32")).base_dtype == "float32"


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ([], ConfigError, "model.weights  is not set"),
        (["model.weights=none-there"], ConfigError, "model.weights=none-there  is not a folder"),
        (["model.num_layers=2"], ConfigError, "model has no field 'num_layers'; it has weights,"),
        (["lora.rank=0"], ConfigError, "lora.rank=0  must be at least 1"),
        (["lora.targets=query,kye"], ConfigError, "has no weight 'kye'; known: query, key, "),
        (["lora.fold=true", "lora.dropout=0.1"], ConfigError, "which a folded adapter does not"),
        (["lora.targets="], ConfigError, "lora.targets  are none"),
        (["lora.quantize=nf4", "lora.rank=none"], ConfigError, "there are no adapters to train"),
        (["lora.quantize=nf4", "lora.fold=true"], ConfigError, "no floats that A B could be added"),
        (["lora.quantize=nf4", "lora.block=3"], ConfigError, "lora.block=3  is not a positive"),
    ],
)
def test_settings_that_cannot_be_used(settings, error, said):
    with pytest.raises(error) as raised:
        load_config("finetune_llama", settings).decoder  # noqa: B018
    assert said in str(raised.value)


def test_nothing_expensive_runs_before_bad_input_is_named(tmp_path, monkeypatch, capsys):
    place(tmp_path, monkeypatch)
    monkeypatch.setattr(sk.StepSpec, "compile", None)

    def refused(**changed):
        assert main(arguments(**changed)) == 2
        assert not (tmp_path / "runs").exists()
        return capsys.readouterr().err

    assert "has no tokenizer.json" in refused(**{"data.tokenizer": "none"})
    assert "no such file" in refused(**{"data.path": "none.jsonl"}).lower()
    (tmp_path / "exists").mkdir()
    said = refused(**{"train.export": "exists", "train.export_adapter": "a", "lora.rank": "none"})
    assert "train.export=exists     exists already" in said
    assert "train.export_adapter=a  has nothing to write: no adapters are trained" in said
    assert "has 98 ids" not in said
    assert "the model has model.vocab=98" in refused(**{"data.tokenizer": "bytes"})
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"model_type": "llamo"}))
    assert "model_type='llamo'" in refused()


def test_adapters_that_peft_does_not_have_are_named_first(tmp_path, monkeypatch, capsys):
    """GPT-2 has one module for queries, keys and values."""
    place(tmp_path, monkeypatch, family="gpt2")
    monkeypatch.setattr(sk.StepSpec, "compile", None)
    options = {"train.export_adapter": "a", "data.packing": "false"}
    options["lora.targets"] = "query"
    assert main(arguments(**options)) == 2
    said = capsys.readouterr().err
    assert "layers/query  is a part of a module, whose parts PEFT adapts together" in said
    assert "Fix: --set train.export=DIR, weights with the adapters merged; or other lora" in said


def test_modules_of_experts_have_both_numbers():
    pretrained = PretrainedDecoder(weights=str(_hf.ROOT / "mixtral")).open()
    name = pretrained.module_name("layers/expert_up", (1, 3))
    assert name == "model.layers.1.block_sparse_moe.experts.3.w3"


def test_learned_positions_take_one_text_a_row(tmp_path):
    weights = f"model.weights={_hf.ROOT / 'gpt2'}"
    settings = [weights, "data.path=a.jsonl", "data.tokenizer=bytes"]
    with pytest.raises(ConfigError) as error:
        load_config("finetune_llama", settings).step_spec()
    assert "data.seq_len=1024  is longer than the 64 positions" in str(error.value)
    assert "data.packing=true  starts texts in the middle of a row" in str(error.value)
    fixed = [*settings, "data.seq_len=32", "data.packing=false"]
    assert load_config("finetune_llama", fixed).step_spec().batch["segment_ids"].shape == (8, 32)


def test_a_decoder_without_a_target_says_so():
    config = load_config("finetune_llama", [f"model.weights={_hf.ROOT / 'mixtral'}"])
    config = apply_overrides(config, ["lora.targets=query,up"])
    with pytest.raises(StepError, match=r"'layers/up'.* matches none of"):
        config.step_spec()
