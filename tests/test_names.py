"""Folders and files with wrong names or contents are told by their path, and passed over."""

import collections
import contextlib
import json
import random
import shutil
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardkit as sk
from shardkit.checkpoint import _manifest as manifests
from shardkit.run._goodput import goodput, interruption
from shardkit.run._metrics_file import parse_rows, read_metrics

from ._damages import damage, resum

Damaged = sk.errors.CheckpointCorruptedError


@pytest.fixture
def saved(tmp_path):
    """Steps 1, 2 and 3; every leaf holds the number of its step."""
    with sk.Checkpointer(tmp_path, retention=sk.RetentionPolicy(max_to_keep=9)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": jnp.full((4, 2), float(step))})
    return tmp_path


def restore(folder, **options):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"w": jax.ShapeDtypeStruct((4, 2), jnp.float32)}
    return sk.Checkpointer(folder).restore(wanted, one, **options)


def falls_back(folder, why, to=2):
    with pytest.raises(Damaged, match=why):
        restore(folder)
    with pytest.warns(RuntimeWarning, match=why):
        back = restore(folder, on_damage="previous")
    assert back.step == to
    assert (np.asarray(back.state["w"]) == to).all()


def test_a_step_under_the_name_of_another_is_not_restored(saved):
    (saved / "step-00000003").rename(saved / "step-00000007")
    falls_back(saved, "is of step 3: the folder was renamed from step-00000003")


def test_two_steps_that_changed_places_are_not_restored(saved):
    (saved / "step-00000003").rename(saved / "aside")
    (saved / "step-00000002").rename(saved / "step-00000003")
    (saved / "aside").rename(saved / "step-00000002")
    with pytest.warns(RuntimeWarning, match="was renamed"):
        assert restore(saved, on_damage="previous").step == 1


@pytest.mark.parametrize("name", ["step-3", "step-000000004", "step-0000000٤", "step-00000004x"])
def test_a_name_that_no_save_gives_is_no_step(name, saved):
    (saved / name).mkdir()
    assert sk.Checkpointer(saved).steps() == (1, 2, 3)


def change_each(fields):
    """Every field in turn, as a value of a wrong type."""
    for name in fields:
        for wrong in (None, -1, "x", [1], {"a": 1}, 1.5, True):
            yield name, wrong


def test_a_manifest_with_wrong_fields_is_damage_whatever_they_are(saved):
    three = saved / "step-00000003"
    true = (three / "manifest.json").read_text()
    tried = 0
    for name, wrong in change_each(json.loads(true)):
        if name in ("crc32", "config", "data"):  # checked anyway, or any value
            continue
        (three / "manifest.json").write_text(true)
        resum(three, lambda fields, name=name, wrong=wrong: fields.update({name: wrong}))
        with contextlib.suppress(sk.errors.CheckpointError):
            assert (np.asarray(restore(saved).state["w"]) == 3).all()
        tried += 1
    assert tried > 50


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda f: f.pop("leaves"), "has fields that no save writes"),
        (lambda f: f.update(extra=1), "unexpected keyword argument 'extra'"),
        (lambda f: f["leaves"]["w"].update(shape=[4, "2"]), "shape="),
        (lambda f: f["leaves"]["w"].pop("dtype"), "missing 1 required .*dtype"),
        (lambda f: f["files"].update({"../../x": {"bytes": 1, "crc32": "0"}}), "outside"),
        (lambda f: f["files"].update({"x": {"bytes": -1, "crc32": "0"}}), "negative size"),
    ],
)
def test_what_is_wrong_in_a_manifest_is_said(change, why, saved):
    resum(saved / "step-00000003", change)
    falls_back(saved, why)


def test_a_manifest_nested_beyond_all_measure_is_damage(saved):
    (saved / "step-00000003" / "manifest.json").write_text("[" * 200_000)
    falls_back(saved, "manifest.json")


@pytest.mark.parametrize("header", ['{"chunks": [0, 2], "shape": [4, 2]}', "[]", '{"chunks": 3}'])
def test_a_header_of_chunks_with_a_right_checksum_is_not_believed(header, saved):
    three = saved / "step-00000003"
    name = "arrays/state/w/.zarray"
    (three / name).write_text(header)
    crc = f"{zlib.crc32(header.encode()):08x}"
    resum(three, lambda f: f["files"].update({name: {"bytes": len(header), "crc32": crc}}))
    falls_back(saved, "is not the header of this leaf")


def damage_often(saved, tmp_path, times):
    """Damages copies; each restores a step as it was saved, or is told."""
    rng, copy = random.Random(0), tmp_path / "copy"
    seen = collections.Counter()
    for _ in range(times):
        shutil.copytree(saved, copy, ignore=shutil.ignore_patterns("copy"))
        seen[damage(copy, rng)] += 1
        with warnings.catch_warnings(), contextlib.suppress(sk.errors.CheckpointError):
            warnings.simplefilter("ignore")
            back = restore(copy, on_damage="previous")
            assert (np.asarray(back.state["w"]) == back.step).all()
        shutil.rmtree(copy)
    return seen


def test_no_damage_is_silent(saved, tmp_path):
    assert len(damage_often(saved, tmp_path, 40)) > 6


@pytest.mark.slow
def test_none_of_a_thousand_damages_is_silent(saved, tmp_path):
    assert min(damage_often(saved, tmp_path, 1000).values()) > 50


def test_a_file_in_place_of_a_step_is_passed_over(saved):
    shutil.rmtree(saved / "step-00000003")
    (saved / "step-00000003").write_text("")
    falls_back(saved, "Not a directory")


def test_files_that_a_killed_save_left_are_deleted(saved):
    (saved / ".saving-step-00000004").write_text("")
    (saved / ".deleting-step-00000001").symlink_to(saved)
    with sk.Checkpointer(saved) as checkpoints:
        assert checkpoints.steps() == (1, 2, 3)
    assert not [path for path in saved.iterdir() if path.name.startswith((".sav", ".del"))]


def test_a_lock_that_is_a_folder_is_told(saved):
    (saved / ".lock").unlink()
    (saved / ".lock").mkdir()
    assert not sk.Checkpointer(saved).in_use
    with pytest.raises(sk.errors.CheckpointError, match=r"Is a directory: .*\.lock"):
        sk.Checkpointer(saved).save(4, {"w": jnp.zeros(1)})


def test_a_folder_that_cannot_be_read_is_told(saved, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(sk.errors.CheckpointError, match=f"{saved} +Permission denied"):
        restore(saved)


FOREIGN = [
    {"kind": 3},
    {"kind": "step", "step": "x"},
    {"kind": "start", "seconds": {"compile": "x"}},
    {"kind": "step", "step": 2, "seconds": [1]},
    {"kind": "eval", "step": 10**30, "time": "now"},
    ["kind"],
]


def test_foreign_rows_are_skipped_and_told(tmp_path):
    lines = [json.dumps(row).encode() for row in FOREIGN] + [b"[" * 100_000]
    assert parse_rows(lines).broken == list(range(1, len(lines) + 1))
    good = [{"kind": "mine", "x": 1}, {"kind": "start", "seconds": {"mine": 1.0}}, {"kind": "step"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in good))
    rows = read_metrics(tmp_path)
    assert rows == good
    assert goodput(rows, 10.0).overhead["mine"] == 1.0


def test_a_clock_that_was_set_back_gives_no_negative_time():
    rows = [{"kind": "start", "began": 50.0, "time": 51.0, "seconds": {}}]
    assert goodput(rows, 10.0).wall == 0.0
    rows.append({"kind": "step", "seconds": 4.0, "data_seconds": 1.0})
    spent = goodput(rows, 10.0)
    assert spent.text() == "goodput 75.0% of 4.00 s; data 25.0%"
    lost = interruption(rows[:1], [{"kind": "step", "time": 20.0}], 5.0)
    assert min(lost.values()) >= 0.0


def test_the_constants_of_the_manifest_stay():
    assert (manifests.FORMAT, manifests.VERSION) == ("shardkit checkpoint", 2)
