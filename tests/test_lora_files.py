"""Adapters alone in the files of PEFT: written, read on another mesh, and refused if wrong."""

import json
import os
import struct

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import shardkit as sk

from . import _adapters_of_several as several
from .test_lora import ADAPTED, randomized
from .test_several_processes import cache, launched  # noqa: F401

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HF = {
    "q": "self_attn.q_proj",
    "o": "self_attn.o_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def hf_names(path, index):
    *_, name = path.split("/")
    return "lm_head" if name == "head" else f"model.layers.{index[0]}.{HF[name]}"


@pytest.fixture
def saved(tmp_path):
    ADAPTED.save(tmp_path, randomized(), names=hf_names, task_type="CAUSAL_LM")
    return tmp_path


def abstract(params):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), params)


def load(folder, model=ADAPTED):
    return model.load(folder, abstract(randomized()), names=hf_names)


def test_the_files_are_those_of_peft(saved):
    params, tensors = randomized(), load_file(saved / WEIGHTS)
    assert len(tensors) == 2 * (4 * 2 + 1)
    prefix = "base_model.model."
    q, o = params["lora"]["blocks"]["q"], params["lora"]["blocks"]["o"]
    stem = f"{prefix}model.layers.1.self_attn.q_proj"
    # torch has [outputs, inputs]: the delta of q_proj.weight is B A.
    np.testing.assert_array_equal(tensors[f"{stem}.lora_A.weight"], q["a"][1].T)
    np.testing.assert_array_equal(tensors[f"{stem}.lora_B.weight"], q["b"][1].reshape(3, 32).T)
    stem = f"{prefix}model.layers.0.self_attn.o_proj"
    np.testing.assert_array_equal(tensors[f"{stem}.lora_A.weight"], o["a"][0].reshape(32, 3).T)
    np.testing.assert_array_equal(tensors[f"{stem}.lora_B.weight"], o["b"][0].T)
    config = json.loads((saved / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6.0)
    assert config["task_type"] == "CAUSAL_LM"
    assert "lm_head" in config["target_modules"]
    assert not any(path.name.startswith(".") for path in saved.iterdir())


def test_they_are_read_onto_another_mesh(saved):
    params = randomized(key=8)
    whole = jax.sharding.NamedSharding(sk.MeshSpec(data=2, fsdp=4).build(), P())
    split = jax.sharding.NamedSharding(whole.mesh, P(None, "fsdp"))
    shardings = jax.tree.map(lambda x: whole, params)
    shardings["lora"]["blocks"]["q"]["a"] = split
    wanted = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings
    )
    found = ADAPTED.load(saved, wanted, names=hf_names)
    jax.tree.map(np.testing.assert_array_equal, found["lora"], randomized()["lora"])
    assert found["lora"]["blocks"]["q"]["a"].sharding == split
    assert found["blocks"]["q"] is wanted["blocks"]["q"]


def test_ranks_and_scales_of_each_module_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    model = sk.lora(
        lambda key: {"up": {"kernel": jax.numpy.ones((4, 6))}, "down": jax.numpy.ones((6, 2))},
        lambda params, batch, key: 0.0,
        {"up/*": 2, "down": 3},
        alpha=6,
        rank_stabilized=True,
    )
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype("f"), model.init(jax.random.key(0))
    )
    model.save(tmp_path, params)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["r"] == 3
    assert config["rank_pattern"] == {"^up": 2}
    assert config["use_rslora"] is True
    assert config["lora_alpha"] == pytest.approx(6)
    found = model.load(tmp_path, abstract(params))
    jax.tree.map(np.testing.assert_array_equal, found["lora"], params["lora"])


@pytest.mark.parametrize("alpha", [16.0, None])
def test_a_name_that_ends_another_keeps_its_own_rank(alpha, tmp_path):
    shapes = {"a": (4, 4), "up": (4, 6), "blk": {"up": (6, 4), "a+b": (4, 4)}}

    def init(key):
        return jax.tree.map(jax.numpy.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))

    ranks = {"a": 4, "up": 8, "blk/up": 4, "blk/a+b": 2}
    model = sk.lora(init, lambda params, batch, key: 0.0, ranks, alpha=alpha)
    params = model.init(jax.random.key(0))
    model.save(tmp_path, params)
    jax.tree.map(np.testing.assert_array_equal, model.load(tmp_path, params), params)


def test_an_alpha_of_each_module_is_read_and_written(tmp_path):
    """PEFT's `alpha_pattern`, as the fix of an error says it."""

    def adapt(alpha):
        shapes = {"up": (4, 6), "down": (6, 4), "head": (4, 4)}
        draw = np.random.default_rng(0).normal
        return sk.lora(
            lambda key: {name: draw(size=shape).astype("f") for name, shape in shapes.items()},
            lambda p, b, k: ((b @ p["up"] @ p["down"] @ p["head"]) ** 2).mean(),
            {"**": 2},
            alpha=alpha,
        )

    model = adapt({"up": 8, "down": 3.0, "**": None})
    assert [(one.leaf.path, one.scale) for one in model.adapted] == [
        ("down", 1.5),
        ("head", 1.0),
        ("up", 4.0),
    ]
    params = jax.tree.map(jax.numpy.ones_like, model.init(jax.random.key(0)))
    x = np.ones((3, 4), "f")
    w = {n: params[n] + s * 2 for n, s in (("up", 4), ("down", 1.5), ("head", 1))}
    want = ((x @ w["up"] @ w["down"] @ w["head"]) ** 2).mean()
    np.testing.assert_allclose(model.loss_fn(params, x, jax.random.key(1)), want, rtol=1e-5)
    model.save(tmp_path, params)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["lora_alpha"], config["alpha_pattern"]) == (3.0, {"^head": 2.0, "^up": 8.0})
    jax.tree.map(np.testing.assert_array_equal, model.load(tmp_path, params), params)
    with pytest.raises(sk.errors.CheckpointError) as error:
        adapt(3).load(tmp_path, params)
    for line in ("sk.lora(..., alpha={'up': 8})", "sk.lora(..., alpha={'head': 2})"):
        assert line in str(error.value)
    for alpha, why in (
        ({"nope": 8}, "'nope' +matches none of the 3 parameters"),
        ({"**": 8, "up": 4}, "'up' +decides nothing"),
        ({"up": -1}, "'up': -1 +is not a positive and finite number"),
        ({"up": "8"}, "alpha +expected"),
    ):
        with pytest.raises(sk.errors.StepError, match=why):
            adapt(alpha)


def test_weights_that_peft_saves_beside_an_adapter_have_a_fix(saved):
    """It saves an embedding or a head as a whole if it is adapted."""
    name = "base_model.model.lm_head.base_layer.weight"
    change(saved, **{name: np.zeros((4, 4), "f")})
    with pytest.raises(sk.errors.CheckpointError, match="save_embedding_layers=False"):
        load(saved)


def change(folder, **tensors):
    all_of_them = {**load_file(folder / WEIGHTS), **tensors}
    save_file({k: v for k, v in all_of_them.items() if v is not None}, folder / WEIGHTS)


def test_every_wrong_tensor_is_named_in_one_error(saved):
    stem = "base_model.model.model.layers.0."
    change(
        saved,
        **{
            f"{stem}self_attn.q_proj.lora_A.weight": np.zeros((4, 32), "f"),
            f"{stem}mlp.up_proj.lora_B.weight": np.zeros((64, 3), "i4"),
            f"{stem}mlp.down_proj.lora_A.weight": None,
            f"{stem}mlp.gate_proj.lora_A.weight": np.zeros((3, 32), "f"),
        },
    )
    with pytest.raises(sk.errors.CheckpointError) as error:
        load(saved)
    text = str(error.value)
    for part in (
        r"q_proj.lora_A.weight  is f32[4,32] in the file, f32[3,32] here",
        r"up_proj.lora_B.weight  is i32[64,3] in the file, f32[64,3] here",
        r"down_proj.lora_A.weight  is not in the file; f32[3,64] here",
        r"gate_proj.lora_A.weight  is in the file, and no weight here",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lora_alpha": 12}, "lm_head +has scale 4 in the file and 2 here"),
        ({"use_rslora": True}, "has scale 3.4641 in the file"),
        ({"peft_type": "IA3"}, "peft_type +is 'IA3', not 'LORA'"),
        ({"use_dora": True}, "use_dora +is True"),
        ({"bias": "all"}, "bias +is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save +is"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights +is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights +is 'olora'"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens +is"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication +is"),
        ({"use_qalora": True}, "use_qalora +is True"),
        ({"of_next_year": "x"}, "of_next_year +is 'x'"),
        ({"r": "8; import os"}, "has no numbers as its r"),
        ({"rank_pattern": {"q_proj": 6}}, "q_proj +has scale 1 in the file"),
        (
            {"rank_pattern": {r"^model\.layers\.0\.mlp\.up_proj": 6}},
            "0.mlp.up_proj +has scale 1 in",
        ),
        ({"rank_pattern": {"model.layers.1.mlp.up_proj": 6}}, "1.mlp.up_proj +has scale 1 in the"),
        ({"rank_pattern": {"(a+)+$": 5}}, r"rank_pattern +has '\(a\+\)\+\$', a regular expression"),
        ({"alpha_pattern": {r".*\.up_proj": 64}}, "alpha_pattern +has .* a regular expression"),
        ({"alpha_pattern": {r"layers\.\d\.mlp": 64}}, "alpha_pattern +has .* a regular expression"),
        ({"alpha_pattern": ["lm_head"]}, r"alpha_pattern +is \['lm_head'\], not numbers by module"),
        ({"lora_alpha": float("nan")}, "has no numbers as its r"),
        ({"r": 10**400}, "has no numbers as its r"),
    ],
)
def test_other_settings_are_refused(saved, settings, expected):
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**config, **settings}))
    with pytest.raises(sk.errors.CheckpointError, match=expected):
        load(saved)


def test_settings_that_change_no_number_are_read(saved):
    config = json.loads((saved / CONFIG).read_text())
    off = {"of_next_year": None, "use_qalora": False, "init_lora_weights": "gaussian"}
    (saved / CONFIG).write_text(json.dumps({**config, **off, "target_parameters": []}))
    jax.tree.map(np.testing.assert_array_equal, load(saved)["lora"], randomized()["lora"])


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (CONFIG, b"[" * 100_000),
        (CONFIG, b"{}" + b" " * 2**20),
        (CONFIG, b"\x80\x04\x95"),
        (WEIGHTS, struct.pack("<Q", 2**62)),
        (WEIGHTS, b"\x80\x04\x95pickle"),
    ],
)
def test_a_file_of_something_else_is_refused(saved, name, data):
    (saved / name).write_bytes(data)
    with pytest.raises(sk.errors.CheckpointError, match=name):
        load(saved)


def test_a_cut_file_and_a_missing_one_are_told(saved):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[:-1])
    with pytest.raises(sk.errors.CheckpointError, match=WEIGHTS):
        load(saved)
    (saved / CONFIG).unlink()
    with pytest.raises(sk.errors.CheckpointError, match=f"{CONFIG}.*No such file"):
        load(saved)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_pipe_is_not_read(saved, name):
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises(sk.errors.CheckpointError, match=f"{name} +is no regular file"):
        load(saved)


def test_nothing_is_overwritten_or_half_written(saved, tmp_path, monkeypatch):
    with pytest.raises(sk.errors.CheckpointError, match="exists already"):
        ADAPTED.save(saved, randomized(), names=hf_names)
    with pytest.raises(sk.errors.CheckpointError, match=r"'same' +is the name of a matrix of"):
        ADAPTED.save(tmp_path / "one", randomized(), names=lambda path, index: "same")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(sk.errors.CheckpointError, match="No space left"):
        ADAPTED.save(tmp_path / "two", randomized(), names=hf_names)
    assert list((tmp_path / "two").iterdir()) == []


@pytest.mark.slow
def test_two_processes_write_the_files_once_and_fail_together(launched, tmp_path):  # noqa: F811
    code, errors = launched("tests._adapters_of_several", tmp_path)
    assert code == 0, "\n".join(errors)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    with np.load(tmp_path / "whole.npz") as whole:
        assert len(tensors) == len(whole.files) * several.LAYERS
        for name in whole.files:
            path, factor = name.split(".")
            for index, matrix in enumerate(whole[name]):
                found = tensors[f"base_model.model.{path}.{index}.lora_{factor.upper()}.weight"]
                assert found.tobytes() == np.ascontiguousarray(matrix.T).tobytes(), name
    names = {"adapter", "file", "said-0.json", "said-1.json", "whole.npz"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {WEIGHTS, CONFIG}
    for process in range(2):
        said = json.loads((tmp_path / f"said-{process}.json").read_text())
        assert said["equal"] == [True] * 4
        elsewhere = {"again": 0, "unwritable": 0, "unreadable": 1}
        assert "/none  is not a folder" in said["no weights"]
        assert said["no weights"].startswith("In process 1: ") is (process == 0)
        assert "The parameters are not those of" in said["no model"]
        assert said["no model"].startswith("In process 0: ") is (process == 1)
        for case, failed in elsewhere.items():
            where = "" if process == failed else f"In process {failed}: "
            assert said[case].startswith(f"{where}The adapter "), said[case]
        assert WEIGHTS in said["again"]
        assert "exists already" in said["again"]
        assert "adapter_config.json" in said["unreadable"]
