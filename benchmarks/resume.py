"""One run killed at random instants, over and over, beside the same run left alone.

    python benchmarks/resume.py [--kills 50] [--steps 250]

Each life of the run is a process of its own (forked before JAX starts, so that imports are paid
once) that calls `shardkit train` with the same words; SIGKILL comes at a random instant, every
second time while a save is being written. After the last kill the run is left to end. `same mesh`
goes on on the mesh that it was killed on; `mesh changes` takes the next of three at each restart.
"""

import argparse
import hashlib
import os
import pathlib
import random
import shutil
import signal
import tempfile
import time
from typing import Any

import _harness
import jax
import numpy as np
from _run_folder import last_step, read_metrics, saved_leaves

import shardkit as sk
from shardkit.cli import main as shardkit

CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "nano.py"
MESHES = ("data=8,tensor=1", "data=4,tensor=2", "data=2,tensor=4")
MODEL = (
    "model.num_layers=1",
    "model.embed_dim=32",
    "model.mlp_dim=32",
    "model.num_heads=4",
    "model.kv_heads=4",
    "data.batch_size=8",
    "data.seq_len=16",
)
EVERY = 3


def words(out: pathlib.Path, steps: int, mesh: str) -> list[str]:
    """The command line of every life."""
    fields = [
        *MODEL,
        f"data.path={out.parent / 'text.txt'}",
        "devices=cpu:8",
        f"mesh={mesh}",
        "optimizer.name=sgd",
        f"train.steps={steps}",
        "train.eval_every=0",
        "train.sample=0",
        "train.baselines=false",
        f"train.checkpoint_every={EVERY}",
        f"train.out={out}",
    ]
    return ["train", str(CONFIG), *(word for field in fields for word in ("--set", field))]


def start(out: pathlib.Path, steps: int, mesh: str) -> int:
    """Forks one life; returns its process."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        if not os.environ.get("SHOW"):
            os.dup2(null, 2)
        os._exit(shardkit(words(out, steps, mesh)))
    return child


def saving(out: pathlib.Path) -> bool:
    """Whether a save is half-written now."""
    return any((out / "checkpoints").glob(".saving-*"))


def life(
    out: pathlib.Path, steps: int, mesh: str, rng: random.Random, in_save: bool
) -> bool | None:
    """Starts and kills one life.

    Returns:
      Whether half a save is on the disk then, its own or that of a life before which it did not
      come to sweep away; None if it ended before it was killed.
    """
    first = not sk.Checkpointer(out / "checkpoints").steps()
    until = last_step(out) + rng.randrange(2 * EVERY)
    child = start(out, steps, mesh)
    while last_step(out) < until or (first and not sk.Checkpointer(out / "checkpoints").steps()):
        if os.waitpid(child, os.WNOHANG)[0]:
            return None
        time.sleep(0.01)
    time.sleep(rng.uniform(0.0, 0.5))
    while in_save and not saving(out):
        if os.waitpid(child, os.WNOHANG)[0]:
            return None
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return saving(out)


def final(out: pathlib.Path, steps: int) -> dict[str, np.ndarray]:
    """The parameters of the last step, read in a process of its own."""
    target = out / "final.npz"
    child = os.fork()
    if child == 0:
        np.savez(target, **saved_leaves(out, steps, "params"))
        os._exit(0)
    os.waitpid(child, 0)
    with np.load(target) as found:
        return {path: found[path] for path in found.files}


def sha256(params: dict[str, np.ndarray]) -> str:
    """Of names and bytes."""
    digest = hashlib.sha256()
    for path in sorted(params):
        digest.update(path.encode() + params[path].tobytes())
    return digest.hexdigest()


def relative(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """Of all leaves the largest norm of the difference over the norm."""
    return max(
        float(np.linalg.norm(got[path] - x) / max(np.linalg.norm(x), 1e-30))
        for path, x in want.items()
    )


def contestant(
    name: str, work: pathlib.Path, steps: int, kills: int, meshes: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[int, float]]:
    """One run with its kills, and what came of it."""
    out, rng = work / name.replace(" ", "-"), random.Random(0)
    done = cut = lost = 0
    while done < kills:
        ended = life(out, steps, meshes[done % len(meshes)], rng, in_save=done % 2 == 1)
        if ended is None:
            break
        done, cut, before = done + 1, cut + bool(ended), last_step(out)
        newest = max(sk.Checkpointer(out / "checkpoints").steps(), default=0)
        lost += max(0, before - newest)
    while not any(row["kind"] == "result" for row in read_metrics(out)):
        child = start(out, steps, meshes[done % len(meshes)])
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    rows = [row for row in read_metrics(out) if row["kind"] == "step"]
    assert [row["step"] for row in rows] == list(range(1, steps + 1)), "double or missing steps"
    params = final(out, steps)
    row = {
        "run": name,
        "kills": done,
        "left half a save": cut,
        "resumes": len([r for r in read_metrics(out) if r["kind"] == "resumed"]),
        "steps made twice": lost,
        "parameters sha256": sha256(params)[:16],
    }
    return row, params, {row["step"]: row["loss"] for row in rows}


def main() -> None:
    """Runs all three and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=250)
    arguments = parser.parse_args()
    work = pathlib.Path(tempfile.mkdtemp())
    jax.config.update("jax_compilation_cache_dir", str(work / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # A text of its own: a run whose text changes between two lives rightly does not go on.
    (work / "text.txt").write_bytes(pathlib.Path(__file__).read_bytes())
    note = (
        f"{arguments.steps} steps, a checkpoint every {EVERY}, SGD in float32; the metrics "
        "of every run hold each step exactly once. `steps made twice` had metrics and were not "
        "yet saved. A life that is killed before it has opened the run is no resume. Compared with "
        "the run that was left alone: the largest difference of any "
        "leaf's norm, and of any step's loss."
    )
    rows, first = [], None
    plans = {
        "left alone": (0, MESHES[1:2]),
        "same mesh": (arguments.kills, MESHES[1:2]),
        "mesh changes": (arguments.kills, MESHES),
    }
    for name, (kills, meshes) in plans.items():
        began = time.monotonic()
        row, params, losses = contestant(name, work, arguments.steps, kills, meshes)
        first = first or (params, losses)
        apart = max(abs(losses[i] / loss - 1) for i, loss in first[1].items())
        row["seconds"] = round(time.monotonic() - began)
        row["parameters, relative"] = f"{relative(params, first[0]):.1e}"
        row["losses, relative"] = f"{apart:.1e}"
        rows.append(row)
        _harness.write("resume", "measured", "8 simulated CPU devices", rows, note)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
