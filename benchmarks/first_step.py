"""From `shardkit train` to its first update: with an empty cache, and with what was kept.

`python benchmarks/first_step.py` starts the default run on one CPU device, ends it at its first
update (Ctrl-C), and starts it again, so that it resumes; with `compile.cache=auto` and `off`, in
turn, each in its own empty folder, and beside each the imports of such a run alone. Writes
`benchmarks/results/first_step.{json,md}`.
"""

import argparse
import os
import pathlib
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from _harness import write

ROOT = pathlib.Path(__file__).parent.parent
FIELDS = (
    *("train.log_every=1", "train.eval_every=0", "train.sample=0", "train.baselines=false"),
    *("train.eval_batches=1", "devices=cpu:1", "mesh=data=1", "strategy=data"),
)
IMPORTS = """
import importlib, sys, jax, optax, flax.nnx, jax.experimental.serialize_executable
for room in "cli._train step.owners step.self_check run checkpoint data config lm".split():
    importlib.import_module(f"shardkit.{room}")
jax.devices()
"""


def start(folder: str, *fields: str) -> dict[str, float]:
    """Starts a run and ends it at its first update: seconds until then, and what it compiled."""
    options = [word for field in (*FIELDS, *fields) for word in ("--set", field)]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "shardkit", "train", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_LOG_COMPILES": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stderr
    logged: list[str] = []
    reader = threading.Thread(target=logged.extend, args=(process.stderr,))
    reader.start()
    line = next((line for line in process.stdout if line.lstrip().startswith("step ")), "")
    seconds, at_update = time.perf_counter() - began, len(logged)
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    process.wait()
    reader.join()
    assert line, f"the run ended with exit code {process.returncode} before its first update"
    used = _processor_seconds(before)
    compiled = sum("Finished XLA compilation" in text for text in logged[:at_update])
    return {"wall": seconds, "used": used, "compiled": compiled}


def import_all(_: str) -> dict[str, float]:
    """Imports what a run imports, and starts the backend."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, env=environment)
    return {"wall": time.perf_counter() - began, "used": _processor_seconds(before), "compiled": 0}


def _processor_seconds(before: resource.struct_rusage) -> float:
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Starts all of them in turn and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    seen: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(options.turns):
        for cache in ("auto", "off"):
            with tempfile.TemporaryDirectory() as folder:
                calls: dict[str, Any] = {
                    "imports alone": import_all,
                    "new run, empty cache": lambda at, to=cache: start(at, f"compile.cache={to}"),
                    "resumed": lambda at, to=cache: start(at, f"compile.cache={to}"),
                }
                for run, call in calls.items():
                    found = call(folder)
                    seen.setdefault((cache, run), []).append(found)
                    print(cache, run, found, flush=True)
    rows = [
        {
            "compile.cache": cache,
            "run": run,
            "to the first update (s)": _median(found, "wall"),
            "less imports of the same turn (s)": round(
                statistics.median(
                    one["wall"] - imports["wall"]
                    for one, imports in zip(found, seen[cache, "imports alone"], strict=True)
                ),
                1,
            ),
            "fastest (s)": round(min(one["wall"] for one in found), 1),
            "compiled until then": int(_median(found, "compiled")),
            "processor time of the process (s)": round(min(one["used"] for one in found), 1),
            "turns": options.turns,
        }
        for (cache, run), found in seen.items()
    ]
    note = (
        "The default run on one CPU device. Wall time from the start of the command to the line of "
        "its first update; on a busy machine compare processor time, which is that of the whole "
        "process until it has saved and ended. Programs are counted by JAX_LOG_COMPILES."
    )
    write("first_step", "measured", "1 CPU device", rows, note)


def _median(found: list[dict[str, float]], name: str) -> float:
    return round(statistics.median(one[name] for one in found), 1)


if __name__ == "__main__":
    main()
