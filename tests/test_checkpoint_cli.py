"""`shardkit checkpoint`: what is shown, and what exit code damage has."""

import pytest

import shardkit as sk
from shardkit.cli import main

from . import _checkpoints as ck


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    state = ck.on_mesh(ck.make_state())
    with sk.Checkpointer(folder / "checkpoints", axes=ck.AXES) as checkpoints:
        checkpoints.save(100, state, data={"batch": 100}, metrics={"bits_per_byte": 2.5})
        checkpoints.save(200, state)
    return folder


@pytest.mark.parametrize("below", [".", "checkpoints", "checkpoints/step-00000200"])
def test_inspect_shows_steps_and_leaves(below, run_folder, capsys):
    assert main(["checkpoint", "inspect", str(run_folder / below)]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    assert any(row[:2] == ["params/w", "f32[16,32]"] and row[2:4] == ["embed,", "mlp"]
               for row in rows)  # fmt: skip
    assert any(row[:1] == ["200"] and "data=2" in row for row in rows)
    assert ("bits_per_byte 2.5" in shown) == (not below.endswith("200"))


def test_verify_names_the_damaged_leaf_and_goes_on_to_the_next_step(run_folder, capsys, tmp_path):
    assert main(["checkpoint", "verify", str(run_folder), "--values"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("intact (") == 2
    assert "every value" in shown
    copy = ck.copy(run_folder, tmp_path / "copy")
    (copy / "checkpoints/step-00000100/arrays/state/params/b/0").unlink()
    assert main(["checkpoint", "verify", str(copy)]) == 1
    shown = capsys.readouterr().out
    assert "params/b bf16[32]  arrays/state/params/b/0 is gone" in shown
    assert "step-00000200: intact" in shown


def test_a_folder_without_checkpoints_is_told(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    assert main(["checkpoint", "verify", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert "There is no checkpoint." in shown
    assert "holds photos" in shown
    assert "Fix: the folder of a run" in shown
