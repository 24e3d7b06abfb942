"""A run that is killed again and again ends with the bits of one that was not."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardkit.checkpoint import Checkpointer

ROOT = Path(__file__).parent.parent
STEPS, EVERY, KILLS = 120, 8, 2
SETTINGS = {
    "devices": "cpu:2",
    "mesh.tensor": 1,
    "strategy": "data",
    "model.embed": 8,
    "model.layers": 1,
    "model.heads": 2,
    "model.mlp": 8,
    "data.length": 8,
    "train.steps": STEPS,
    "train.checkpoint_every": EVERY,
    "train.eval_every": 0,
    "train.eval_batches": 1,
    "train.baselines": "false",
    "train.sample": 0,
}


def start(folder: Path) -> subprocess.Popen[str]:
    words = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache")}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return subprocess.Popen(
        [sys.executable, "-m", "shardkit.cli", "train", *words, "--set", f"train.out={folder}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", **cache},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def newest(folder: Path) -> int:
    """Updates that the metrics know of."""
    path = folder / "metrics.jsonl"
    return path.read_text().count('"kind": "step"') if path.exists() else 0


def finished(folder: Path) -> dict[str, str]:
    """sha256 of every file that holds the last state."""
    step = folder / "checkpoints" / f"step-{STEPS:08d}" / "arrays" / "state"
    files = [path for path in step.rglob("*") if path.is_file() and path.name != "_METADATA"]
    return {
        str(path.relative_to(step)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_ends_with_the_same_bits(tmp_path):
    whole = start(tmp_path / "whole")
    said, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, said

    rng, folder, lives = random.Random(0), tmp_path / "killed", []
    for _ in range(KILLS):
        process = start(folder)
        aim = newest(folder) + rng.randrange(5, STEPS // (KILLS + 2))
        while newest(folder) < aim and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))  # within an update, a save or neither
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        lives.append((process.returncode, Checkpointer(folder / "checkpoints").steps()))
    process = start(folder)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert [code for code, _ in lives] == [-signal.SIGKILL] * KILLS, lives
    assert "resumed" in said
    assert finished(folder) == finished(tmp_path / "whole")
    assert len(finished(folder)) > 10
