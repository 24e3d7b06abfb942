"""A folder that keeps what was compiled: a second start compiles nothing of the step."""

import contextlib
import dataclasses
import io
import os
import pickle
import random
import shutil
import subprocess
import sys
import warnings
import zipfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import shardkit as sk
from shardkit.cli._main import _format_warning
from shardkit.config import CompileConfig
from shardkit.run import _facts as facts_module
from shardkit.step import can_keep_programs
from shardkit.step._program_cache import ProgramCache
from shardkit.step._saved_programs import KeptProgram, name_program

from ._damages import full_disk

X = np.linspace(-1, 1, 16 * 8, dtype="f").reshape(16, 8)


def loss(p, b, key):
    return jnp.mean(jnp.tanh(b["x"] @ p["w"]) ** 2)


def init(key):
    return {"w": jnp.linspace(-1, 1, 8 * 4).reshape(8, 4)}


def compile_step(cache, devices=1, **changes):
    options = {"loss_fn": loss, "optimizer": optax.adam(0.1), "init": init, "batch": {"x": X}}
    spec = sk.StepSpec(**options | changes, strategy=sk.strategies.data())
    mesh = sk.MeshSpec(data=devices).build(devices=jax.devices()[:devices])
    return spec.compile(mesh, cache=cache)


def run(step):
    """Everything that a step compiles: init, train, evaluate, gradients and the self check."""
    state = step.init(jax.random.key(0))
    assert step.self_check(state, {"x": X}).ok
    state, metrics = step(state, {"x": X})
    return float(metrics["loss"]), float(step.evaluate(state, {"x": X})["loss"])


@pytest.fixture
def compiles():
    """Names of the programs that XLA compiles from here on."""
    seen = []

    def listen(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder after one run, and what the run gave."""
    folder = tmp_path_factory.mktemp("cache") / "new" / ".compiled"
    return folder, run(compile_step(folder))


@pytest.fixture
def cache(filled, tmp_path):
    """A copy of that folder, to spoil."""
    return shutil.copytree(filled[0], tmp_path / "copy")


def test_a_second_start_compiles_nothing(filled, compiles):
    folder, given = filled
    jax.random.key(0)
    del compiles[:]
    step = compile_step(folder)
    assert run(step) == given
    # On JAX 0.11 and later the text of one probe depends on what was traced before it.
    allowed = jax.__version_info__ >= (0, 11)
    assert len([name for name in compiles if "run" in name or "step" in name]) <= allowed
    assert step.program.from_cache
    assert step.report().ledger == compile_step(None).report().ledger


def test_another_program_compiles_and_is_kept_beside(cache, compiles):
    before = set(os.listdir(cache))
    step = compile_step(cache, optimizer=optax.adam(0.2))
    assert compiles
    assert not step.program.from_cache
    assert len(set(os.listdir(cache)) - before) == 1


DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "a flipped bit": lambda data: data[:999] + bytes([data[999] ^ 4]) + data[1000:],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_told_replaced_and_never_run(cache, how):
    for path in cache.iterdir():
        path.write_bytes(DAMAGES[how](path.read_bytes()))
    with pytest.warns(sk.SavedStepWarning, match="since the one that was kept is damaged"):
        step = compile_step(cache)
    assert not step.program.from_cache
    assert compile_step(cache).program.from_cache


class Tiny:
    """A program of one product in a folder of its own, and what may happen to its file."""

    def __init__(self, folder, factor=2.0):
        mesh = sk.MeshSpec(data=1).build(devices=jax.devices()[:1])
        shape = jax.ShapeDtypeStruct((8,), jnp.float32)
        self.lowered = jax.jit(lambda x: jnp.tanh(x) * factor).lower(shape)
        self.compiled, self.cache = self.lowered.compile(), ProgramCache(folder, mesh)
        self.name = name_program(self.lowered, {}, mesh)
        self.path = folder / f"{self.name}.saved"

    def store(self):
        self.cache.store(self.name, KeptProgram(self.compiled, "printed"))
        return self

    def load(self):
        """What another run loads: the value, None if nothing is, and the warnings."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = dataclasses.replace(self.cache).load(self.name, self.lowered)
        return found and found.compiled(np.full(8, 0.5, "f")), [
            str(warning.message) for warning in told
        ]

    def fill(self, program):
        """Writes a file with another executable under this name, all checksums right."""
        with zipfile.ZipFile(self.path, "w") as file:
            file.writestr("header.json", "{}")
            file.writestr(f"{self.name}.program", program)
            file.writestr(f"{self.name}.log", "")
            file.writestr(f"{self.name}.lines", "")


def program_of(tiny):
    with zipfile.ZipFile(tiny.path) as file:
        return file.read(f"{tiny.name}.program")


def test_no_flipped_bit_and_no_cut_ends_a_run(tmp_path):
    tiny, rng = Tiny(tmp_path).store(), random.Random(0)
    data = tiny.path.read_bytes()
    with zipfile.ZipFile(tiny.path) as file:
        first = file.infolist()[1].header_offset
        places = [*range(first, first + 110), *range(file.start_dir, len(data))]
    flips = [(at, bit) for at in places for bit in (0, 3)]
    flips += [(rng.randrange(len(data)), rng.randrange(8)) for _ in range(100)]
    refused = 0
    for at, bit in flips:
        tiny.path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        value, told = tiny.load()
        assert (value is None) == (len(told) == 1), (at, bit, told)
        assert value is None or np.allclose(value, 2 * np.tanh(0.5))  # a date, or the header
        refused += value is None
    assert 300 < refused < len(flips)
    for end in range(0, len(data), 199):
        tiny.path.write_bytes(data[:end])
        value, (told,) = tiny.load()
        assert value is None
        assert "is damaged: " in told


PROGRAMS = {
    "nothing": b"",
    "no pickle": b"garbage",
    "another object": pickle.dumps(3),
    "a module that is not here": b"cnosuchmodule\nthing\n.",
    "a class that raises": b"cdecimal\nDecimal\n(Vx\ntR.",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_no_executable_is_told(name, tmp_path):
    tiny = Tiny(tmp_path)
    tiny.fill(PROGRAMS[name])
    value, (told,) = tiny.load()
    assert value is None
    assert f"{tiny.name}.saved" in told
    assert f"Fix: remove {tmp_path}" in told


def test_the_executable_of_other_arguments_never_runs(tmp_path):
    tiny = Tiny(tmp_path)
    shape = jax.ShapeDtypeStruct((9,), jnp.float32)
    tiny.compiled = jax.jit(lambda x: x).lower(shape).compile()
    value, (told,) = tiny.store().load()
    assert value is None
    assert "the executable takes other arguments" in told


def test_a_pipe_is_not_waited_for(tmp_path):
    tiny = Tiny(tmp_path)
    os.mkfifo(tiny.path)
    value, (told,) = tiny.load()
    assert value is None
    assert "Is a pipe, not a file" in told
    os.rename(tiny.path, tmp_path / "step.saved")
    with pytest.raises(sk.errors.StepError, match="Is a pipe, not a file"):
        sk.load_step(tmp_path / "step.saved", None)


def first_loss(cache):
    step = compile_step(cache)
    return float(step(step.init(jax.random.key(0)), {"x": X})[1]["loss"])


@pytest.mark.parametrize("cache", ["file", "file/cache"])
def test_a_folder_that_cannot_be_written_is_told_and_the_step_runs(cache, tmp_path, filled):
    (tmp_path / "file").touch()
    with pytest.warns(sk.SavedStepWarning, match="is not kept; the next run compiles") as told:
        assert first_loss(tmp_path / cache) == filled[1][0]
    assert len(told) == 1  # of three programs
    why = {"file": "is not a folder", "file/cache": "Not a directory"}[cache]
    assert f"{tmp_path / cache}  cannot be written: {why}" in str(told[0].message)
    assert "compile.cache=" in str(told[0].message)


@pytest.mark.parametrize("cache", ["s3://bucket/cache", "", "a\0b"])
def test_what_is_no_path_is_refused_as_a_folder(cache):
    with pytest.raises(sk.errors.StepError, match=r"is a URL|is empty|has a zero byte"):
        compile_step(cache)
    with pytest.raises(sk.errors.ConfigError, match=r"compile\.cache=(.|\n)*a path"):
        CompileConfig(cache=cache)


def test_programs_that_are_all_damaged_are_told_once(cache, filled):
    for path in cache.iterdir():
        path.write_bytes(DAMAGES["cut"](path.read_bytes()))
    with pytest.warns(sk.SavedStepWarning, match="is damaged") as told:
        assert first_loss(cache) == filled[1][0]
    assert len(told) == 1


def test_the_command_line_shows_the_message_without_the_line_that_warns():
    shown = _format_warning(sk.SavedStepWarning("What was"), sk.SavedStepWarning, "a.py", 3)
    assert shown == "SavedStepWarning: What was\n"
    assert _format_warning("other", UserWarning, "a.py", 3) == "a.py:3: UserWarning: other\n"


def test_a_full_disk_is_told_by_name(tmp_path, filled):
    with pytest.warns(sk.SavedStepWarning, match="cannot be written: File too large"), full_disk():
        assert first_loss(tmp_path) == filled[1][0]
    assert not os.listdir(tmp_path)


UNIMPLEMENTED = [NotImplementedError(), jax.errors.JaxRuntimeError("UNIMPLEMENTED: serialize")]


@pytest.mark.parametrize("error", UNIMPLEMENTED)
def test_a_backend_that_cannot_serialize_is_told_and_the_step_runs(
    error, tmp_path, filled, monkeypatch
):
    def serialize(compiled):
        raise error

    monkeypatch.setattr("jax.experimental.serialize_executable.serialize", serialize)
    why = "the program +cannot be written: (NotImplementedError|UNIMPLEMENTED: serialize)"
    with pytest.warns(sk.SavedStepWarning, match=why):
        assert first_loss(tmp_path) == filled[1][0]
    with pytest.raises(sk.errors.StepError, match=why):
        compile_step(None).save(tmp_path / "step.saved")


def test_several_processes_keep_nothing_and_say_so(tmp_path, monkeypatch):
    mesh = sk.MeshSpec(data=1).build(devices=jax.devices()[:1])
    assert can_keep_programs(mesh)
    tiny = Tiny(tmp_path)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    assert not can_keep_programs(mesh)
    with pytest.warns(sk.SavedStepWarning, match="2 processes  run this step"):
        assert ProgramCache.at(tmp_path, mesh) is None
    # What one process has written is of another name.
    assert name_program(tiny.lowered, {}, mesh) != tiny.name


def test_runs_that_share_a_folder_may_delete_what_the_other_counts(tmp_path, monkeypatch):
    tiny, scandir = Tiny(tmp_path), os.scandir
    (tmp_path / "gone.saved").touch()
    (tmp_path / ".0123.part").touch()
    (tmp_path / ".4567.part").touch()
    os.utime(tmp_path / ".4567.part", (1, 1))

    def race(folder):
        entries = list(scandir(folder))
        (tmp_path / "gone.saved").unlink(missing_ok=True)
        return entries

    monkeypatch.setattr("os.scandir", race)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.store()
    # A part of today may be of a run that writes it; an old one was left by one that was killed.
    assert set(os.listdir(tmp_path)) == {tiny.path.name, ".0123.part"}


def test_a_file_that_another_run_removed_is_compiled_in_silence(cache):
    for path in cache.iterdir():
        path.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_step(cache)
    assert len(os.listdir(cache)) == 1


def test_the_least_recently_used_go_first(cache, monkeypatch):
    kept = len(os.listdir(cache))
    monkeypatch.setattr("shardkit.step._program_cache._MOST", kept)
    oldest = min(cache.iterdir())
    os.utime(oldest, (1, 1))
    compile_step(cache, optimizer=optax.adam(0.3))
    assert not oldest.exists()
    assert len(os.listdir(cache)) == kept


def test_several_simulated_devices_keep_nothing_and_say_so(tmp_path):
    with pytest.warns(sk.SavedStepWarning, match="2 CPU devices  can deadlock in a program"):
        compile_step(tmp_path, devices=2)
    assert not os.listdir(tmp_path)


def start_run(folder, cache, updates):
    """Starts a run, or resumes it, and ends it after some updates in all.

    Returns:
      What it shows, and what its newest checkpoint has as facts.
    """

    def data(i):
        if i == updates:
            raise KeyboardInterrupt
        return {"x": X}

    config, out = sk.TrainConfig(steps=5, checkpoint_every=1), io.StringIO()
    console = Console(file=out, width=200)
    with contextlib.suppress(KeyboardInterrupt):
        sk.Trainer(compile_step(cache), data, folder, config, console=console).run()
    return out.getvalue(), sk.Checkpointer(folder / "checkpoints").manifest().config["run"]


def test_a_resumed_run_compiles_nothing_and_trusts_the_executable_that_was_checked(
    tmp_path, cache, compiles
):
    shown, first = start_run(tmp_path / "run", cache, 2)
    assert "self check before step 1 ok" in shown
    with mock.patch.object(facts_module, "_digest", side_effect=AssertionError):
        del compiles[:]
        shown, resumed = start_run(tmp_path / "run", cache, 4)
    assert "self check passed before step 1, with this very executable" in shown
    assert "evaluations in" not in shown
    assert (compiles, resumed) == ([], first)
    # What another run has checked had other values.
    assert "self check before step 1 ok" in start_run(tmp_path / "other", cache, 1)[0]


@pytest.mark.parametrize("spoil", ["a flipped bit", "another program"])
def test_a_resumed_run_checks_an_executable_that_it_has_not_checked(tmp_path, cache, spoil):
    start_run(tmp_path / "run", cache, 2)
    rows = tmp_path / "run" / "metrics.jsonl"
    if spoil == "a flipped bit":
        for path in cache.iterdir():
            path.write_bytes(DAMAGES[spoil](path.read_bytes()))
    else:
        name = compile_step(cache).program.kept_as
        rows.write_text(rows.read_text().replace(name, "0" * 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sk.SavedStepWarning)
        assert "self check before step 3 ok" in start_run(tmp_path / "run", cache, 3)[0]


SMALL = (
    *("model.num_layers=1", "model.embed_dim=16", "model.mlp_dim=32", "data.seq_len=16"),
    *("train.steps=2", "train.eval_batches=1", "train.sample=0", "train.baselines=false"),
    *("mesh=data=1", "devices=cpu:1", "strategy=data", "optimizer.name=adamw", "train.check=off"),
)


@pytest.mark.slow
def test_a_run_that_is_started_again_takes_its_programs_from_beside_it(tmp_path):
    words = [sys.executable, "-m", "shardkit", "train"]
    words += [word for option in SMALL for word in ("--set", option)]
    kept = tmp_path / "runs" / ".compiled"

    def start(*more):
        subprocess.run([*words, *more], cwd=tmp_path, check=True, capture_output=True, timeout=300)
        return {path.name: path.stat().st_mtime_ns for path in kept.glob("*")}

    assert not start("--set", "compile.cache=off")
    first = start()
    assert len(first) >= 4
    second = start()
    assert second.keys() == first.keys()  # nothing was compiled that was not there
    assert all(second[name] > first[name] for name in first)  # and all of it was used
