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
