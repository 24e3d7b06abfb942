"""Peak memory of a load and of a save of about 2 GB in four files, on 8 simulated devices.

    python benchmarks/hf_memory.py [--gigabytes 2]

Each row is a process of its own. The peak is the largest resident set since just before the call,
less the one just before it; it includes the pages of files that are mapped.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

jax.config.update("jax_num_cpu_devices", 8)

import _harness  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import shardkit as sk  # noqa: E402
from shardkit.lm import DecoderConfig, decoder_model  # noqa: E402
from shardkit.step import resolve_layout  # noqa: E402

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
    "rms_norm_eps": 1e-5,
}
NOTE = (
    "f32, fsdp=4 x tensor=2. For a load the state is created in the call and counts; a save finds "
    "it on the devices. The bound is 1.2 x the largest shard of a leaf, and the state for a load."
)


def make_spec(config: DecoderConfig) -> sk.StepSpec:
    """The step whose layout the weights get."""
    model = decoder_model(config)
    shape = jax.ShapeDtypeStruct((8, 128), np.int32)
    return sk.StepSpec(
        loss_fn=model.loss_fn,
        init=model.init,
        optimizer=optax.sgd(0.1),
        batch=dict.fromkeys(("inputs", "targets", "weights"), shape),
        strategy=sk.strategies.fsdp() | sk.strategies.tensor(),
    )


def write_folder(folder: pathlib.Path, gigabytes: float) -> None:
    """Writes a folder of random weights, in four files."""
    layers = max(1, round((gigabytes - 0.26) / 0.0474))
    like = folder / "like"
    like.mkdir(parents=True)
    (like / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    abstract = jax.eval_shape(decoder_model(sk.hf.decoder_config(like)).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.random(x.value.shape, np.float32),
        abstract,
        is_leaf=lambda x: isinstance(x, sk.WithAxes),
    )
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    sk.hf.save(folder / "model", params, like=like, max_file_bytes=int(total / 3.7))


def resident(field: str) -> int:
    """Bytes of `VmRSS` or `VmHWM` of this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def child(what: str, folder: pathlib.Path) -> None:
    """Measures one call, and prints a row."""
    model = folder / "model"
    spec = make_spec(sk.hf.decoder_config(model))
    mesh = sk.MeshSpec(fsdp=4, tensor=2).build()
    out = folder / f"out-{os.getpid()}"
    resolve_layout(spec, mesh)  # so that what JAX keeps of the trace is not counted
    params: Any = sk.hf.load(model, spec, mesh) if what == "save" else None
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size again
    start = time.perf_counter()
    if what == "load":
        params = jax.block_until_ready(sk.hf.load(model, spec, mesh))
    else:
        sk.hf.save(out, params, like=model)
    seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
    leaves = jax.tree.leaves(params)
    state = sum(x.nbytes for x in leaves)
    shard = max(x.addressable_shards[0].data.nbytes for x in leaves)
    bound = 1.2 * shard + (state if what == "load" else 0)
    row = {"call": what, "files": len(list(model.glob("*.safetensors")))}
    sizes = {"state": state, "largest shard": shard, "peak": peak, "bound": bound}
    row |= {f"{name} MB": round(size / 1e6, 1) for name, size in sizes.items()}
    print(json.dumps({**row, "within": peak <= bound, "seconds": round(seconds, 2)}))


def main() -> None:
    """Runs a process for each call, and writes the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--child", nargs=2)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], pathlib.Path(arguments.child[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        write_folder(pathlib.Path(name), arguments.gigabytes)
        rows = []
        for what in ("load", "save"):
            command = [sys.executable, __file__, "--child", what, name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1])
    print(_harness.write("hf_memory", "measured", "8 simulated CPU devices", rows, NOTE))


if __name__ == "__main__":
    main()
