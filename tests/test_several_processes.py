"""Two processes with four devices each are one process with eight."""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import shardkit as sk
from shardkit.cli import main
from shardkit.run import plot_runs

from . import _broken_run as broken_run
from . import _one_of_several as one

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Programs that processes of several tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def launched(cache, capfd, monkeypatch):
    """Runs a module in two processes of four devices; returns the code and lines of errors."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

    def run(*words):
        command = [sys.executable, "-m", *map(str, words)]
        code = main(["launch", "-n", "2", "--devices", "4", "--", *command])
        return code, capfd.readouterr().err.splitlines()

    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses, gradients and score of one process, which has saved its state on the way."""
    folder = tmp_path_factory.mktemp("several")
    step = one.compiled()
    state, first = one.train(step, step.init(jax.random.key(0)), 0, one.HALF)
    sk.Checkpointer(folder / "by one").save(one.HALF, state)
    state, second = one.train(step, state, one.HALF, one.STEPS)
    gradients = one.whole(step.gradients(state, one.TEXT.batch(0))[1])
    score = float(step.evaluate(state, one.TEXT.validation_batch(0))["loss"])
    return folder, step, first + second, gradients, score


@pytest.mark.slow
def test_two_processes_compute_save_and_restore_what_one_does(alone, launched):
    folder, step, losses, gradients, score = alone
    code, errors = launched("tests._one_of_several", folder)
    assert code == 0, "\n".join(errors)
    told = [json.loads((folder / f"said-{process}.json").read_text()) for process in range(2)]

    # The same numbers, which each of them can read.
    assert told[0]["losses"] == pytest.approx(losses, rel=1e-6)
    assert told[0]["losses"] == told[1]["losses"]
    assert told[0]["evaluated"] == pytest.approx(score, rel=1e-6)
    with np.load(folder / "gradients.npz") as found:
        for path, want in gradients.items():
            apart = np.linalg.norm(found[path] - want) / max(np.linalg.norm(want), 1e-30)
            assert apart <= 1e-5, path

    # Each read the rows of its own devices, of every batch, in order and once.
    for process, rows in enumerate(([0, 1, 2, 3], [4, 5, 6, 7])):
        assert told[process]["read"] == [[i, rows] for i in range(one.STEPS)]

    # A report is of the same program.
    assert told[0]["report"] == step.report().ledger.total() > 0

    # A step that one process has saved goes on in two.
    assert told[0]["resumed"] == pytest.approx(losses[one.HALF :], rel=1e-6)

    # A step that two have saved comes back in one, bit for bit.
    checkpoints = sk.Checkpointer(folder / "by several")
    back = one.whole(checkpoints.restore(step.abstract_state, step.shardings).state)
    with np.load(folder / "final.npz") as final:
        assert back.keys() == set(final.files)
        for path, x in back.items():
            assert x.tobytes() == final[path].tobytes(), path
    assert sorted(path.name for path in (folder / "by several").iterdir()) == [
        ".lock",
        "step-00000004",
    ]

    # So do tensors that both have written.
    tensors = sk.hf.load(folder / "tensors", step.spec, step.mesh, table=one.TABLE)
    for name, x in tensors.items():
        assert np.asarray(x).tobytes() == back[f".params['{name}']"].tobytes(), name
    assert [path.name for path in (folder / "tensors").iterdir()] == ["model.safetensors"]

    # Who feeds other rows than its own is told which.
    for process in range(2):
        share = f"process {process} must pass 4 rows (8 global / 2), got 3"
        assert f"batch/inputs   {share}" in told[process]["refused"]


# --- runs of two processes that break

CAUSES = {
    "killed": (137, "killed by SIGKILL"),
    "raises": (1, "OSError: the text is gone"),
    "stuck": (70, "stuck: no progress for 4 s, the declared step timeout"),
}


def rows(out, kind):
    every = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row for row in every if row["kind"] == kind]


def losses(out):
    return {row["step"]: row["loss"] for row in rows(out, "step")}


def saved(out):
    return sk.Checkpointer(out / "checkpoints").steps()


@pytest.fixture
def broken(launched, tmp_path):
    """Makes runs in two processes, the last of which breaks; returns code and lines of errors."""
    return lambda *runs: launched("tests._broken_run", tmp_path, *runs)


def check_told(code, errors, way):
    """All processes name the one that broke, its step and the cause, in their first line."""
    expected, cause = CAUSES[way]
    assert code == expected, "\n".join(errors)
    head, _, said = errors[0].partition(": ")
    assert head.startswith("process 1 of 2, step ")
    assert said == cause
    told = "killed, or cut off: its connection has closed" if way == "killed" else cause
    itself = [line for line in errors if line.startswith("[0] ")]
    # The transport of collectives between CPU processes may end process 0 in C++ first.
    cut_off = way == "killed" and itself[0].startswith("[0] terminate called after throwing")
    assert cut_off or any(
        line.startswith("[0] process 1 of 2, step ") and told in line for line in itself
    )


@pytest.mark.slow
def test_a_process_that_raises_or_is_killed_ends_all_and_the_runs_go_on(broken, tmp_path):
    check_told(*broken("first:raises"), "raises")
    assert saved(tmp_path / "first")[-1] in (2, 4)
    # The first run goes on in two processes; then the second one breaks.
    check_told(*broken("first", "second:killed"), "killed")
    assert saved(tmp_path / "second")[-1] in (2, 4)
    # The second one goes on in one process, which this is.
    step = broken_run.compiled()
    broken_run.train(tmp_path / "second", step)
    broken_run.train(tmp_path / "alone", step)
    for out in (tmp_path / "first", tmp_path / "second"):
        assert sorted(losses(out)) == list(range(1, 9))
        assert losses(out) == pytest.approx(losses(tmp_path / "alone"), rel=1e-6)
        assert len(rows(out, "resumed")) == 1
        assert saved(out)[-1] == 8


@pytest.mark.slow
def test_everything_that_a_run_can_have_works_in_two_processes(broken, tmp_path):
    code, errors = broken("run:watched")
    assert code == 0, "\n".join(errors)
    run = tmp_path / "run"
    counts = [json.loads((run / f"events-{process}.json").read_text()) for process in range(2)]
    once = dict.fromkeys(("start", "finish", "exit"), 1)
    assert counts == [{**once, "batch": 8, "dispatch": 8, "step": 8, "eval": 4, "save": 4}] * 2
    assert [row["ok"] for row in rows(run, "check")] == [True, True, True]
    assert not rows(run, "replicas")
    assert any((run / "profile").rglob("*.xplane.pb"))
    plot_runs([run], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.slow
def test_hostile_connections_change_nothing(broken, tmp_path):
    code, errors = broken("quiet", "run:hostile")
    assert code == 0, "\n".join(errors)
    assert losses(tmp_path / "run") == losses(tmp_path / "quiet")
    assert rows(tmp_path / "run", "finished")


@pytest.mark.slow
def test_a_process_that_writes_elsewhere_is_told_at_once(broken, tmp_path):
    code, errors = broken("run:elsewhere")
    said = "\n".join(errors)
    assert code == 2, said
    assert "CheckpointError: In process 1: A save has failed." in said
    assert "of process 1/.saving-step-00000001-" in said
    assert not list(tmp_path.glob("of process 1/*"))


@pytest.mark.slow
def test_a_process_that_hangs_ends_all(broken, tmp_path):
    check_told(*broken("run:stuck"), "stuck")
    assert saved(tmp_path / "run")[-1] in (2, 4)


@pytest.mark.slow
def test_a_process_that_does_not_stop_with_the_others_is_named(broken, tmp_path):
    code, errors = broken("run:stops")
    named = r"process 0 of 2, step \d: has not reached 'the stop after update 6' within 10 s"
    assert re.fullmatch(named, errors[0]), "\n".join(errors)
    assert code == 70
    assert saved(tmp_path / "run")[-1] in (4, 6)


@pytest.mark.slow
def test_another_batch_and_program_are_told_before_the_first_step(broken, tmp_path):
    code, errors = broken("run:differs")
    assert code == 1, "\n".join(errors)
    assert "before its first step: ProcessError: 2 processes do not agree on 3 values" in errors[0]
    said = "\n".join(errors)
    assert re.search(r"batch\.x +process 0: 'f32\[8,8\]'; process 1: 'f32\[16,8\]'", said), said
    assert re.search(r"program +process 0: '\w+…; process 1: '\w+…", said), said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_a_step_failed_on_is_dumped_once_and_replayed_on_one_device(broken, tmp_path):
    code, errors = broken("run:poisoned")
    assert code == 2
    dump = tmp_path / "run" / "dumps" / "step-00000006"
    said = "\n".join(errors)
    assert "The run has diverged." in errors[0]
    assert "loss is nan" in said
    assert f"its state and batch are in {dump}" in said
    assert [row["folder"] for row in rows(tmp_path / "run", "dumped")] == [str(dump)]
    assert [path.name for path in dump.parent.iterdir() if path.name != ".lock"] == [dump.name]
    found = sk.replay(dump, broken_run.compiled(jax.devices()[:1]))
    assert found.reproduced
    assert (found.batch, found.params) == ({"x f32[8,8]": 1}, {})
    np.testing.assert_array_equal(found.dump.batch["x"], broken_run.broken("poisoned", 1, 5)["x"])


# --- the command line in two processes

FIELDS = (
    "model.num_layers=1", "model.embed_dim=8", "model.mlp_dim=8", "model.num_heads=2",
    "model.kv_heads=2",
    "data.batch_size=8", "data.seq_len=8", "data.validation_fraction=0.3", "data.prefetch=0",
    "optimizer.name=sgd", "train.steps=60", "train.eval_every=0", "train.sample=0",
    "train.baselines=false", "train.checkpoint_every=50", "train.log_every=1",
    "train.step_timeout=20", "strategy=data", "mesh.data=8", "mesh.tensor=1",
)  # fmt: skip


def command(folder):
    """Trains a small model on a text of its own."""
    (folder / "text.txt").write_bytes(bytes(range(97, 123)) * 60)
    given = (*FIELDS, f"data.path={folder / 'text.txt'}", f"train.out={folder / 'run'}")
    return ["train", "configs/nano.py", *(word for one in given for word in ("--set", one))]


@pytest.mark.slow
def test_signals_end_all_after_one_update_and_the_same_command_goes_on(tmp_path, launched):
    out, words, ends = tmp_path / "run", command(tmp_path), []
    for which, expected in (("SIGTERM", 75), ("SIGINT", 130)):
        code, errors = launched("tests._signalled_command", which, *words)
        assert code == expected, "\n".join(errors)
        ends.append(max(losses(out)))
        assert saved(out)[-1] == ends[-1]
        said = f"Step {ends[-1]} is saved. Rerun the same command to resume."
        assert sum(line.endswith(said) for line in errors) >= 1, errors
    assert 1 <= ends[0] < ends[1] < 50
    assert sorted(losses(out)) == list(range(1, ends[1] + 1))
    assert [len(rows(out, kind)) for kind in ("start", "stopped", "resumed")] == [1, 2, 1]
    assert not (tmp_path / "run-2").exists()


@pytest.mark.slow
def test_processes_that_differ_stop_before_the_first_step(tmp_path, launched):
    code, errors = launched("tests._signalled_command", "differ", *command(tmp_path))
    assert code == 2
    assert "before its first step: ProcessError: 2 processes do not agree on 1 value." in errors[0]
    assert any("config.train.seed  process 0: 0; process 1: 1" in line for line in errors)
    assert not (tmp_path / "run").exists()
