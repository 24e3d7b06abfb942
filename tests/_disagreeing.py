"""Runs of two processes that do not agree, one after the other; process 0 prints what is told.

python -m tests._disagreeing FOLDER FAULT...
"""

import json
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import shardkit as sk


def compiled(differs):
    scale, rate = 1.0 + differs("loss"), 0.1 + differs("rate")
    noise = np.random.default_rng(differs("init")).normal(size=(8, 4)).astype("f")
    return sk.compile_step(
        lambda params, batch, key: scale * jnp.mean((batch["x"] @ params["w"] + batch["c"]) ** 2),
        optax.sgd(rate),
        init=lambda key: {"w": jax.random.normal(key, (8, 4)) + noise},
        batch={
            "x": jax.ShapeDtypeStruct((8, 8), jnp.float32),
            "c": jax.ShapeDtypeStruct((8, 4), jnp.float32),
        },
        mesh=sk.MeshSpec(data=2, tensor=4).build(
            devices=jax.devices()[:: 1 - 2 * differs("devices")]
        ),
        # The rows of c are in every process, and half of w.
        strategy=sk.Strategy(params=sk.PathRules({"w": P("data")}), batch=P("tensor")),
        compiler_options={"xla_cpu_enable_fast_math": bool(differs("compiler_options"))},
    )


def run(folder, fault, process_group):
    def differs(name):
        return int(name == fault and process_group.index == 1)

    jax.config.update("jax_threefry_partitionable", not differs("flag"))
    jax.config.update("jax_disable_most_optimizations", bool(differs("compiler")))
    os.environ["NVIDIA_TF32_OVERRIDE"] = str(differs("environment"))
    step = compiled(differs)

    def batch(i):
        rng = np.random.default_rng(i)
        whole = {"x": rng.normal(size=(8, 8)), "c": rng.normal(size=(8, 4)) + differs("batch")}
        return {name: x.astype("f")[step.local_rows] for name, x in whole.items()}

    config = sk.TrainConfig(
        steps=3 + differs("steps"),
        checkpoint_every=2 - differs("checkpoint_every"),
        seed=differs("seed"),
        eval_every=differs("eval_every"),
        check="off",
        replica_check_every=1,
    )
    record = {"model": {"size": differs("record")}}
    given = {"w": np.full((8, 4), differs("given"), "f")} if fault == "given" else None
    sk.Trainer(
        step, batch, folder, config, record=record, params=given, process_group=process_group
    ).run()


def main(folder, faults):
    with sk.distributed(step_timeout=20) as outer:
        for fault in faults:
            began = time.monotonic()
            try:
                # A group of its own, whose end is not that of the launched processes.
                with sk.distributed(step_timeout=20) as process_group:
                    run(folder / fault, fault, process_group)
                said = "agreed"
            except sk.ShardkitError as error:
                said = f"{type(error).__name__}: {error}"
            if outer.index == 0:
                seconds = time.monotonic() - began
                print(json.dumps({"fault": fault, "said": said, "seconds": seconds}), flush=True)
            outer.gather(fault, None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
