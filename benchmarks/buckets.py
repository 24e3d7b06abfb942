"""Data from an S3 server on loopback, and runs that are copied to a bucket and back.

python benchmarks/buckets.py

Needs moto[server] and s3fs beside the test packages. The source of batches is the program of
docs/run/data.md, read from that page; a folder of the same files is what it is compared with.
"""

import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import _harness
from _run_folder import read_metrics

ROOT = Path(__file__).parents[1]
STEPS, STOP = 12, 6
URLS = ("s3://bucket/run", "gs://bucket/run")


def read_source(filesystem: str, folder: str) -> Any:
    """The source of the page, on a file system and a folder of it."""
    import fsspec
    import numpy as np

    page = (ROOT / "docs/run/data.md").read_text()
    found = re.search(r'```text\n(fs = fsspec\.filesystem\("s3"\).*?)```', page, re.DOTALL)
    assert found, "docs/run/data.md has no source of batches from a bucket"
    code = found[1].replace('"s3"', repr(filesystem)).replace('"bucket"', repr(folder))
    names: dict[str, Any] = {"fsspec": fsspec, "np": np}
    exec(code, names)
    return names["Bucket"]()


def train(source: Any, folder: Path, steps: int) -> list[float]:
    """Losses of a run in a folder, which resumes what is there."""
    import jax
    import jax.numpy as jnp
    import optax

    import shardkit as sk

    step = sk.compile_step(
        lambda params, batch, key: jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2),
        optax.adam(0.1),
        init=lambda key: {"w": jax.random.normal(key, (8,))},
        batch=source.batch(0),
        mesh=sk.MeshSpec(data=8).build(),
        strategy=sk.strategies.data(),
    )
    config = sk.TrainConfig(steps=steps, checkpoint_every=4, check="off")
    sk.Trainer(step, source, str(folder), config).run()
    return [row["loss"] for row in read_metrics(folder) if row["kind"] == "step"]


def main() -> None:
    """Serves, trains, compares, and writes the result."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="none",
        AWS_SECRET_ACCESS_KEY="none",
        AWS_DEFAULT_REGION="us-east-1",
    )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            rows = run(Path(scratch))
    finally:
        server.stop()
    note = "moto's S3 server on loopback, read through s3fs."
    assert all(row["is"] for row in rows), rows
    _harness.write("buckets", "measured", "8 simulated CPU devices", rows, note)


def run(scratch: Path) -> list[dict[str, Any]]:
    """One row for each claim."""
    import fsspec
    import numpy as np

    import shardkit as sk

    sk.simulate_devices(8)
    files, generator = scratch / "files", np.random.default_rng(0)
    files.mkdir()
    for number in range(4):
        np.save(files / f"{number}.npy", generator.normal(size=(256, 9)).astype(np.float32))
    bucket = fsspec.filesystem("s3")
    bucket.mkdir("bucket")
    bucket.put(f"{files}/*", "bucket/")

    local = train(read_source("file", str(files)), scratch / "local", STEPS)
    remote = train(read_source("s3", "bucket"), scratch / "remote", STEPS)

    source, resumed = read_source("s3", "bucket"), scratch / "resumed"
    train(source, resumed, STOP)
    bucket.mkdir("runs")
    bucket.put(str(resumed), "runs/resumed", recursive=True)
    shutil.rmtree(resumed)
    bucket.get("runs/resumed", str(resumed), recursive=True)
    copied = train(source, resumed, STEPS)

    refused = []
    os.chdir(scratch)
    for url in URLS:
        try:
            train(source, Path(url), STOP)
        except sk.ShardkitError as error:
            refused.append(str(error).splitlines()[0])
    return [
        {"what": f"{STEPS} losses from the bucket equal those from files", "is": remote == local},
        {
            "what": f"a run of {STOP} steps, copied to a bucket and back, and gone on with to "
            f"{STEPS}: equal losses",
            "is": copied == local,
        },
        {
            "what": f"{' and '.join(URLS)} as a run folder are refused, and no folder is made",
            "is": len(refused) == len(URLS) and not any(scratch.glob("*:*")),
        },
    ]


if __name__ == "__main__":
    main()
