"""About 1 GB of state to and from the disk, beside plain `dd` on the same one.

    python benchmarks/checkpoint_io.py [--gigabytes 1] [--turns 3]

Each row is a process of its own, so that its peak memory is its own. Files are read with a cold
page cache as far as an ordinary process can have that: `posix_fadvise(DONTNEED)` after a sync,
for `dd` as for the rest.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import _harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import shardkit as sk

# Rows of the batch of an update whose state is saved.
LEAVES, ROWS = 16, 256
LAYOUTS = {
    "8": ({"fsdp": 8}, PartitionSpec("fsdp")),
    "2x4": ({"data": 2, "tensor": 4}, PartitionSpec(None, "tensor")),
    "1": ({"data": 1}, PartitionSpec()),
}
WORK = "SHARDKIT_BENCHMARK_WORK"


def sharding(layout: str) -> NamedSharding:
    """Of every leaf."""
    axes, spec = LAYOUTS[layout]
    size = int(np.prod(list(axes.values())))
    return NamedSharding(sk.MeshSpec(**axes).build(devices=jax.devices()[:size]), spec)


def shape(gigabytes: float) -> tuple[int, int]:
    """Of one leaf, f32."""
    return int(gigabytes * 1e9 / LEAVES / 4 / 4096) // 8 * 8, 4096


def make(gigabytes: float) -> dict[str, jax.Array]:
    """A state on 8 devices."""
    to = sharding("8")
    made = jax.jit(
        lambda i: jnp.full(shape(gigabytes), i, jnp.float32) + jnp.arange(4096.0), out_shardings=to
    )
    return {f"w{i}": jax.block_until_ready(made(float(i))) for i in range(LEAVES)}


def forget(folder: pathlib.Path) -> None:
    """Puts files on the disk and takes them out of the page cache."""
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


class Highest:
    """Of a part of the process's life: peak of memory, looked at every 5 ms; processor seconds."""

    def __enter__(self) -> "Highest":
        self._began = time.process_time()
        self.before = self.highest = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        self.used = time.process_time() - self._began

    def _look(self) -> None:
        while not self._stop.wait(0.005):
            self.highest = max(self.highest, self._now())

    @staticmethod
    def _now() -> float:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def save(work: pathlib.Path, gigabytes: float) -> dict[str, float]:
    """One save of a fresh state: how long the caller waits, and how long it takes."""
    state = make(gigabytes)
    for before in ("warm", "steps"):
        shutil.rmtree(work / before, ignore_errors=True)
    with sk.Checkpointer(work / "warm") as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(8)})
    with Highest() as memory, sk.Checkpointer(work / "steps") as checkpoints:
        start = time.perf_counter()
        checkpoints.save(1, state)
        blocked = time.perf_counter() - start
        checkpoints.wait()
        total = time.perf_counter() - start
    highest = memory.highest - memory.before
    return {"seconds": total, "blocked": blocked, "model_state": highest, "used": memory.used}


def save_in_training(work: pathlib.Path, gigabytes: float) -> dict[str, float]:
    """A save between two updates of as large a state: what the updates around it take longer."""
    folder = work / "training"
    shutil.rmtree(folder, ignore_errors=True)
    axes, spec = LAYOUTS["8"]
    step = sk.compile_step(
        lambda params, batch, key: sum(jnp.mean((batch["x"] @ w.T) ** 2) for w in params.values()),
        optax.sgd(1e-3),
        init=lambda key: {f"w{i}": jnp.full(shape(gigabytes), i / 1e3) for i in range(LEAVES)},
        batch={"x": jax.ShapeDtypeStruct((ROWS, 4096), jnp.float32)},
        mesh=sk.MeshSpec(**axes).build(),
        strategy=sk.Strategy(params=sk.PathRules({"**": spec}), batch=PartitionSpec("fsdp")),
    )
    batch = step.shard_batch({"x": np.ones((ROWS, 4096), np.float32)})
    state = step.init(jax.random.key(0))

    def update(state: Any) -> tuple[Any, float]:
        start = time.perf_counter()
        state, done = step(state, batch)
        jax.block_until_ready(done)
        return state, time.perf_counter() - start

    undisturbed, disturbed = [], []
    with sk.Checkpointer(folder) as checkpoints:
        # The first save of a state compiles the program of its fingerprints.
        checkpoints.save(0, state)
        checkpoints.wait()
        for i in range(6):
            state, seconds = update(state)
            undisturbed += [seconds] if i else []
        with Highest() as memory:
            start, began = time.perf_counter(), time.process_time()
            checkpoints.save(1, state)
            blocked, used = time.perf_counter() - start, time.process_time() - began
            while 1 not in checkpoints.steps():
                state, seconds = update(state)
                disturbed.append(seconds)
            total = time.perf_counter() - start
    each = statistics.median(undisturbed)
    return {
        "seconds": total,
        "blocked": blocked,
        "blocked_used": used,
        "model_state": memory.highest - memory.before,
        "step": each,
        "beside": statistics.median(disturbed),
    }


def restore(work: pathlib.Path, gigabytes: float, layout: str) -> dict[str, float]:
    """One restore, every bit checked twice."""
    like = {f"w{i}": jax.ShapeDtypeStruct(shape(gigabytes), jnp.float32) for i in range(LEAVES)}
    to = sharding(layout)
    forget(work / "steps")
    with Highest() as memory:
        start = time.perf_counter()
        jax.block_until_ready(sk.Checkpointer(work / "steps").restore(like, to).state)
        seconds = time.perf_counter() - start
    highest = memory.highest - memory.before
    return {"seconds": seconds, "blocked": seconds, "model_state": highest, "used": memory.used}


def dd(work: pathlib.Path, gigabytes: float, reading: bool) -> dict[str, float]:
    """The same bytes with `dd`."""
    blocks = int(np.prod(shape(gigabytes)) * 4 * LEAVES / 2**20)
    target = work / "dd" / "file"
    target.parent.mkdir(exist_ok=True)
    if reading:
        forget(target.parent)
        words = [f"if={target}", "of=/dev/null"]
    else:
        words = ["if=/dev/zero", f"of={target}", f"count={blocks}", "conv=fsync"]
    start = time.perf_counter()
    subprocess.run(["dd", "bs=1M", *words], check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "blocked": seconds, "model_state": 0.0}


def contestants(work: pathlib.Path, size: float) -> dict[str, Any]:
    """What is timed, in the order in which files come to be."""
    return {
        "dd write, fsync": lambda: dd(work, size, reading=False),
        "save, 8 devices": lambda: save(work, size),
        "save between updates": lambda: save_in_training(work, size),
        "dd read": lambda: dd(work, size, reading=True),
        **{
            f"restore on {layout}": lambda layout=layout: restore(work, size, layout)
            for layout in LAYOUTS
        },
    }


def alone(name: str, gigabytes: float) -> dict[str, float]:
    """Runs one contestant in a process of its own."""
    words = [sys.executable, __file__, "--only", name, "--gigabytes", str(gigabytes)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """All contestants in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only")
    arguments = parser.parse_args()
    size = arguments.gigabytes
    if arguments.only:
        sk.simulate_devices(8)
        work = pathlib.Path(os.environ[WORK])
        print(json.dumps(contestants(work, size)[arguments.only]()))
        return
    work = pathlib.Path(tempfile.mkdtemp())
    os.environ[WORK] = str(work)
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in contestants(work, size)}
    for _ in range(arguments.turns):
        for name, found in seen.items():
            found.append(alone(name, size))
    real = np.prod(shape(size)) * 4 * LEAVES / 1e9
    rows = [_row(name, found, float(real)) for name, found in seen.items()]
    note = _note(seen["save between updates"]) + (
        f"{real:.2f} GB of f32 in {LEAVES} leaves, median of {arguments.turns} processes. A save "
        "computes CRC-32 and fingerprints, writes and syncs; the caller waits only for `caller "
        "waits`. Between updates its copies lie in the memory of those of the first save. A "
        "restore compares fingerprints; its memory includes the state itself, which one CPU holds "
        "for all devices. The disk is a virtual one: what is written "
        "may lie in its host's memory, what is read from a cold cache does not."
    )
    _harness.write("checkpoint_io", "measured", "8 simulated CPU devices", rows, note)
    shutil.rmtree(work)


def _note(found: list[dict[str, float]]) -> str:
    keys = ("step", "blocked", "beside", "blocked_used")
    step, blocked, beside, used = (statistics.median(one[key] for one in found) for key in keys)
    return (
        f"Between updates, the second save of a run: an update of {ROWS} rows takes {step:.2f} s, "
        f"the save makes the caller wait for {blocked:.2f} s ({blocked / step:.0%} of an "
        f"update; {used:.2f} s of processors), "
        f"and an update beside the writing takes {beside / step:.2f} x as long, on the same cores. "
    )


def _row(name: str, found: list[dict[str, float]], gigabytes: float) -> dict[str, Any]:
    middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
    spread = [one["seconds"] for one in found]
    return {
        "what": name,
        "seconds": f"{middle['seconds']:.2f} ({min(spread):.2f}-{max(spread):.2f})",
        "GB/s": f"{gigabytes / middle['seconds']:.2f}",
        "caller waits, s": f"{middle['blocked']:.2f}",
        "memory above before, GB": f"{middle['model_state']:.2f}",
        "processors, s": f"{middle['used']:.2f}" if "used" in middle else "",
    }


if __name__ == "__main__":
    main()
