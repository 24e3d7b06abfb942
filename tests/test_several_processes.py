"""Two processes with four devices each are one process with eight."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import shardkit as sk

from . import _one_of_several as one

ROOT = Path(__file__).parent.parent


def launch(*words, n=2, devices=4, timeout=120, **environment):
    """Runs a command in several processes; returns code, output and lines of errors."""
    shardkit = [sys.executable, "-m", "shardkit.cli", "launch"]
    done = subprocess.run(
        [*shardkit, "-n", str(n), "--devices", str(devices), "--", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses, gradients and score of one process, which has saved its state on the way."""
    folder = tmp_path_factory.mktemp("several")
    step = one.compiled()
    state, first = one.train(step, step.init(jax.random.key(0)), 0, one.HALF)
    sk.Checkpointer(folder / "by one").save(one.HALF, state)
    state, second = one.train(step, state, one.HALF, one.STEPS)
    gradients = one.whole(step.gradients(state, one.TEXT.batch(0))[1])
    score = float(step.evaluate(state, one.TEXT.held_out_batch(0))["loss"])
    return folder, step, first + second, gradients, score


@pytest.mark.slow
def test_two_processes_compute_save_and_restore_what_one_does(alone):
    folder, step, losses, gradients, score = alone
    code, _, errors = launch(sys.executable, "-m", "tests._one_of_several", folder)
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

    # Who feeds other rows than its own is told which.
    for process in range(2):
        share = f"process {process} must feed 4 rows (8 global / 2), got 3"
        assert f"batch/inputs   {share}" in told[process]["refused"]


# --- a run of two processes, broken in three ways

BREAKS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "raises": "raise OSError('the text is gone')",
    "stuck": "time.sleep(600)",
}
CAUSES = {
    "killed": "killed by SIGKILL",
    "raises": "OSError: the text is gone",
    "stuck": "stuck: nothing has moved for 4 s, the declared step timeout",
}
BROKEN = """
import os, signal, sys, time
from shardkit.data import Text
batch = Text.batch
def broken(self, step, *rows):
    if step >= 5 and '"index": 1' in os.environ["SHARDKIT_PROCESS"]:
        {how}
    return batch(self, step, *rows)
{name} = broken
from shardkit.cli import main
sys.exit(main(sys.argv[1:]))
"""
FIELDS = (
    "model.layers=1", "model.embed=16", "model.mlp=32", "model.heads=2", "model.kv_heads=2",
    "data.batch=8", "data.length=16", "data.held_out=0.3", "data.prefetch=0",
    "optimizer.name=sgd", "train.steps=8", "train.eval_every=0", "train.sample=4",
    "train.baselines=false", "train.checkpoint_every=2", "train.log_every=1",
    "train.step_timeout=4",
)  # fmt: skip


def words(out, *fields):
    """Of a small run on a text of its own."""
    text = out.parent / "text.txt"
    text.write_bytes(bytes(range(97, 123)) * 60)
    given = (*FIELDS, f"data.path={text}", f"train.out={out}", *fields)
    return ["train", "configs/nano.py", *(word for one in given for word in ("--set", one))]


def losses(out):
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}


@pytest.mark.slow
@pytest.mark.parametrize("way", BREAKS)
def test_a_broken_process_ends_all_and_the_run_goes_on(way, tmp_path):
    out = tmp_path / "run"
    program = BROKEN.format(how=BREAKS[way], name="Text.batch")
    code, _, errors = launch(sys.executable, "-c", program, *words(out))
    assert code == {"killed": 137, "raises": 1, "stuck": 70}[way], "\n".join(errors)
    head, _, cause = errors[0].partition(": ")
    assert head.startswith("process 1 of 2, step ")
    assert cause == CAUSES[way]
    # The other one says the same, whoever started it.
    told = "killed, or cut off: its connection has closed" if way == "killed" else CAUSES[way]
    assert any(line.startswith("[0] process 1 of 2, step ") and told in line for line in errors)

    checkpoints = sk.Checkpointer(out / "checkpoints")
    assert checkpoints.steps()[-1] in (2, 4)
    here = [sys.executable, "-m", "shardkit.cli"]
    if way == "killed":  # on one process
        assert launch(*here, *words(out), n=1, devices=8)[0] == 0
    elif way == "raises":  # on two
        assert launch(*here, *words(out))[0] == 0
    else:
        return
    assert sorted(losses(out)) == list(range(1, 9))
    kinds = [json.loads(row)["kind"] for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("resumed") == 1
    assert checkpoints.steps()[-1] == 8


@pytest.mark.slow
def test_processes_that_differ_stop_before_the_first_step(tmp_path):
    program = BROKEN.format(how="pass", name="Text.no_batch").replace(
        "main(sys.argv[1:])",
        "main([*sys.argv[1:], '--set', 'train.seed=' + os.environ['SHARDKIT_PROCESS'][10]])",
    )
    code, _, errors = launch(sys.executable, "-c", program, *words(tmp_path / "run"))
    assert code == 2
    assert "before its first step: ProcessError: 2 processes do not agree on 1 thing." in errors[0]
    assert any("config.train.seed  process 0: 0; process 1: 1" in line for line in errors)
    assert not (tmp_path / "run").exists()
