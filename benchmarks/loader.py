"""Whether data keeps up: tokens/s of the loader alone, and a step's time with and without it.

`python benchmarks/loader.py` runs on 1 and on 8 simulated devices, each in a child process, and
writes `benchmarks/results/loader.{json,md}`. Two claims: the loader makes many times the tokens
that a step consumes; a step that reads its data takes at most 2 % longer than one that is given
the same batch again and again (ratio of medians of interleaved turns).
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _harness import interleave, write

# Rows and tokens of a batch that is loaded alone, and of one that is trained on.
ALONE, TRAINED = (64, 2048), (16, 256)


def sources(size: tuple[int, int], folder: Path) -> dict[str, Any]:
    """The same text as a stream of bytes, as token shards on disk, packed, and as an array."""
    import numpy as np

    import shardkit as sk
    from shardkit.data import DataConfig, load_text, write_tokens

    rows, length = size
    text = load_text(DataConfig(seq_len=length, batch_size=rows))
    if not (folder / "a.bin").exists():
        documents = text.corpus.train.split(b"\0")
        coded = (np.frombuffer(one, np.uint8) for one in documents)
        write_tokens(folder / "a.bin", coded, 2**16, 0)
    shards = DataConfig(path=str(folder), seq_len=length, batch_size=rows)
    stream = np.frombuffer(text.corpus.train, np.uint8).astype(np.int32)
    cut = stream[: len(stream) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    tree = {
        "inputs": cut[:, :-1],
        "targets": cut[:, 1:],
        "weights": np.ones(cut[:, 1:].shape, np.float32),
    }
    return {
        "text": text,
        "shards": load_text(shards),
        "packed": load_text(DataConfig(seq_len=length, batch_size=rows, packing=True)),
        "arrays": sk.data.Arrays(tree, rows),
    }


def alone(devices: int, turns: int, folder: Path) -> list[dict[str, Any]]:
    """Tokens/s of each kind of data, from its source to the devices, nothing else running."""
    import jax
    from jax.sharding import NamedSharding

    import shardkit as sk

    sharding = NamedSharding(sk.MeshSpec(data=devices).build(), jax.P("data"))
    loaders = {}
    for name, data in sources(ALONE, folder).items():
        shardings = jax.tree.map(lambda x: sharding, data.batch(0, slice(0, 1)))
        loaders[name] = sk.data.Loader(data, shardings)

    def one(name):
        for _ in range(4):
            jax.block_until_ready(next(loaders[name]))

    seen = interleave({name: functools.partial(one, name) for name in loaders}, turns)
    for loader in loaders.values():
        loader.close()
    tokens = 4 * ALONE[0] * ALONE[1]
    return [
        {
            "devices": devices,
            "what": f"loader alone, {name}",
            "ms": round(each.median / 4 * 1e3, 3),
            "quarters (ms)": f"{each.low / 4 * 1e3:.3f}-{each.high / 4 * 1e3:.3f}",
            "tokens/s": round(tokens / each.median),
            "ratio": "",
        }
        for name, each in seen.items()
    ]


def overlap(devices: int, turns: int, folder: Path) -> list[dict[str, Any]]:
    """Times of a step: the same batch again, read ahead, and read when it is asked for."""
    import jax

    import shardkit as sk
    from shardkit.lm import compile_run

    config = sk.Config()
    text = sources(TRAINED, folder)["text"]
    mesh = sk.MeshSpec(data=devices, tensor=1).build()
    strategy, optimizer = sk.strategies.data() | sk.strategies.tensor(), config.optimizer
    step = compile_run(config.model, text.config, mesh, strategy, optimizer.build(100))
    fixed = step.shard_batch(text.batch(0))
    ahead = sk.data.Loader(text, step.batch_shardings)
    at_once = sk.data.Loader(text, step.batch_shardings, prefetch=0)
    contestants = {
        "same batch": lambda: fixed,
        "read ahead": lambda: next(ahead),
        "read when asked": lambda: next(at_once),
    }
    states = {name: step.init(jax.random.key(0)) for name in contestants}

    def run(name):
        states[name], metrics = step(states[name], contestants[name]())
        jax.block_until_ready(metrics)

    seen = interleave({name: functools.partial(run, name) for name in contestants}, turns)
    ahead.close()
    at_once.close()
    base = seen["same batch"].median
    return [
        {
            "devices": devices,
            "what": f"step, {name}",
            "ms": round(each.median * 1e3, 2),
            "quarters (ms)": f"{each.low * 1e3:.2f}-{each.high * 1e3:.2f}",
            "tokens/s": round(TRAINED[0] * TRAINED[1] / each.median),
            "ratio": round(each.median / base, 4),
        }
        for name, each in seen.items()
    ]


def child(devices: int, turns: int) -> None:
    """Measures in this process and prints the rows."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    with tempfile.TemporaryDirectory() as folder:
        rows = alone(devices, turns, Path(folder)) + overlap(devices, turns, Path(folder))
    print(json.dumps(rows))


def spawn(devices: int, turns: int) -> list[dict[str, Any]]:
    """Rows from a process that has its devices from the start."""
    command = [sys.executable, __file__, "--child", str(devices), "--turns", str(turns)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Runs every case and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", type=int)
    parser.add_argument("--turns", type=int, default=40)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.turns)
        return
    rows = [row for devices in (1, 8) for row in spawn(devices, options.turns)]
    note = (
        f"Loaded alone: {ALONE[0]} rows of {ALONE[1]} tokens a batch. Step: the default decoder on "
        f"{TRAINED[0]} rows of {TRAINED[1]}; ratio to a step that is given the same batch again. "
        "Medians of interleaved turns, each blocks; quarters are of the turns. Devices are "
        "simulated on the cores that also load: what loading costs is not hidden by an accelerator."
    )
    write("loader", "measured", "1 and 8 simulated CPU devices", rows, note)


if __name__ == "__main__":
    main()
