"""What `compile_step` costs over a hand-written `jax.jit` with the same shardings and donation.

`python benchmarks/overhead.py` times a step of tens of milliseconds and a tiny one, on 1 and on 8
simulated devices, each in a child process whose contestants take turns, and writes
`benchmarks/results/overhead.{json,md}`. The claim: ratio of medians ≤ 1.02 for the longer step.
"""

import argparse
import functools
import json
import subprocess
import sys
from typing import Any

from _harness import interleave, write

# Name: (rows, width, layers, calls in one turn).
SIZES = {"long": (512, 256, 6, 1), "tiny": (8, 16, 2, 100)}


def child(devices: int, size: str, turns: int) -> None:
    """Times both contestants in this process and prints one row."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    import jax.numpy as jnp
    import numpy as np
    import optax

    import shardkit as sk

    rows, width, layers, calls = SIZES[size]
    batch = {"x": np.ones((rows, width), np.float32) / width}

    def init(key):
        keys = jax.random.split(key, layers)
        return [jax.random.normal(k, (width, width)) / width**0.5 for k in keys]

    def loss_fn(params, batch, key):
        x = batch["x"]
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean((x - batch["x"]) ** 2)

    optimizer = optax.adam(1e-3)
    step = sk.compile_step(
        loss_fn,
        optimizer,
        init=init,
        batch=batch,
        mesh=sk.MeshSpec(data=devices).build(),
        strategy=sk.strategies.data(),
    )

    def plain(state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch, state.key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return sk.TrainState(
            state.step + 1, params, opt_state, {}, state.key, state.halted
        ), metrics

    whole = jax.NamedSharding(step.mesh, jax.P())
    hand_written = jax.jit(
        plain,
        in_shardings=(step.shardings, step.batch_shardings),
        out_shardings=(step.shardings, whole),
        donate_argnums=0,
    )
    placed = step.shard_batch(batch)
    states = {"jit": step.init(jax.random.key(0)), "step": step.init(jax.random.key(0))}

    def run(name, call):
        for _ in range(calls):
            states[name], metrics = call(states[name], placed)
            # Simulated devices deadlock when many sharded programs queue up.
            jax.block_until_ready(metrics)

    # A B B A: on a busy machine whoever comes second pays for the time slice of the first.
    order = {"jit": hand_written, "step": step, "step again": step, "jit again": hand_written}
    contestants = {
        name: functools.partial(run, name.removesuffix(" again"), call)
        for name, call in order.items()
    }
    seen = interleave(contestants, turns)

    def mean(name, field):
        return (getattr(seen[name], field) + getattr(seen[f"{name} again"], field)) / 2 / calls

    jit, ours = mean("jit", "median"), mean("step", "median")
    row = {
        "devices": devices,
        "step": size,
        "jit (ms)": round(jit * 1e3, 3),
        "compile_step (ms)": round(ours * 1e3, 3),
        "ratio": round(ours / jit, 3),
        "ratio of fastest quarters": round(mean("step", "low") / mean("jit", "low"), 3),
        "ratio of CPU time": round(mean("step", "cpu") / mean("jit", "cpu"), 3),
        "difference (µs)": round((ours - jit) * 1e6, 1),
        "turns": 2 * turns,
    }
    print(json.dumps(row))


def spawn(devices: int, size: str, turns: int) -> dict[str, Any]:
    """One row from a process that has its devices from the start."""
    command = [sys.executable, __file__, "--child", str(devices), size, str(turns)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Runs every case and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=3)
    parser.add_argument("--turns", type=int, default=40)
    options = parser.parse_args()
    if options.child:
        devices, size, turns = options.child
        child(int(devices), size, int(turns))
        return
    rows = [spawn(devices, size, options.turns) for devices in (1, 8) for size in SIZES]
    note = "Medians of interleaved turns; each call blocks. Devices are simulated: no speed-up."
    write("overhead", "measured", "1 and 8 simulated CPU devices", rows, note)


if __name__ == "__main__":
    main()
