"""One run killed at random instants, on another mesh, strategy and number of processes each time.

    XLA_FLAGS=--xla_backend_optimization_level=0 python benchmarks/kills.py [--kills 50]

Most of a life is compilation, so that LLVM need not optimize.

Each life of the run takes the next of ten layouts, with 1 to 4 processes (forked before JAX starts,
so that imports are paid once), joined by `sk.distributed` and trained by `sk.Trainer`. SIGKILL
comes at a random instant, every second time while a save is being written, to one process at random
or to all of them; those that are left must end by themselves. After the last kill the run is left
to end. Its metrics and parameters are compared with those of the same run on one device, which was
left alone.
"""

import argparse
import dataclasses
import os
import pathlib
import random
import secrets
import shutil
import signal
import socket
import tempfile
import time
from typing import Any

import _harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _run_folder import last_step, read_metrics, saved_leaves

import shardkit as sk
from shardkit.checkpoint import SavedStep
from shardkit.processes import _membership as membership

EVERY, WIDTH, HIDDEN, LAYERS, ROWS = 3, 24, 48, 2, 24
# Seconds that processes wait for one that was killed before it joined them, on a busy machine.
START = 45.0
# A process that outlives another one for longer than this is a bug.
PATIENCE = 2 * START


@dataclasses.dataclass(frozen=True)
class Layout:
    """What changes from life to life.

    Attributes:
      processes: number of them.
      devices: simulated devices of each.
      mesh: sizes of the axes, with all devices.
      strategy: names of `sk.strategies`.
      mode: of the step.
    """

    processes: int
    devices: int
    mesh: dict[str, int]
    strategy: tuple[str, ...]
    mode: str = "auto"

    def __str__(self) -> str:
        mesh = ",".join(f"{axis}={size}" for axis, size in self.mesh.items())
        return f"{self.processes}x{self.devices} {mesh} {'|'.join(self.strategy)} {self.mode}"


ALONE = Layout(1, 1, {"data": 1}, ("data",))
LAYOUTS = (
    Layout(1, 8, {"data": 4, "tensor": 2}, ("data", "tensor")),
    Layout(2, 4, {"fsdp": 8}, ("fsdp",)),
    Layout(3, 2, {"data": 3, "tensor": 2}, ("data", "tensor")),
    Layout(4, 1, {"data": 4}, ("zero",)),
    Layout(1, 6, {"data": 6}, ("data",), "shard_map"),
    Layout(2, 2, {"tensor": 4}, ("tensor",)),
    Layout(3, 1, {"data": 3}, ("zero",), "shard_map"),
    Layout(4, 2, {"fsdp": 4, "tensor": 2}, ("fsdp", "tensor")),
    Layout(1, 4, {"fsdp": 2, "data": 2}, ("data", "fsdp")),
    Layout(2, 3, {"fsdp": 6}, ("fsdp",)),
)
FIXED = (Layout(2, 2, {"data": 2, "tensor": 2}, ("data", "tensor")),)


def init(key: jax.Array) -> Any:
    """Two layers of residual products, with logical axes."""
    up, down = jax.random.split(key)
    draw = jax.random.normal
    return {
        "up": sk.WithAxes(
            draw(up, (LAYERS, WIDTH, HIDDEN)) / WIDTH**0.5, ("layers", "embed", "mlp")
        ),
        "down": sk.WithAxes(
            draw(down, (LAYERS, HIDDEN, WIDTH)) / HIDDEN**0.5, ("layers", "mlp", "embed")
        ),
        "scale": sk.WithAxes(jnp.ones((LAYERS, WIDTH)), ("layers", "embed")),
    }


def loss_fn(params: Any, batch: Any, key: jax.Array) -> jax.Array:
    """A regression with dropout, whose draws depend on the step's key."""
    x = sk.nn.constrain(batch["x"], "batch", "embed")
    keep = jax.random.bernoulli(key, 0.9, x.shape)
    for i in range(LAYERS):
        hidden = jnp.tanh(x * params["scale"][i] @ params["up"][i])
        x = x + sk.nn.constrain(hidden, "batch", "mlp") @ params["down"][i]
        x = sk.nn.constrain(jnp.where(keep, x, 0), "batch", "embed")
    return jnp.mean((x - jnp.sin(batch["x"])) ** 2)


def train(folder: pathlib.Path, steps: int, layout: Layout) -> None:
    """One life."""
    jax.config.update("jax_num_cpu_devices", layout.devices)
    rng = np.random.default_rng(0)
    source = sk.data.Arrays({"x": rng.normal(size=(10 * ROWS, WIDTH)).astype("f")}, rows=ROWS)
    strategy, *others = [getattr(sk.strategies, name)() for name in layout.strategy]
    for other in others:
        strategy |= other
    with sk.distributed(start_timeout=START) as process_group:
        step = sk.compile_step(
            loss_fn,
            optax.sgd(0.05, momentum=0.9),
            init=init,
            batch=source.batch(0),
            mesh=sk.MeshSpec(**layout.mesh).build(),
            strategy=strategy,
            mode=layout.mode,
        )
        config = sk.TrainConfig(
            steps=steps, eval_every=0, checkpoint_every=EVERY, log_every=10, check="off"
        )
        data = sk.data.Loader(source, step.batch_shardings)
        sk.Trainer(step, data, folder, config, process_group=process_group).run()


def start(folder: pathlib.Path, steps: int, layout: Layout) -> list[int]:
    """Forks the processes of one life, as `shardkit launch` starts them; returns their ids."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_server(("127.0.0.1", 0)) as port,
    ):
        addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in (listener, port)]
        port.close()  # JAX's service takes it in a moment
        token, ids = secrets.token_hex(), []
        for index in range(layout.processes):
            ours, theirs = socket.socketpair()
            child = os.fork()
            if child == 0:
                place = membership.Membership(
                    index=index,
                    count=layout.processes,
                    jax_coordinator=addresses[1],
                    coordinator=addresses[0],
                    token=token,
                    control=theirs.fileno(),
                    listener=os.dup(listener.fileno()) if index == 0 else None,
                )
                listener.close()
                _live(folder, steps, layout, place, index)
            theirs.close()
            ids.append(child)
            CONTROLS[child] = ours  # a launcher that is gone ends its processes
    return ids


CONTROLS: dict[int, socket.socket] = {}


def _live(
    folder: pathlib.Path, steps: int, layout: Layout, place: membership.Membership, index: int
) -> None:
    log = os.open(folder.parent / f"log-{index}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if layout.processes > 1:
        os.environ[membership.VARIABLE] = place.to_text()
    code = 1
    try:
        train(folder, steps, layout)
        code = 0
    except BaseException as error:  # as the interpreter would print it
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(code)


def running(ids: list[int]) -> list[int]:
    """Those that have not ended."""
    return [one for one in ids if one in CONTROLS and not _ended(one)]


def _ended(one: int) -> bool:
    if not os.waitpid(one, os.WNOHANG)[0]:
        return False
    CONTROLS.pop(one).close()
    return True


def wait(ids: list[int]) -> float:
    """Seconds until all have ended; those that do not are killed, and an error."""
    began = time.monotonic()
    while left := running(ids):
        if time.monotonic() - began > PATIENCE:
            for one in left:
                os.kill(one, signal.SIGKILL)
            raise RuntimeError(f"{len(left)} processes did not end")
        time.sleep(0.02)
    return time.monotonic() - began


def saving(folder: pathlib.Path) -> set[str]:
    """Saves that are half-written now."""
    return {path.name for path in (folder / "checkpoints").glob(".saving-*")}


def life(
    folder: pathlib.Path, steps: int, layout: Layout, rng: random.Random, in_save: bool
) -> tuple[bool, float] | None:
    """Starts and kills one life.

    Returns:
      Whether half a save of this life was on the disk then, and the seconds until the processes
      that were not killed had ended; None if the run ended before it was killed.
    """
    checkpoints = sk.Checkpointer(folder / "checkpoints")
    until, before = last_step(folder) + rng.randrange(2 * EVERY), saving(folder)
    ids = start(folder, steps, layout)
    while last_step(folder) < until or not checkpoints.steps():
        if len(running(ids)) < len(ids):
            return None
        time.sleep(0.02)
    time.sleep(rng.uniform(0.0, 0.2))
    while in_save and not saving(folder) - before:
        if len(running(ids)) < len(ids):
            return None
        time.sleep(0.0005)
    for one in ids if rng.random() < 0.3 else [rng.choice(ids)]:
        if one in running(ids):
            os.kill(one, signal.SIGKILL)
    cut = bool(saving(folder) - before)
    return cut, wait(ids)


def final(folder: pathlib.Path, steps: int) -> dict[str, np.ndarray]:
    """Parameters and momenta after the last step, read in a process of its own."""
    target = folder.parent / "final.npz"
    child = os.fork()
    if child == 0:
        np.savez(target, **saved_leaves(folder, steps, "params", "opt_state"))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with np.load(target) as found:
        return {path: found[path] for path in found.files}


def distance(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """Of all leaves the largest norm of the difference over the norm."""
    assert got.keys() == want.keys()
    return max(
        float(np.linalg.norm(got[path] - x) / max(np.linalg.norm(x), 1e-30))
        for path, x in want.items()
    )


def contestant(
    name: str, folder: pathlib.Path, steps: int, kills: int, layouts: tuple[Layout, ...]
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[int, float]]:
    """One run with its kills: its row, last state and losses by step."""
    rng, done, cut, lost, ends, used = random.Random(0), 0, 0, 0, [0.0], []
    while done < kills:
        layout = layouts[done % len(layouts)]
        ended = life(folder, steps, layout, rng, in_save=done % 2 == 1)
        if ended is None:
            break
        done, cut, before = done + 1, cut + ended[0], last_step(folder)
        used.append(layout.processes)
        ends.append(ended[1])
        newest = max(sk.Checkpointer(folder / "checkpoints").steps(), default=0)
        lost += max(0, before - newest)
        print(
            f"{name}: kill {done}, {layout}, step {before}, ended in {ended[1]:.1f} s", flush=True
        )
    while not any(row["kind"] == "finished" for row in read_metrics(folder)):
        ids = start(folder, steps, layouts[done % len(layouts)])
        while running(ids):
            time.sleep(0.02)
        log = (folder.parent / "log-0").read_text()
        assert any(row["kind"] == "finished" for row in read_metrics(folder)), log[-3000:]
    assert [path.name for path in folder.parent.glob(f"{folder.name}*")] == [folder.name]
    rows = [row for row in read_metrics(folder) if row["kind"] == "step"]
    assert [row["step"] for row in rows] == list(range(1, steps + 1)), "double or missing steps"
    SavedStep.open(folder / "checkpoints" / f"step-{steps:08d}").check_files()
    row = {
        "run": name,
        "kills": done,
        "with 1, 2, 3, 4 processes": ", ".join(str(used.count(n)) for n in range(1, 5)),
        "left half a save": cut,
        "resumes": len([r for r in read_metrics(folder) if r["kind"] == "resumed"]),
        "steps made twice": lost,
        "most s until the others ended": f"{max(ends):.1f}",
    }
    return row, final(folder, steps), {row["step"]: row["loss"] for row in rows}


def main() -> None:
    """Runs all three and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=330)
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    work = pathlib.Path(tempfile.mkdtemp())
    layouts = "; ".join(map(str, LAYOUTS))
    note = (
        f"{arguments.steps} steps of SGD with momentum and dropout in float32, a checkpoint every "
        f"{EVERY}; the metrics of every run hold each step exactly once. `steps made twice` had "
        "metrics and were not yet saved. `one layout` is 2x2 data=2,tensor=2. `all change` takes "
        f"in turn, as processes x devices, mesh, strategy and mode: {layouts}. Compared "
        "with the run on one device that was left alone: the largest difference of any leaf of "
        "parameters and momenta by its norm, and of any step's loss."
    )
    plans = {
        "left alone": (0, (ALONE,)),
        "all change": (arguments.kills, LAYOUTS),
        "one layout": (0, FIXED),
        "one layout, killed": (arguments.kills // 5, FIXED),
    }
    rows: list[dict[str, Any]] = []
    done: dict[str, tuple[dict[str, np.ndarray], dict[int, float]]] = {}
    for name, (kills, layout) in plans.items():
        began, folder = time.monotonic(), work / name.replace(" ", "-").replace(",", "") / "run"
        folder.parent.mkdir()
        steps = arguments.steps if kills == arguments.kills or not rows else arguments.steps // 5
        row, state, losses = contestant(name, folder, steps, kills, layout)
        done[name] = state, losses
        row["steps"] = steps
        want, want_losses = done["left alone"]
        row["losses, relative"] = (
            f"{max(abs(loss / want_losses[i] - 1) for i, loss in losses.items()):.1e}"
        )
        if steps == arguments.steps:
            row["state, relative"] = f"{distance(state, want):.1e}"
        if name == "one layout, killed":
            same = distance(state, done["one layout"][0]) == 0
            row["bits of `one layout`"] = "equal" if same else "not equal"
        row["seconds"] = round(time.monotonic() - began)
        rows.append(row)
        _harness.write("kills", "measured", "1-8 simulated CPU devices", rows, note)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
