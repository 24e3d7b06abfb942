"""Parameters through one safetensors file, there and back, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import shardkit as sk
from shardkit.checkpoint import _safetensors, export_safetensors, import_safetensors

from . import _checkpoints as ck


@pytest.fixture
def params():
    w = jnp.arange(512, dtype=jnp.float32).reshape(16, 32)
    made = {"w": w, "layers": {"b": jnp.ones(8, jnp.bfloat16), "scale": jnp.float32(2.5)}}
    return jax.device_put(made, ck.shardings(made))


@pytest.mark.parametrize("mesh", ck.MESHES)
def test_parameters_come_back_on_any_mesh(mesh, params, tmp_path):
    export_safetensors(tmp_path / "a", params, {"made": "here"})
    to = ck.shardings(params, mesh)
    back = import_safetensors(tmp_path / "a", ck.abstract(params), to)
    assert ck.bits(back) == ck.bits(params)
    assert back["w"].sharding == to["w"]


def test_other_tools_see_the_names_and_values(params, tmp_path):
    export_safetensors(
        tmp_path / "a", {"w": np.asarray(params["w"]).T, "s": params["layers"]["scale"]}
    )
    there = load_file(tmp_path / "a")
    assert sorted(there) == ["s", "w"]
    np.testing.assert_array_equal(there["w"], np.arange(512).reshape(16, 32).T)


def test_differences_are_named_as_for_a_checkpoint(params, tmp_path):
    save_file({"w": np.zeros((16, 8), np.float32), "head": np.zeros(3, np.float32)}, tmp_path / "a")
    with pytest.raises(sk.errors.CheckpointError) as error:
        import_safetensors(tmp_path / "a", ck.abstract(params), ck.shardings(params))
    said = str(error.value)
    assert "4 leaves of" in said
    assert "w             is saved as f32[16,8], and f32[16,32] in the state" in said
    assert "layers/b      is bf16[8] in the state, and not in the checkpoint" in said
    assert "head          is saved as f32[3]; the state has no such leaf" in said


def test_a_part_is_imported_and_cast_where_that_is_declared(params, tmp_path):
    save_file({"w": np.full((16, 32), 3.0, np.float16)}, tmp_path / "a")
    back = import_safetensors(
        tmp_path / "a",
        ck.abstract(params),
        ck.shardings(params),
        partial={"w": "saved", "**": "fresh"},
        fresh=params,
        cast=("w",),
    )
    assert back["w"].dtype == jnp.float32
    assert float(back["w"].min()) == 3.0
    assert ck.bits(back["layers"]) == ck.bits(params["layers"])


def test_nothing_is_overwritten_and_no_dtype_is_guessed(params, tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(sk.errors.CheckpointError) as error:
        export_safetensors(tmp_path / "a", {"key": jax.random.key(0), "i4": jnp.zeros(2, "int4")})
    assert "exists already" in str(error.value)
    assert "i4[2] is not a dtype of the format" in str(error.value)
    assert (tmp_path / "a").read_text() == "mine"
    with pytest.raises(
        sk.errors.CheckpointError, match=r"Nothing was imported\.\n.* cannot be read"
    ):
        import_safetensors(tmp_path / "a", params)


def test_a_missing_package_is_told(params, monkeypatch, tmp_path):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(_safetensors.importlib, "import_module", missing)
    with pytest.raises(sk.errors.CheckpointError, match=r"pip install 'shardkit\[safetensors\]'"):
        export_safetensors(tmp_path / "a", params)
