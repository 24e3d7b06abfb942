"""Runs that fail in one of several processes, started by tests/test_several_processes.py.

python -m tests._broken_run FOLDER NAME[:HOW]...
"""

import collections
import contextlib
import dataclasses
import importlib.util
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import shardkit as sk

STEPS, BREAKS_AT = 8, 5
CONFIG = sk.TrainConfig(steps=STEPS, eval_every=0, checkpoint_every=2, log_every=1)


def compiled(devices=None, rows=8):
    """A step whose weights are split inside each process, and whose rows span both."""
    axes = {"data": 4, "tensor": 2} if devices is None else {"data": 1, "tensor": 1}
    return sk.compile_step(
        lambda params, batch, key: jnp.mean(jnp.tanh(batch["x"] @ params["w"]) ** 2),
        optax.sgd(0.5, momentum=0.9),
        init=lambda key: {"w": jax.random.normal(key, (8, 4))},
        batch={"x": jax.ShapeDtypeStruct((rows, 8), jnp.float32)},
        mesh=sk.MeshSpec(**axes).build(devices=devices or jax.devices()),
        strategy=sk.Strategy(params=sk.PathRules({"w": P(None, "tensor")}), batch=P("data")),
        on_nonfinite="stop",
    )


def batch_of(i):
    """The global batch of update `i`, counted from 0."""
    return {"x": np.random.default_rng(i).normal(size=(8, 8)).astype(np.float32)}


def connect_badly(n):
    """Makes connections to the coordinator of this run, and sends what no process sends."""
    address = json.loads(os.environ["SHARDKIT_PROCESS"])["coordinator"]
    host, _, port = address.rpartition(":")
    rng = random.Random(0)
    for _ in range(n):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1) as one:
            one.sendall(rng.choice([b"1\n", rng.randbytes(300), b"x" * 2**16, b"[" * 999 + b"\n"]))


def broken(how, process, i):
    """A batch, or the failure `how` in its place, in process 1."""
    batch = batch_of(i)
    if how == "hostile" and i == 0 and process == 1:
        thread = threading.Thread(target=connect_badly, args=(10_000,), name="hostile")
        thread.start()
    if how and i >= BREAKS_AT and process == 1:
        if how == "hostile":
            for thread in threading.enumerate():
                if thread.name == "hostile":
                    thread.join()
        elif how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "raises":
            raise OSError("the text is gone")
        elif how == "stuck":
            time.sleep(600)
        elif how == "poisoned":
            batch["x"][7, 2] = np.nan
    return batch


WATCHED = dataclasses.replace(
    CONFIG, replica_check_every=2, check="every 3", profile="2:3", eval_every=2, best_to_keep=1,
    keep_period=4, loggers=("tensorboard",) if importlib.util.find_spec("tensorboardX") else (),
)  # fmt: skip


class Events(sk.Callback):
    """Counts every event, in every process."""

    def __init__(self):
        self.counts = collections.Counter()

    def on_start(self, run, state):
        self.counts["start"] += 1

    def on_batch(self, step, state, batch):
        self.counts["batch"] += 1

    def on_dispatch(self, step, state, batch):
        self.counts["dispatch"] += 1

    def on_step(self, metrics):
        self.counts["step"] += 1

    def on_eval(self, step, values):
        self.counts["eval"] += 1

    def on_save(self, step):
        self.counts["save"] += 1

    def on_finish(self, state):
        self.counts["finish"] += 1

    def on_exit(self, error):
        self.counts["exit"] += 1


def watch(folder, step, process_group):
    """A run with everything that a run can have, counted in each process."""
    events = Events()

    def data(i):
        return {name: x[step.local_rows] for name, x in batch_of(i).items()}

    def evaluate(step, state):
        return {"bits_per_byte": step.evaluate(state, data(0))["loss"]}

    sk.Trainer(
        step, data, folder, WATCHED, evaluate=evaluate, callbacks=[events],
        process_group=process_group,
    ).run()  # fmt: skip
    (folder / f"events-{process_group.index}.json").write_text(json.dumps(events.counts))


class Stops(sk.Callback):
    """Ends the run after an update, in process 1 alone."""

    def __init__(self, process):
        self.process = process

    def on_start(self, run, state):
        self.run = run

    def on_step(self, metrics):
        if self.process == 1 and metrics.step == BREAKS_AT:
            self.run.stop("good enough")


def train(folder, step, how="", process_group=None):
    """Trains to the end or to the failure, resuming from the checkpoints in the folder."""
    process_group = process_group or sk.ProcessGroup()

    def data(i):
        return {name: x[step.local_rows] for name, x in broken(how, process_group.index, i).items()}

    callbacks = [Stops(process_group.index)] if how == "stops" else []
    return sk.Trainer(
        step, data, folder, CONFIG, record={"model": "tanh"}, callbacks=callbacks,
        process_group=process_group,
    ).run()  # fmt: skip


def main(folder: Path, runs: list[str]) -> None:
    """Runs the runs, one after the other."""
    limits = {"start_timeout": 10.0} if runs == ["run:stops"] else {"step_timeout": 4.0}
    with sk.distributed(**limits) as process_group:
        step = compiled(rows=16 if runs == ["run:differs"] and process_group.index else 8)
        for run in runs:
            name, _, how = run.partition(":")
            if how == "watched":
                watch(folder / name, step, process_group)
                continue
            if how == "elsewhere":
                own = folder / f"of process {process_group.index}"
                sk.Checkpointer(own).save(1, step.init(jax.random.key(0)))
            train(folder / name, step, how, process_group)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
