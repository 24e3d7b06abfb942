"""No exit path loses a save with exit code 0, and no failure touches what was saved before."""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

import shardkit as sk
from shardkit.checkpoint import SavedStep
from shardkit.checkpoint import _pending_save as _saving
from shardkit.checkpoint._files import list_steps, step_folder
from shardkit.checkpoint._folders import leaf_folder

from . import _checkpoints as ck
from ._damages import full_disk
from ._quick import some_quick

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def state():
    return ck.make_state()


def restored(folder, state, **options):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return sk.Checkpointer(folder).restore(ck.abstract(state), where, **options)


# --- what stays

BEST = sk.RetentionPolicy(max_to_keep=1, best_to_keep=1, best_metric="loss")


def test_the_policy_decides_what_stays():
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 1.0, 50: 5.0}
    steps = {step: {"loss": loss} for step, loss in losses.items()} | {60: {}}
    assert sk.RetentionPolicy(max_to_keep=2).select(steps) == {50, 60}
    assert sk.RetentionPolicy(max_to_keep=1, keep_period=30).select(steps) == {30, 60}
    assert BEST.select(steps) == {40, 60}
    assert dataclasses.replace(BEST, best_to_keep=2).select(steps) == {20, 40, 60}
    assert dataclasses.replace(BEST, best_is_largest=True).select(steps) == {50, 60}
    with pytest.raises(sk.errors.CheckpointError, match=r"\(max_to_keep=0\) +must be at least 1"):
        sk.RetentionPolicy(max_to_keep=0)


@pytest.mark.parametrize("fields", [{"best_to_keep": 2}, {"best_metric": "loss"}])
def test_best_steps_need_a_number_and_a_metric(fields):
    with pytest.raises(
        sk.errors.CheckpointError, match="needs both a number of steps and the metric"
    ):
        sk.RetentionPolicy(**fields)


def test_the_policy_is_applied_when_a_step_is_complete(tmp_path, state):
    with sk.Checkpointer(tmp_path, retention=BEST) as checkpoints:
        for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 4.0)):
            checkpoints.save(step, state, metrics={"loss": loss})
    assert checkpoints.steps() == (2, 4)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".lock", "step-00000002", "step-00000004"}


@pytest.mark.parametrize(
    "victim", ["params/w/0.0", "params/w/.zarray", "model_state/seen", "key/0", "params"]
)
def test_what_vanishes_during_a_save_fails_it_by_name(victim, tmp_path, state, monkeypatch):
    real = _saving.collect

    def vanish(folder, written):
        path = folder / "arrays" / "state" / victim
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return real(folder, written)

    monkeypatch.setattr(_saving, "collect", vanish)
    with pytest.raises(sk.errors.CheckpointError, match=rf"arrays/state/{victim}\S* +was not writ"):
        sk.Checkpointer(tmp_path).save(1, state)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_step_of_many_shards_is_complete(tmp_path, state):
    sk.Checkpointer(tmp_path).save(1, ck.on_mesh(state))
    assert ck.bits(restored(tmp_path, state).state) == ck.bits(state)


def refuse_to_delete(monkeypatch, name):
    """What an immutable file does, or remains on NFS, or another owner's folder."""
    real = os.unlink

    def unlink(path, **options):
        if str(path).endswith(name):
            raise PermissionError(1, "Operation not permitted", path)
        real(path, **options)

    monkeypatch.setattr(os, "unlink", unlink)


def test_large_chunks_that_did_not_change_are_files_of_both_steps(tmp_path, monkeypatch):
    frozen = jax.numpy.arange(2.0**19).reshape(512, 1024)
    last = frozen.at[-1, -1].add(1)
    small = jax.numpy.arange(8)
    keep = sk.RetentionPolicy(max_to_keep=9)

    def save(step, **leaves):
        with sk.Checkpointer(tmp_path, retention=keep) as saver:
            saver.save(step, {"frozen": frozen, "trained": frozen + step, "small": small, **leaves})

    def nodes(step, leaf):
        paths = (step_folder(tmp_path, step) / leaf_folder(leaf)).rglob("*")
        return {p.stat().st_ino for p in paths if p.is_file() and p.stat().st_size >= 32}

    save(1)
    save(2)
    assert nodes(1, "frozen") & nodes(2, "frozen")
    assert not nodes(1, "trained") & nodes(2, "trained")
    assert not nodes(1, "small") & nodes(2, "small")  # damage to it is that of one step
    save(3, frozen=last)
    assert not nodes(2, "frozen") & nodes(3, "frozen")
    with monkeypatch.context() as patch:  # a file system without second names
        patch.setattr(os, "link", mock.Mock(side_effect=OSError(95, "Operation not supported")))
        save(4, frozen=last)
    assert not nodes(3, "frozen") & nodes(4, "frozen")
    shutil.rmtree(step_folder(tmp_path, 1))
    for step, want in ((2, frozen), (3, last), (4, last)):
        like = {"frozen": frozen, "trained": frozen, "small": small}
        where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        back = sk.Checkpointer(tmp_path).restore(ck.abstract(like), where, step=step).state
        assert np.asarray(back["frozen"]).tobytes() == np.asarray(want).tobytes()
        assert np.asarray(back["trained"]).tobytes() == np.asarray(frozen + step).tobytes()


def test_an_old_step_that_cannot_be_deleted_is_a_warning(tmp_path, state, monkeypatch):
    keep_one = sk.RetentionPolicy(max_to_keep=1)
    refuse_to_delete(monkeypatch, ".zarray")
    with sk.Checkpointer(tmp_path, retention=keep_one) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.save(2, state)
        with pytest.warns(RuntimeWarning, match="Operation not permitted"):
            checkpoints.wait()
        assert checkpoints.steps() == (2,)
    for step in (3, 4):
        with pytest.warns(RuntimeWarning, match=r"deleting-step-\d+-\w+ cannot be deleted"):
            sk.Checkpointer(tmp_path, retention=keep_one).save(step, state)
    monkeypatch.undo()
    with sk.Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.steps() == (4,)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step-00000004"]


def test_an_old_step_that_cannot_be_moved_stays_complete(tmp_path, state, monkeypatch):
    real = os.rename

    def rename(source, target):
        if str(source).endswith("step-00000001"):
            raise PermissionError(1, "Operation not permitted", source)
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    one = sk.RetentionPolicy(max_to_keep=1)
    sk.Checkpointer(tmp_path, retention=one).save(1, state)
    with pytest.warns(RuntimeWarning, match=r"step-00000001 cannot be deleted"):
        sk.Checkpointer(tmp_path, retention=one).save(2, state)
    assert sk.Checkpointer(tmp_path).steps() == (1, 2)
    assert ck.bits(restored(tmp_path, state, step=1).state) == ck.bits(state)


def test_a_step_that_is_a_link_is_unlinked_and_its_target_stays(tmp_path, state):
    root, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    one = sk.RetentionPolicy(max_to_keep=1)
    sk.Checkpointer(root, retention=one).save(1, state)
    (root / "step-00000001").rename(elsewhere)
    (root / "step-00000001").symlink_to(elsewhere)
    sk.Checkpointer(root, retention=one).save(2, state)
    assert sk.Checkpointer(root).steps() == (2,)
    SavedStep.open(elsewhere).check_files()


def test_a_step_is_saved_once_and_a_folder_has_one_writer(tmp_path, state):
    with sk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        with pytest.raises(sk.errors.CheckpointError, match=r"never overwritten\.\n  step 1 "):
            checkpoints.save(1, state)
        with pytest.raises(sk.errors.CheckpointError, match="another process is writing"):
            sk.Checkpointer(tmp_path).save(2, state)
    sk.Checkpointer(tmp_path).save(2, state)
    assert sk.Checkpointer(tmp_path).steps() == (1, 2)


# --- failures


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"metrics": {"loss": "0.5"}}, "metrics"),
        ({"metrics": {"loss": True}}, "metrics"),
        ({"metrics": {1: 0.5}}, "metrics"),
        ({"metrics": {"loss": float("nan")}}, "metrics  cannot be written as JSON: Out of range"),
        ({"data": {"at": np.arange(3)}}, "data  cannot be written as JSON: .*ndarray"),
        ({"data": {"at": float("inf")}}, "data  cannot be written as JSON"),
        ({"data": {1: "a", "1": "b"}}, "data  has two names that are the same as texts"),
    ],
)
def test_what_no_manifest_may_hold_is_refused_before_anything_is_written(
    given, said, tmp_path, state
):
    with pytest.raises(sk.errors.CheckpointError, match=said):
        sk.Checkpointer(tmp_path / "steps").save(3, state, **given)
    assert not (tmp_path / "steps").exists()


@pytest.mark.parametrize(
    "declared", [{"axes": {"params/w": 1}}, {"axes": {"params/w": (1, 2)}}, {"config": {1, 2}}]
)
def test_what_no_manifest_may_hold_cannot_be_declared(declared, tmp_path):
    with pytest.raises(sk.errors.CheckpointError, match=f"{next(iter(declared))}  "):
        sk.Checkpointer(tmp_path, **declared)


def test_numbers_of_numpy_and_tuples_are_saved_as_plain_values(tmp_path, state):
    saved = sk.Checkpointer(tmp_path, axes={"params/w": ["embed", None]}, config={"a": (1,)})
    saved.save(np.int64(3), state, data={"at": (1, 2)}, metrics={"loss": np.float32(0.5)})
    manifest = saved.manifest()
    assert (manifest.data, manifest.config) == ({"at": [1, 2]}, {"a": [1]})
    assert manifest.metrics == {"loss": 0.5}
    assert manifest.leaves["params/w"].axes == ("embed", None)


def test_a_save_without_a_block_is_complete_when_it_returns(tmp_path, state):
    sk.Checkpointer(tmp_path).save(1, state)
    assert ck.bits(restored(tmp_path, state).state) == ck.bits(state)
    assert not [t for t in threading.enumerate() if t.name.startswith("shardkit-save")]


def saving(folder, state, then=lambda checkpoints: None):
    """A block that saves step 2 and does something else before it ends."""
    with sk.Checkpointer(folder) as checkpoints:
        checkpoints.save(2, state)
        then(checkpoints)


class Slow:
    """Holds saves back until the test lets them go on."""

    def __init__(self, monkeypatch, error: Exception | None = None) -> None:
        self.written, self.go = threading.Event(), threading.Event()
        real = _saving.collect

        def wait(folder, written):
            self.written.set()
            self.go.wait()
            if error:
                raise error
            return real(folder, written)

        monkeypatch.setattr(_saving, "collect", wait)


def test_a_save_is_invisible_until_it_is_complete(tmp_path, state, monkeypatch):
    slow = Slow(monkeypatch)
    with sk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        assert checkpoints.steps() == ()
        assert len(list(tmp_path.glob(".saving-step-00000001-*"))) == 1
        slow.go.set()
        checkpoints.wait()
        assert checkpoints.steps() == (1,)


def test_a_lost_save_ends_the_block_with_an_error(tmp_path, state, monkeypatch):
    sk.Checkpointer(tmp_path).save(1, state)
    slow = Slow(monkeypatch, OSError(28, "No space left on device"))
    slow.go.set()
    lost = r"A save has failed\.\n  step 2 +could not be written to .*No space left on device"
    with pytest.raises(sk.errors.CheckpointError, match=lost):
        saving(tmp_path, state)
    with pytest.raises(sk.errors.CheckpointError, match=lost):
        saving(tmp_path, state, lambda checkpoints: checkpoints.save(3, state))
    # Code 0 would hide it, so SystemExit gives way; any other error carries it as a note.
    with pytest.raises(sk.errors.CheckpointError, match=lost):
        saving(tmp_path, state, lambda _: sys.exit(0))
    with pytest.raises(ZeroDivisionError) as error:
        saving(tmp_path, state, lambda _: 1 // 0)
    assert "A save has failed." in error.value.__notes__[0]
    assert sk.Checkpointer(tmp_path).steps() == (1,)
    assert not list(tmp_path.glob(".saving*"))
    SavedStep.open(step_folder(tmp_path, 1)).check_files()


def test_a_full_disk_loses_the_new_save_and_no_other(tmp_path):
    big = {"w": jax.numpy.ones((256, 256)), "step": jax.numpy.int32(0)}
    sk.Checkpointer(tmp_path).save(1, big)
    said = r"A save has failed(.|\n)*free space on the disk"
    with full_disk(2**16), pytest.raises(sk.errors.CheckpointError, match=said):
        saving(tmp_path, big)
    assert list_steps(tmp_path) == (1,)
    SavedStep.open(step_folder(tmp_path, 1)).check_files()


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_done(state):
    with pytest.raises(sk.errors.CheckpointError, match=r"Nothing can be saved\.\n  /proc/none"):
        with sk.Checkpointer("/proc/none"):
            pass


def test_a_folder_that_vanishes_is_told(tmp_path, state, monkeypatch):
    folder = tmp_path / "steps"
    slow = Slow(monkeypatch)

    def vanish(_):
        slow.written.wait()
        shutil.rmtree(folder)
        slow.go.set()

    with pytest.raises(sk.errors.CheckpointError, match="No such file or directory"):
        saving(folder, state, vanish)


# --- processes that end in every way

SCRIPT = """
    import os, sys, jax, jax.numpy as jnp
    import shardkit as sk
    folder, way = sys.argv[1:]
    with sk.Checkpointer(folder, retention=sk.RetentionPolicy(max_to_keep=100)) as checkpoints:
        newest = checkpoints.steps()[-1] if checkpoints.steps() else 0
        state = {"w": jnp.arange(2**16, dtype=jnp.float32).reshape(256, 256) + newest}
        for step in range(newest + 1, newest + (1000 if way == "killed" else 2)):
            state = jax.tree.map(lambda x: x + 1, state)
            checkpoints.save(step, state)
            print(step, flush=True)
        if way == "raise":
            raise RuntimeError("in the body")
        if way == "sys.exit":
            sys.exit(0)
"""


def start(folder: Path, way: str) -> subprocess.Popen[str]:
    code = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), way]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        code, env=environment, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )


@pytest.mark.parametrize(
    ("way", "code"), some_quick([("sys.exit", 0), ("raise", 1)], ("sys.exit", 0))
)
def test_a_process_that_ends_has_saved_what_it_was_asked_to(way, code, tmp_path):
    process = start(tmp_path, way)
    process.communicate()
    assert process.returncode == code
    assert list_steps(tmp_path) == (1,)
    SavedStep.open(step_folder(tmp_path, 1)).check_files()


@pytest.mark.slow
def test_a_process_killed_at_any_instant_leaves_whole_steps_only(tmp_path):
    rng, interrupted = random.Random(0), 0
    like = {"w": jax.ShapeDtypeStruct((256, 256), jax.numpy.float32)}
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for _ in range(3):
        before = list_steps(tmp_path)
        process = start(tmp_path, "killed")
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        interrupted += bool(list(tmp_path.glob(".saving*")))
        steps = list_steps(tmp_path)
        assert len(steps) > len(before)
        for step in steps:
            SavedStep.open(step_folder(tmp_path, step)).check_files()
        back = sk.Checkpointer(tmp_path).restore(like, where)
        assert float(back.state["w"][0, 0]) == back.step == steps[-1]
    assert interrupted > 0
