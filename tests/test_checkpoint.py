"""What is saved comes back bit for bit on any mesh; what was changed since is found."""

import dataclasses
import json
import os
import random
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import shardkit as sk
from shardkit.checkpoint import (
    SavedStep,
    _files,
    _host_fingerprint,
    _read,
    compute_fingerprints,
    format_fingerprint,
)
from shardkit.checkpoint._files import step_folder

from . import _checkpoints as ck

CONFIG = {"model": {"embed_dim": 16}}


@pytest.fixture(scope="module")
def state():
    return ck.on_mesh(ck.make_state())


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """One whole checkpoint of step 3; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("saved")
    with sk.Checkpointer(folder, axes=ck.AXES, config=CONFIG) as checkpoints:
        checkpoints.save(3, state, data={"batch": 3}, metrics={"loss": 0.5})
    return folder


def restore(folder, like, mesh="data=2 x tensor=4", **options):
    to = ck.shardings(like, mesh)
    return sk.Checkpointer(folder).restore(ck.abstract(like), to, **options)


# --- fingerprints


def reference(x) -> str:
    """The same sums in numpy, word by word."""
    raw = np.ascontiguousarray(np.asarray(x))
    words = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[raw.itemsize]
    word = raw.reshape(-1).view(words).astype(np.uint32)
    index = np.arange(word.size, dtype=np.uint32) * np.uint32(0x9E3779B1)
    mixed = (word ^ index) * np.uint32(0xCC9E2D51)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x1B873593)
    return format_fingerprint(
        [int(half.sum(dtype=np.uint64)) % 2**32 for half in (mixed, mixed * index)]
    )


def test_a_fingerprint_is_that_of_the_reference_on_every_mesh():
    plain = {
        "f32": np.linspace(-1, 1, 512, dtype=np.float32).reshape(16, 32),
        "bf16": np.arange(512).reshape(16, 32).astype(jnp.bfloat16),
        "i8": np.arange(-64, 64, dtype=np.int8).reshape(16, 8),
        "bool": np.array([True, False, True]),
        "scalar": np.float32(3.5),
    }
    want = {name: reference(x) for name, x in plain.items()}
    for mesh in ck.MESHES:
        placed = jax.device_put(plain, ck.shardings(plain, mesh))
        assert {
            n: format_fingerprint(f) for n, f in compute_fingerprints(placed).items()
        } == want, mesh


@pytest.mark.parametrize("words", [pytest.param(2**16, marks=pytest.mark.slow), 7])
def test_the_host_computes_the_fingerprints_of_the_devices(words, monkeypatch):
    """In blocks that hold all of a shard, and in blocks that cut rows."""
    monkeypatch.setattr(_host_fingerprint, "_BLOCK", words)
    names = ["float32", "bfloat16", "bool", "int8", "uint16", "int4", "complex64", "float8_e5m2"]
    draws = np.random.default_rng(0).normal(size=(6, 8, 4)) * 4
    leaves = {
        f"{name} {spec} {dims}": jax.device_put(
            jnp.asarray(np.abs(draws[(0,) * dims]).astype(jnp.dtype(name))),
            NamedSharding(sk.MeshSpec(data=2, tensor=4).build(), PartitionSpec(*spec[dims:])),
        )
        for name in names
        for spec in [(), ("data", "tensor"), (None, ("data", "tensor")), (None, None, "tensor")]
        for dims in range(4)
    }
    given, want = _host_fingerprint.read_fingerprints(leaves), compute_fingerprints(leaves)
    assert {n: [*x] for n, x in given.items()} == {n: [*np.asarray(x)] for n, x in want.items()}


def test_every_single_bit_and_every_swap_changes_a_fingerprint():
    x = np.linspace(-1, 1, 64, dtype=np.float32)
    flipped = np.stack([x] * (64 * 32 + 63))
    words = flipped.view(np.uint32)
    for bit in range(64 * 32):
        words[bit, bit // 32] ^= np.uint32(1 << bit % 32)
    for i in range(63):
        flipped[64 * 32 + i, [i, i + 1]] = flipped[64 * 32 + i, [i + 1, i]]
    found = jax.vmap(lambda row: compute_fingerprints({"x": row})["x"])(jnp.asarray(flipped))
    assert reference(x) not in {format_fingerprint(one) for one in np.asarray(found)}


# --- restoring


@pytest.mark.parametrize("mesh", ck.MESHES)
def test_every_leaf_comes_back_bit_for_bit_on_any_mesh(mesh, state, saved):
    back = restore(saved, state, mesh)
    assert ck.bits(back.state) == ck.bits(state)
    assert (back.step, back.data, back.damaged) == (3, {"batch": 3}, {})
    want = jax.tree.leaves(ck.shardings(state, mesh))
    assert [x.sharding for x in jax.tree.leaves(back.state)] == want
    assert jax.tree.structure(back.state) == jax.tree.structure(state)


def test_one_sharding_serves_for_all_leaves(state, saved):
    device = jax.devices()[5]
    where = SingleDeviceSharding(device)
    back = sk.Checkpointer(saved).restore(ck.abstract(state), where)
    assert {x.device for x in jax.tree.leaves(back.state)} == {device}
    assert ck.bits(back.state) == ck.bits(state)


def test_a_state_may_be_donated_while_it_is_being_saved(tmp_path):
    state = ck.on_mesh(ck.make_state())
    before = ck.bits(state)
    consume = jax.jit(lambda p: jax.tree.map(lambda x: x * 0, p), donate_argnums=0)
    with sk.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        consume(state.params)
    assert ck.bits(restore(tmp_path, ck.make_state()).state) == before


def test_a_save_that_uses_the_memory_of_the_last_one_has_its_own_values(tmp_path):
    """The third state has other shapes, so that little of that memory fits it."""
    states = [
        {"w": jnp.full((64, 8), 1.0), "b": jnp.zeros(3, jnp.bfloat16)},
        {"w": jnp.full((64, 8), 2.0), "b": jnp.ones(3, jnp.bfloat16)},
        {"w": jnp.full((8, 64), 3.0), "a": jnp.ones((), jnp.int8), "b": jnp.ones(3)},
    ]
    policy = sk.RetentionPolicy(max_to_keep=3)
    with sk.Checkpointer(tmp_path, retention=policy) as checkpoints:
        for i, state in enumerate(states):
            checkpoints.save(i, state)
    for i, state in enumerate(states):
        restored = checkpoints.restore(state, step=i).state
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), restored, state))


def test_the_manifest_is_readable_and_knows_no_device(saved, state):
    text = (step_folder(saved, 3) / "manifest.json").read_text()
    fields = json.loads(text)
    assert fields["leaves"]["params/w"] == {
        "shape": [16, 32],
        "dtype": "float32",
        "fingerprint": reference(state.params["w"]),
        "axes": ["embed", "mlp"],
        "key": None,
    }
    assert fields["leaves"]["key"]["key"] == "threefry2x32"
    assert (fields["config"], fields["metrics"]) == (CONFIG, {"loss": 0.5})
    assert fields["mesh"] == {"data": 2, "tensor": 4}
    assert fields["versions"]["jax"] == jax.__version__
    for path, one in fields["files"].items():
        content = (step_folder(saved, 3) / path).read_bytes()
        assert one == {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    everything = b"".join(path.read_bytes() for path in ck.files(saved))
    assert b"device" not in everything.lower()


# --- a state that is not the one that was saved


def test_every_leaf_that_does_not_fit_is_named_at_once(saved):
    other = ck.make_state()
    params = {"w": jnp.zeros((16, 64)), "bias": other.params["b"], "none": other.params["none"]}
    model_state = {**other.model_state, "seen": jnp.zeros(8, jnp.float32)}
    other = dataclasses.replace(other, params=params, model_state=model_state)
    with pytest.raises(sk.errors.CheckpointError) as error:
        restore(saved, other)
    said = str(error.value)
    assert "4 leaves of" in said
    assert re.search(r"params/w +is saved as f32\[16,32\], and f32\[16,64\] in the state", said)
    assert re.search(r"params/bias +is bf16\[32\] in the state, and not in the checkpoint", said)
    assert re.search(r"params/b +is saved as bf16\[32\]; the state has no such leaf", said)
    assert "model_state/seen" in said
    assert "cast does not name it" in said
    assert 'restore(..., cast=["model_state/seen"])' in said
    assert (
        "rename={'params/b': 'params/bias'}, partial={'params/w': 'fresh', '**': 'saved'}" in said
    )


def test_another_optimizer_takes_the_weights_as_the_error_says(saved, state):
    fresh = dataclasses.replace(state, opt_state=optax.sgd(1e-2, momentum=0.9).init(state.params))
    with pytest.raises(sk.errors.CheckpointError, match=r"opt_state/0/trace/w +is f32"):
        restore(saved, fresh)
    partial = {"opt_state/**": "fresh", "**": "saved"}
    back = restore(saved, fresh, partial=partial, fresh=fresh).state
    assert ck.bits(back) == ck.bits(fresh)


def test_partial_rules_take_each_leaf_from_where_they_say(saved, state):
    fresh = ck.make_state(seed=1)
    partial = {
        "params/w": "fresh",
        "opt_state/**": "fresh",
        "model_state/on": "drop",
        "**": "saved",
    }
    wanted = dataclasses.replace(fresh, model_state={"seen": fresh.model_state["seen"]})
    back = restore(saved, wanted, partial=partial, fresh=lambda: fresh).state
    got, old, new = ck.bits(back), ck.bits(state), ck.bits(fresh)
    assert got[".params['w']"] == new[".params['w']"] != old[".params['w']"]
    assert got[".params['b']"] == old[".params['b']"] != new[".params['b']"]
    assert ".model_state['on']" not in got


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(partial={"params/**": "saved"}), "is matched by no glob of partial"),
        (dict(partial={"parms/**": "fresh", "**": "saved"}), "matches no leaf."),
        (dict(partial={"**": "saev"}), "'saev' is not in .* Did you mean 'saved'?"),
        (
            dict(partial={"step": "drop", "**": "saved"}),
            "is dropped by partial, but the state has",
        ),
        (dict(partial={"step": "fresh", "**": "saved"}, fresh={}), "fresh= has no such leaf"),
        (dict(cast=["params/x"]), "matches no leaf. Did you mean 'params/w'?"),
        (dict(step=4), r"no checkpoint of step 4\.\n.* holds steps 3"),
    ],
    ids=range(7),
)
def test_a_request_that_cannot_be_met_says_why(options, message, saved, state):
    with pytest.raises(sk.errors.CheckpointError, match=message):
        restore(saved, state, **options)


def test_a_declared_cast_changes_the_dtype_and_nothing_else(saved, state):
    params = {**state.params, "w": state.params["w"].astype(jnp.bfloat16)}
    half = dataclasses.replace(state, params=params)
    back = restore(saved, half, cast=["params/*"]).state
    assert ck.bits(back) == ck.bits(half)


# --- reading


def test_each_chunk_that_is_needed_is_read_once_and_no_other(saved, state, monkeypatch):
    read = []

    def counted(folder, name, files, *into, **checked):
        read.append(name)
        return _files.read_file(folder, name, files, *into, **checked)

    monkeypatch.setattr(_read, "read_file", counted)
    restore(saved, state, "tensor=8")
    arrays = [name for name in SavedStep.open(step_folder(saved, 3)).manifest.files if "/" in name]
    leaves = [name for name in arrays if name.count("/") > 2 or name.endswith(("/0", "/.zarray"))]
    assert sorted(read) == sorted(leaves)
    read.clear()
    some = {"params/b": "saved", "**": "fresh"}
    restore(saved, state, "one device", partial=some, fresh=state)
    assert sorted(read) == ["arrays/state/params/b/.zarray", "arrays/state/params/b/0"]


def test_shards_that_are_gathered_one_after_the_other_are_the_same(saved, state, monkeypatch):
    monkeypatch.setattr(_read, "_GROUP_BYTES", 1)
    assert ck.bits(restore(saved, state, "tensor=8").state) == ck.bits(state)


def test_every_damage_in_what_is_read_is_told_at_once(saved, state, tmp_path):
    arrays = damaged_copy(saved, tmp_path) / "arrays" / "state"
    for chunk in (arrays / "params" / "w" / "0.0", arrays / "model_state" / "seen" / "0"):
        ck.flip_bit(chunk, random.Random(0))
    with pytest.raises(sk.errors.CheckpointCorruptedError) as error:
        restore(tmp_path / "copy", state)
    said = str(error.value)
    assert "2 findings" in said
    assert re.search(r"params/w f32\[16,32\] +arrays/state/params/w/0\.0 has CRC-32", said)
    assert re.search(r"model_state/seen i32\[8\] +arrays/state/model_state/seen/0 has CRC-32", said)
    # What is not asked for is not read; `shardkit checkpoint verify` reads everything.
    some = {"params/b": "saved", "**": "fresh"}
    back = restore(tmp_path / "copy", state, partial=some, fresh=state)
    assert ck.bits(back.state) == ck.bits(state)


# --- damage


def damaged_copy(saved, tmp_path):
    return step_folder(ck.copy(saved, tmp_path / "copy"), 3)


DAMAGES = [ck.flip_bit, ck.zero_page, ck.truncate, ck.delete]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_to_any_file_is_found_and_named_by_leaf(damage, saved, tmp_path):
    folder = damaged_copy(saved, tmp_path)
    rng = random.Random(0)
    for path in ck.files(folder):
        before = path.read_bytes()
        if not before and damage is not ck.delete:
            continue
        damage(path, rng)
        if path.is_file() and path.read_bytes() == before:  # zeros were zeros
            continue
        name = str(path.relative_to(folder))
        with pytest.raises(sk.errors.CheckpointCorruptedError) as error:
            SavedStep.open(folder).check_files()
        leaf = re.search(r"arrays/state/(.*)/[^/]*$", name)
        assert (leaf[1] if leaf else path.name).replace("%20", " ") in str(error.value)
        path.write_bytes(before)
    SavedStep.open(folder).check_files()


def test_a_manifest_that_still_reads_is_found_to_be_changed(saved, tmp_path):
    path = damaged_copy(saved, tmp_path) / "manifest.json"
    text = path.read_text()
    for changed in (text.replace('"loss": 0.5', '"loss": 0.6'), text.replace("{", "{ ", 1)):
        path.write_text(changed)
        with pytest.raises(
            sk.errors.CheckpointCorruptedError, match="it was changed after it was written"
        ):
            SavedStep.open(path.parent)


def test_a_file_that_was_cut_short_says_by_how_much(saved, tmp_path):
    folder = damaged_copy(saved, tmp_path)
    chunk = folder / "arrays" / "state" / "model_state" / "seen" / "0"
    chunk.write_bytes(chunk.read_bytes()[:7])
    with pytest.raises(
        sk.errors.CheckpointCorruptedError, match=r"model_state/seen/0 has 7 bytes, 32 were written"
    ):
        SavedStep.open(folder).check_files()


def test_swapped_and_added_files_are_found(saved, tmp_path):
    folder = damaged_copy(saved, tmp_path)
    arrays = folder / "arrays" / "state"
    ck.swap(arrays / "params" / "w" / "0.0", arrays / "params" / "w" / "1.1")
    (arrays / "model_state" / "seen" / "new").write_text("")
    with pytest.raises(sk.errors.CheckpointCorruptedError) as error:
        SavedStep.open(folder).check_files()
    said = str(error.value)
    assert "3 findings" in said
    assert said.count("params/w f32[16,32]") == 2
    assert "model_state/seen i32[8]" in said
    assert "was not written by this save" in said


def test_values_that_changed_before_they_reached_the_disk_are_found(saved, state, tmp_path):
    folder = damaged_copy(saved, tmp_path)
    chunk = folder / "arrays" / "state" / "params" / "w" / "0.0"
    ck.flip_bit(chunk, random.Random(0))
    # As if the file had been written so: its checksum fits, the leaf's fingerprint does not.
    manifest = SavedStep.open(folder).manifest
    name = str(chunk.relative_to(folder))
    files = {
        **manifest.files,
        name: dataclasses.replace(
            manifest.files[name], crc32=f"{zlib.crc32(chunk.read_bytes()):08x}"
        ),
    }
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_text())
    with pytest.raises(
        sk.errors.CheckpointCorruptedError, match=r"params/w f32\[16,32\] +has fingerprint"
    ):
        restore(tmp_path / "copy", state)


def test_the_step_before_a_damaged_one_is_offered_or_taken(state, saved, tmp_path):
    older = sk.Checkpointer(tmp_path)
    older.save(1, state)
    older.save(2, state)
    (tmp_path / "step-00000002" / "arrays" / "state" / "step" / "0").unlink()
    with pytest.raises(sk.errors.CheckpointCorruptedError) as error:
        restore(tmp_path, state)
    assert "arrays/state/step/0 is gone" in str(error.value)
    assert 'Fix: restore(..., step=1), or on_damage="previous"' in str(error.value)

    with sk.Checkpointer(tmp_path) as checkpoints:
        to = ck.shardings(state)
        with pytest.warns(RuntimeWarning, match="Restoring the step before it"):
            back = checkpoints.restore(ck.abstract(state), to, on_damage="previous")
        assert (back.step, list(back.damaged)) == (1, [2])
        checkpoints.save(2, state)
    assert sk.Checkpointer(tmp_path).steps() == (1, 2)
    assert (tmp_path / "damaged-step-00000002").is_dir()
    assert ck.bits(restore(tmp_path, state).state) == ck.bits(state)


@pytest.mark.parametrize(
    ("version", "fix"),
    [(3, "newer(.|\n)*pip install --upgrade"), (1, "older(.|\n)*export_safetensors")],
)
def test_another_format_is_no_damage(version, fix, saved, state, tmp_path):
    path = damaged_copy(saved, tmp_path) / "manifest.json"
    text = re.sub(r',\n "crc32": "\w+"\n}\n$', "\n}\n", path.read_text())
    text = text.replace('"version": 2', f'"version": {version}')
    crc = f',\n "crc32": "{zlib.crc32(text.encode()):08x}"\n}}\n'
    path.write_text(text.removesuffix("\n}\n") + crc)
    with pytest.raises(sk.errors.CheckpointError, match=f"is {fix}") as error:
        restore(tmp_path / "copy", state, on_damage="previous")
    assert f"format version {version}; this shardkit reads 2" in str(error.value)


def test_a_folder_in_one_that_may_not_be_read_is_not_taken_for_none(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)  # the tests may be those of a user who may
    with pytest.raises(sk.errors.CheckpointError, match="Permission denied"):
        sk.Checkpointer(tmp_path / "run" / "checkpoints").steps()


def test_a_folder_of_something_else_is_told(tmp_path, state):
    with pytest.raises(sk.errors.CheckpointError, match="is empty"):
        restore(tmp_path, state)
    (tmp_path / "photos").mkdir()
    with pytest.raises(sk.errors.CheckpointError, match="no complete step, but photos"):
        restore(tmp_path, state)
    with pytest.raises(sk.errors.CheckpointError, match="is not a folder"):
        restore(tmp_path / "none", state)


def earlier(state, step):
    """The leaves of a state as they were saved before states had `halted`."""
    return {"step": jnp.int32(step)} | {
        name: getattr(state, name) for name in ("params", "opt_state", "model_state", "key")
    }


@pytest.mark.parametrize("below", ["", "state"])
def test_a_checkpoint_from_before_the_flag_is_read_as_not_halted(below, state, tmp_path):
    old, new, to = earlier(state, 3), state, ck.shardings(state)
    if below:
        old, new, to = ({below: one} for one in (old, new, to))
    folder = sk.Checkpointer(tmp_path)
    folder.save(3, old)
    back = folder.restore(ck.abstract(new), to).state
    assert ck.bits(back) == ck.bits(new)
    halted = (back[below] if below else back).halted
    assert halted.sharding == ck.shardings(state).halted
    # A declared source of the leaf is kept to.
    flagged = dataclasses.replace(state, halted=jnp.bool(True))
    fresh = {below: flagged} if below else flagged
    path = f"{below}/halted" if below else "halted"
    partial = {path: "fresh", "**": "saved"}
    back = folder.restore(ck.abstract(new), to, partial=partial, fresh=fresh).state
    assert bool((back[below] if below else back).halted)


@pytest.mark.parametrize("halted", [False, True])
def test_whether_a_state_has_halted_comes_back(halted, state, tmp_path):
    one = dataclasses.replace(state, halted=jnp.bool(halted))
    sk.Checkpointer(tmp_path).save(3, one)
    back = sk.Checkpointer(tmp_path).restore(ck.abstract(one), ck.shardings(one)).state
    assert bool(back.halted) == halted


def test_the_negative_counter_of_an_earlier_stopped_step_is_refused(state, tmp_path):
    folder = sk.Checkpointer(tmp_path)
    folder.save(3, earlier(state, ~3))
    with pytest.raises(sk.errors.CheckpointError, match=r"step .*is -4: .* after 3 updates"):
        folder.restore(ck.abstract(state), ck.shardings(state))


def test_no_other_missing_leaf_is_made_up(state, tmp_path):
    folder = sk.Checkpointer(tmp_path)
    folder.save(3, {k: x for k, x in earlier(state, 3).items() if k != "key"})
    with pytest.raises(sk.errors.CheckpointError, match=r"1 leaf .*\n  key"):
        folder.restore(ck.abstract(state), ck.shardings(state))
