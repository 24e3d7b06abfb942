"""A run whose folder cannot be used: told, exit code 2, nothing overwritten, earlier saves kept."""

import os
import re
import shutil
import time
import zlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit.checkpoint import SavedStep
from shardkit.checkpoint import _pending_save as _saving
from shardkit.checkpoint._files import step_folder
from shardkit.cli import _main as entry
from shardkit.cli import main
from shardkit.cli._command import Command

from .test_trainer import STEPS, Noting, at_read, compiled, interrupt, losses, trainer


@pytest.fixture(scope="module")
def step():
    return compiled()


@pytest.fixture(scope="module")
def ended(step, tmp_path_factory):
    """The folder of a run that was interrupted behind its checkpoint of step 4."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    with pytest.raises(KeyboardInterrupt):
        trainer(folder, step, callbacks=[at_read(5, interrupt)]).run()
    return folder


@pytest.fixture
def copy(ended, tmp_path):
    """A copy of it that may be changed."""
    return shutil.copytree(ended, tmp_path / "run")


def files(folder):
    """Every file below a folder with its bytes, locks apart."""
    every = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in every}


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a trainer as a command does; returns what is shown, once the code is that of a user."""

    def run(made):
        commands = (Command("train", "runs", lambda arguments: made.run() and 0),)
        monkeypatch.setattr(entry, "COMMANDS", commands)
        assert main(["train"]) == 2
        shown = capsys.readouterr().err
        assert "Traceback" not in shown
        return shown

    return run


def resumed(folder):
    return sk.TrainConfig(steps=STEPS, checkpoint_every=2, eval_every=0, resume=str(folder))


def test_a_full_disk_ends_the_run_with_its_earlier_saves_whole(
    tmp_path, step, refused, monkeypatch
):
    real = _saving.commit

    def commit(written, root, step, manifest):
        if step == 4:
            raise OSError(28, "No space left on device")
        real(written, root, step, manifest)

    monkeypatch.setattr(_saving, "commit", commit)
    shown = refused(trainer(tmp_path / "run", step))
    assert "No space left on device" in shown
    assert "A save has failed." in shown
    assert "free space on the disk" in shown
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sk.Checkpointer(checkpoints).steps() == (2,)
    SavedStep.open(step_folder(checkpoints, 2)).check_files()
    monkeypatch.undo()
    trainer(tmp_path / "run", step).run()
    assert sorted(losses(tmp_path / "run")) == list(range(1, STEPS + 1))


def test_a_folder_that_cannot_be_written_is_told_before_an_update(step, refused):
    callback = Noting()
    shown = refused(trainer("/proc/none/run", step, callbacks=[callback]))
    assert "/proc/none" in shown
    assert "Fix:" in shown
    assert callback.told == []


# The storage library's own threads and event loops raise what they also hand on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_folder_that_vanishes_ends_the_run_and_what_was_moved_is_whole(tmp_path, step, refused):
    folder, away = tmp_path / "run" / "checkpoints", tmp_path / "away"

    def vanish(callback):
        while not sk.Checkpointer(folder).steps():
            time.sleep(0.01)
        folder.rename(away)

    vanish = at_read(3, vanish)
    config = sk.TrainConfig(steps=12, checkpoint_every=2, eval_every=0)
    shown = refused(trainer(tmp_path / "run", step, config=config, callbacks=[vanish]))
    assert "A save has failed." in shown
    assert str(folder) in shown
    assert sk.Checkpointer(away).steps() == (2,)
    SavedStep.open(step_folder(away, 2)).check_files()


def test_a_checkpoint_of_another_model_is_not_gone_on_with(copy, step, refused):
    before = files(copy)
    other = step.replace(
        init=lambda key: {"w": jnp.ones((8, 4)), "bias": jnp.zeros(4)},
        strategy=sk.Strategy(batch=P("data")),
    )
    shown = refused(trainer(copy, other, config=resumed(copy)))
    assert "params/bias" in shown
    assert "f32[4]" in shown
    now = files(copy)
    assert {name: now[name] for name in before if "checkpoints" in name} == {
        name: text for name, text in before.items() if "checkpoints" in name
    }


def test_a_newer_format_is_told_and_left_alone(copy, step, refused):
    for path in copy.rglob("manifest.json"):
        text = re.sub(r',\n "crc32": "\w+"\n}\n$', "\n}\n", path.read_text())
        text = text.replace('"version": 2', '"version": 3')
        crc = f',\n "crc32": "{zlib.crc32(text.encode()):08x}"\n}}\n'
        path.write_text(text.removesuffix("\n}\n") + crc)
    before = files(copy)
    shown = refused(trainer(copy, step, config=resumed(copy)))
    assert "format version 3; this shardkit reads 2" in shown
    callback = Noting()
    anew = trainer(copy, step, callbacks=[callback])
    with anew.console.capture() as out:
        anew.run()
    assert "Cannot resume" in out.get().replace("\n", " ")
    assert callback.run.folder == copy.with_name("run-2")
    assert files(copy) == before


def test_a_directory_of_something_else_is_left_alone(tmp_path, step, refused):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "holiday.jpg").write_bytes(b"sun")
    shown = refused(trainer(folder, step, config=resumed(folder)))
    assert "contains holiday.jpg but no checkpoint" in shown
    trainer(folder, step, callbacks=[callback := Noting()]).run()
    assert callback.run.folder == tmp_path / "run-2"
    assert files(folder) == {"holiday.jpg": b"sun"}
    assert jax.tree.leaves(files(tmp_path / "run-2"))


def test_a_pipe_is_not_waited_for_and_checkpoints_that_are_not_there_are_told(
    copy, step, refused, tmp_path
):
    metrics, manifest = copy / "metrics.jsonl", copy / "checkpoints/step-00000004/manifest.json"
    whole = metrics.read_bytes()
    for path in (metrics, manifest):
        path.unlink()
        os.mkfifo(path)
    assert "metrics.jsonl  Is a pipe, not a file" in refused(trainer(copy, step))
    metrics.unlink()
    metrics.write_bytes(whole)
    trainer(copy, step, callbacks=[callback := Noting()]).run()
    assert callback.told[0] == ("on_start", 2)

    (copy / "checkpoints").rename(tmp_path / "elsewhere")
    (copy / "checkpoints").symlink_to(tmp_path / "not mounted")
    shown = refused(trainer(copy, step))
    assert f"Checkpoints cannot be listed.\n  {copy}/checkpoints  No such file" in shown
    assert not (tmp_path / "run-2").exists()


def test_only_the_first_of_several_processes_shows_and_tells_others(tmp_path, step):
    class Second(sk.ProcessGroup):
        """One that is made up; nothing is asked of the others."""

        index, count = 1, 2

        def __init__(self):
            pass

    config = sk.TrainConfig(loggers=("tensorboard",), profile="2:3")
    mute = trainer(tmp_path / "run", step, config=config, process_group=Second())
    assert (mute.console.quiet, mute.config.loggers, mute.config.profile) == (True, (), None)
    loud = trainer(tmp_path / "run", step, config=config)
    assert (loud.console.quiet, loud.config) == (False, config)
