"""A run that is killed again and again ends with the bits of one that was not."""

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardkit.checkpoint import Checkpointer

from . import _killed_run as killed_run

ROOT = Path(__file__).parent.parent
STEPS, KILLS = killed_run.STEPS, 2


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests._killed_run", folder],
        cwd=ROOT,
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
def test_a_run_that_is_killed_at_random_ends_with_the_same_bits(tmp_path, capsys):
    killed_run.run(tmp_path / "whole")

    rng, folder, lives = random.Random(0), tmp_path / "killed", []
    for _ in range(KILLS):
        process = start(folder)
        aim = newest(folder) + rng.randrange(5, STEPS // (KILLS + 2))
        while newest(folder) < aim and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))  # within an update, a save or neither
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate(timeout=60)
        lives.append((process.returncode, Checkpointer(folder / "checkpoints").steps(), said))
    assert [code for code, *_ in lives] == [-signal.SIGKILL] * KILLS, lives
    capsys.readouterr()
    killed_run.run(folder)
    assert "resumed" in capsys.readouterr().out
    assert finished(folder) == finished(tmp_path / "whole")
    held = {name.partition("/")[0] for name in finished(folder)}
    assert held == {"halted", "key", "opt_state", "params", "step"}
