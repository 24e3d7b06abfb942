"""Peak host memory while a state of about 1 GB is initialised on 8 simulated devices.

`python benchmarks/init.py` runs each case in a child process and writes
`benchmarks/results/init.{json,md}`. The claim: peak ≤ baseline + state + one largest leaf, where
the baseline is the peak of a process that does the same with as many leaves, each tiny: what
imports and compilers hold.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from _harness import write

LAYERS, WIDTH = 10, 2880  # f32: 10 · 2880² · 4 B = 332 MB, three times with adam's moments


def peak_bytes() -> int:
    """The largest resident size that this process ever had (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def child(layers: int, width: int) -> None:
    """Initialises one state and prints what it cost."""
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    import jax.numpy as jnp
    import optax

    import shardkit as sk

    def init(key):
        keys = jax.random.split(key, layers)
        return {f"layer_{i}": jax.random.normal(keys[i], (width, width)) for i in range(layers)}

    def loss_fn(params, batch, key):
        return jnp.mean(sum((batch @ w).sum() for w in params.values()) ** 2)

    strategy = sk.Strategy(
        params=sk.shard_largest("fsdp", min_size=1),
        batch=jax.P("fsdp"),
    )
    step = sk.compile_step(
        loss_fn,
        optax.adam(1e-3),
        init=init,
        batch=jax.ShapeDtypeStruct((8, width), jnp.float32),
        mesh=sk.MeshSpec(fsdp=8).build(),
        strategy=strategy,
    )
    state = jax.block_until_ready(step.init(jax.random.key(0)))
    leaves = jax.tree.leaves((state.params, state.opt_state))
    held = sum(piece.data.nbytes for x in leaves for piece in x.addressable_shards)
    largest = max(sum(piece.data.nbytes for piece in x.addressable_shards) for x in leaves)
    print(
        json.dumps(
            {
                "layers": layers,
                "width": width,
                "peak_bytes": peak_bytes(),
                "state_bytes": held,
                "largest_leaf_bytes": largest,
            }
        )
    )


def spawn(layers: int, width: int) -> dict[str, Any]:
    """One state in a process of its own."""
    command = [sys.executable, __file__, "--child", str(layers), str(width)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(layers: int, width: int) -> dict[str, Any]:
    """The state, and a tiny one of as many leaves, which shows what all the rest costs."""
    row, tiny = spawn(layers, width), spawn(layers, 64)
    row["baseline_bytes"] = tiny["peak_bytes"] - tiny["state_bytes"]
    allowed = row["baseline_bytes"] + row["state_bytes"] + row["largest_leaf_bytes"]
    row["above_state_bytes"] = row["peak_bytes"] - row["baseline_bytes"] - row["state_bytes"]
    row["holds"] = row["peak_bytes"] <= allowed
    return row


def main() -> None:
    """Runs the case and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2, type=int)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--width", type=int, default=WIDTH)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    row = measure(options.layers, options.width)
    mib = {
        f"{name.removesuffix('_bytes').replace('_', ' ')} (MiB)": round(row[name] / 2**20)
        for name in row
        if name.endswith("_bytes")
    }
    note = "VmHWM of a child process; holds: peak ≤ baseline + state + one largest leaf."
    write("init", "measured", "8 simulated CPU devices", [{**mib, "holds": row["holds"]}], note)


if __name__ == "__main__":
    main()
